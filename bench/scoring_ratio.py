"""Tokens per second of sliding-window scoring against straight passes, in turn in one process.

    python -m bench.scoring_ratio --out scoring_ratio.json [--attention flash4] [--passes triton]

Sliding is what an evaluation does (trainer/scoring.py): the last layer and the head for the scored
positions alone, one CUDA graph a batch. Straight is the published formulation on the same windows,
weights, attention and MLP: plain PyTorch between the products, compiled, launched kernel by kernel.
Both score 16 batches of 32 windows of 2048 a call, every window its last 64 positions.

Wall clock: from the call until the GPU is done. GPU time: CUDA events around the call, whose
launches begin while the GPU still clears its cache; where the host falls behind in the middle of a
call, the GPU's wait counts. Numbers are medians over rounds; a ratio is that of one round.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench.pipeline_cases import SCORING_BATCHES, Scoring, sliding, straight
from bench.scale import Scale, current
from bench.stopwatch import Subject, Timing, times_interleaved
from trainer import environment, files
from trainer.config import AttentionBackend, MlpBackend, PassesBackend
from trainer.errors import ConfigError, FairwayError
from trainer.record import RECORD
from trainer.run import check_implementations

WARM_UP_ROUNDS = 2
"""The first compiles and captures."""


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.scoring_ratio`."""

    out: Path
    """JSON file for the results."""
    attention: AttentionBackend = RECORD.attention
    """Attention of both."""
    passes: PassesBackend = RECORD.passes
    """What lies between the products of sliding scoring; straight passes have plain PyTorch."""
    mlp: MlpBackend = RECORD.mlp
    """MLP of both."""
    rounds: int = 12
    """Measured rounds by each clock; a round of both takes half a second."""


def scale_of(arguments: Arguments) -> Scale:
    """The record with the named implementations. Raises ConfigError."""
    if arguments.rounds < 2:
        raise ConfigError("--rounds must be at least 2")
    if not torch.cuda.is_available():
        raise ConfigError("bench.scoring_ratio needs a CUDA GPU; torch finds none")
    base = current()
    chosen = replace(
        base.config, attention=arguments.attention, passes=arguments.passes, mlp=arguments.mlp
    )
    check_implementations(chosen)
    return Scale(chosen, base.device)


def measure(scale: Scale, rounds: int) -> dict[str, Any]:
    """Both formulations by each clock, and how far their scores are apart; JSON-able."""
    made = {"sliding": sliding(scale, "off"), "straight": straight(scale)}
    launched: dict[str, Subject] = {name: scoring.run for name, scoring in made.items()}
    finished = {name: _until_done(run) for name, run in launched.items()}
    clocks = {"wall": ("cpu", finished if scale.cuda else launched)}
    if scale.cuda:
        clocks["gpu"] = ("cuda", launched)
    results: dict[str, Any] = {}
    for clock, (device, subjects) in clocks.items():
        times_ms = times_interleaved(
            subjects, rounds=rounds, warm_up_rounds=WARM_UP_ROUNDS, device=device
        )
        results[clock] = compared(times_ms, made["sliding"].tokens)
    return {**results, "nats": _apart(made["sliding"], made["straight"])}


def _until_done(work: Subject) -> Subject:
    def run(number: int) -> None:
        work(number)
        torch.cuda.synchronize()

    return run


def compared(times_ms: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Milliseconds and tokens per second of each, and the ratio of tokens per second."""
    of_rounds = [b / a for a, b in zip(times_ms["sliding"], times_ms["straight"], strict=True)]
    ratio = Timing.of(of_rounds)
    return {
        "ms_per_call": {name: Timing.of(ms).as_json() for name, ms in times_ms.items()},
        "tokens_per_s": {
            name: round(1000 * tokens / Timing.of(ms).median_ms) for name, ms in times_ms.items()
        },
        "ratio": {
            "median": round(ratio.median_ms, 4),
            "p10": round(ratio.p10_ms, 4),
            "p90": round(ratio.p90_ms, 4),
        },
    }


def _apart(sliding_: Scoring, straight_: Scoring) -> dict[str, float]:
    """Mean nats of each, and the root mean square of the targets' differences."""
    scored_N = straight_.nats_N != 0
    a_S, b_S = sliding_.nats_N[scored_N], straight_.nats_N[scored_N]
    return {
        "sliding": a_S.mean().item(),
        "straight": b_S.mean().item(),
        "root_mean_square_apart": (a_S - b_S).square().mean().sqrt().item(),
    }


def show(results: dict[str, Any], batches: int) -> None:
    """What was measured, a line for each clock, and the scores."""
    table = Table(title="sliding-window scoring against straight passes, ms a batch")
    for heading in ("clock", "sliding", "straight", "sliding tokens/s", "ratio", "p10-p90"):
        table.add_column(heading)
    for clock in ("wall", "gpu"):
        if clock not in results:
            continue
        row = results[clock]
        ms = {name: t["median_ms"] / batches for name, t in row["ms_per_call"].items()}
        table.add_row(
            clock,
            f"{ms['sliding']:.2f}",
            f"{ms['straight']:.2f}",
            f"{row['tokens_per_s']['sliding']:,}",
            f"{row['ratio']['median']:.3f}",
            f"{row['ratio']['p10']:.3f}-{row['ratio']['p90']:.3f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        f"both: attention {results['attention']}, MLP {results['mlp']}; between the products: "
        f"sliding {results['passes']}, straight plain PyTorch"
    )
    nats = results["nats"]
    console.print(
        f"nats: sliding {nats['sliding']:.5f}, straight {nats['straight']:.5f}, targets "
        f"{nats['root_mean_square_apart']:.1e} apart (root mean square)"
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, write the JSON, print the table; returns the exit status."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    try:
        scale = scale_of(arguments)
        results = {
            "environment": environment.describe(),
            "attention": arguments.attention,
            "passes": arguments.passes,
            "mlp": arguments.mlp,
            **measure(scale, arguments.rounds),
        }
        files.write_json(arguments.out, results)
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(results, SCORING_BATCHES["cuda"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
