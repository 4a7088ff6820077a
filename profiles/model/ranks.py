"""How much of their rank the matrices use.

Effective rank is exp(entropy of the singular values divided by their sum) (Roy & Vetterli 2007);
its utilisation is that over the full rank min(rows, columns). A matrix with equal singular values
uses 100 %.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.progress import track

ENERGY = 0.9


@dataclass(frozen=True)
class Rank:
    """Of one matrix."""

    full: int
    """min(rows, columns)."""
    utilisation: float
    """Effective rank over full rank."""
    energy_utilisation: float
    """Share of the singular values, largest first, that hold 90 % of the sum of squares."""


def rank(singular_S: Tensor) -> Rank:
    """From all singular values of a matrix, in descending order."""
    share_S = singular_S.double() / singular_S.double().sum()
    entropy = -torch.special.xlogy(share_S, share_S).sum()
    energy_S = singular_S.double().square().cumsum(0)
    needed = int((energy_S < ENERGY * energy_S[-1]).sum()) + 1
    full = len(singular_S)
    return Rank(full, entropy.exp().item() / full, needed / full)


def ranks(matrices: dict[str, Tensor]) -> dict[str, Rank]:
    """Of every matrix [rows, columns], by name."""
    return {
        name: rank(torch.linalg.svdvals(w.float()))
        for name, w in track(matrices.items(), "singular values", len(matrices))
    }
