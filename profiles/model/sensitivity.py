"""What each matrix costs when it alone is quantized, and whether cheap figures foretell it.

The held-out change is a difference of paired per-token losses; no choice is made from it. The
expected damage on the model's own text (`trainer.damage`) is what the allocator chooses by.

Letters: B windows.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from profiles.model.subject import Estimate, Subject, window_nats
from trainer.allocate import ranked
from trainer.budget import Made
from trainer.damage import exchanged
from trainer.progress import progress

KINDS = ("q", "k", "v", "out", "up", "down")
MLP_KINDS = ("up", "down")

ByMatrix = dict[str, float]


def kind(name: str) -> str:
    """`up` of `blocks.3.up`."""
    return name.rsplit(".", 1)[1]


def layer(name: str) -> int:
    """3 of `blocks.3.up`."""
    return int(name.split(".")[1])


def held_out_changes(
    subject: Subject, made: Made, whole_B: Tensor, widths: tuple[float, ...]
) -> dict[float, dict[str, Tensor]]:
    """Change of every window's mean loss, float64 [B] on the CPU, by bits, then matrix.

    Args:
        subject: the model; its matrices are exchanged one at a time and put back.
        made: quantized matrices.
        whole_B: losses of the windows without any exchange.
        widths: bits to try.
    """
    matrices = subject.model.matrices()
    tries = [(bits, name) for bits in widths for name in matrices]
    changes: list[Tensor] = []
    with progress("held-out sensitivity", len(tries)) as advance:
        for bits, name in tries:
            with exchanged(matrices[name], made.matrices[bits][name]):
                changes.append(window_nats(subject) - whole_B)
            advance()
    found: dict[float, dict[str, Tensor]] = {bits: {} for bits in widths}
    for (bits, name), change_B in zip(tries, torch.stack(changes).cpu(), strict=True):
        found[bits][name] = change_B
    return found


def by_kind(changes: dict[str, Tensor]) -> dict[str, Estimate]:
    """Sum over the layers of each kind's changes; also `MLP`, `attention` and `all`."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for name, change_B in changes.items():
        part = "MLP" if kind(name) in MLP_KINDS else "attention"
        for group in (kind(name), part, "all"):
            sums[group] = sums[group] + change_B
    return {group: Estimate.of(sums[group]) for group in (*KINDS, "MLP", "attention", "all")}


@dataclass(frozen=True)
class Agreement:
    """How well a cheap figure orders the matrices by a measured one."""

    proxy: str
    measure: str
    spearman: float
    top: int
    """Matrices looked at from the top of both orders."""
    shared: int
    """How many of them are the same."""


def agreement(
    proxies: dict[str, ByMatrix], measures: dict[str, ByMatrix], top: int
) -> list[Agreement]:
    """Every proxy against every measure, matrix by matrix."""
    found = []
    for measure, measured in measures.items():
        names = list(measured)
        for proxy, figures in proxies.items():
            result = stats.spearmanr([figures[n] for n in names], [measured[n] for n in names])
            shared = set(ranked(figures)[:top]) & set(ranked(measured)[:top])
            rho = float(result.statistic)  # pyright: ignore[reportAttributeAccessIssue]
            found.append(Agreement(proxy, measure, rho, top, len(shared)))
    return found


def measures(made: Made, damages: dict[str, dict[float, float]]) -> dict[str, ByMatrix]:
    """What promotion from int5 to int6 is worth, seen in three ways, from the expected damage."""
    saved = {name: d[5] - d[6] for name, d in damages.items()}
    return {
        "expected damage at int5": {name: d[5] for name, d in damages.items()},
        "damage saved by int6": saved,
        "damage saved per byte": {
            name: nats / (made.sizes[name][6] - made.sizes[name][5]) for name, nats in saved.items()
        },
    }
