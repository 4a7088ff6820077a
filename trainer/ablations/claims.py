"""The published claims, and whether they held here."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.ablations.execute import Result
from trainer.ablations.rows import BASE
from trainer.config import SIZE_LIMIT_BYTES

Results = Mapping[str, Result]
"""Finished runs by name."""

Verdict = Literal["held", "did not hold", "within noise", "not measured"]

NOISE_DEVIATIONS = 2 * math.sqrt(2)
"""A difference of two trainings has sqrt(2) times the standard deviation of one; twice that is
called noise."""


@dataclass(frozen=True)
class Claim:
    """One published figure."""

    text: str
    runs: tuple[str, ...]
    """Runs it is measured on."""
    measure: Callable[[Results], float]
    published: float
    rule: Literal["effect", "at most", "over"]
    """effect: as published in sign, and at least half as large. at most, over: against a limit."""
    unit: Literal["BPB", "%", "bytes"]
    trains: bool = False
    """Whether the noise of two trainings is in it."""


def score(results: Results, run: str, stage: str) -> float:
    """Bits per byte of a run in a stage."""
    return results[run]["stages"][stage]["bpb"]


def total_bytes(results: Results, run: str) -> int:
    """Artifact and code of a run."""
    stage = results[run]["stages"]["artifact"]
    return stage["artifact_bytes"] + stage["code_bytes"]


def _quantization_loss(results: Results, run: str) -> float:
    """BPB that quantization costs: after the round trip minus before."""
    return score(results, run, "round_trip") - score(results, run, "post_ema")


def _saved_percent(results: Results) -> float:
    stage = results[BASE]["stages"]["artifact"]
    return 100 * (1 - stage["artifact_bytes"] / stage["baseline_bytes"])


CLAIMS: tuple[Claim, ...] = (
    Claim("Brotli-11 is 5.9 % smaller than LZMA-9", (BASE,), _saved_percent, 5.9, "effect", "%"),
    Claim(
        "uniform int5 loses 0.019 BPB",
        ("int5",),
        lambda r: _quantization_loss(r, "int5"),
        0.019,
        "effect",
        "BPB",
    ),
    Claim(
        "the mixed scheme loses less than 0.003 BPB",
        (BASE,),
        lambda r: _quantization_loss(r, BASE),
        0.003,
        "at most",
        "BPB",
    ),
    Claim(
        "uniform int6 does not fit (17.36 MB)",
        ("int6",),
        lambda r: total_bytes(r, "int6"),
        SIZE_LIMIT_BYTES,
        "over",
        "bytes",
    ),
    Claim(
        "Turbo-Muon is 0.0018 BPB worse",
        (BASE, "turbo-muon"),
        lambda r: score(r, "turbo-muon", "post_ema") - score(r, BASE, "post_ema"),
        0.0018,
        "effect",
        "BPB",
        trains=True,
    ),
    Claim(
        "... and its artifact does not fit",
        ("turbo-muon",),
        lambda r: total_bytes(r, "turbo-muon"),
        SIZE_LIMIT_BYTES,
        "over",
        "bytes",
    ),
    Claim(
        "SLOT `shared` gains 0.0037 BPB",
        (BASE,),
        lambda r: score(r, BASE, "sliding") - score(r, BASE, "slot_shared"),
        0.0037,
        "effect",
        "BPB",
    ),
)


def noise_bpb(bases: Sequence[Result], stage: str) -> float | None:
    """BPB below which a difference of two trainings is noise; None with fewer than two seeds."""
    if len(bases) < 2:
        return None
    return NOISE_DEVIATIONS * statistics.stdev(b["stages"][stage]["bpb"] for b in bases)


def verdict(claim: Claim, results: Results, noise: float | None) -> Verdict:
    """Whether `claim` held in `results`, given the noise of a difference of two trainings."""
    if any(run not in results for run in claim.runs):
        return "not measured"
    value = claim.measure(results)
    if claim.rule == "over":
        return "held" if value > claim.published else "did not hold"
    if claim.rule == "at most":
        return "held" if value < claim.published else "did not hold"
    if claim.trains and noise is not None and abs(value) <= noise:
        return "within noise"
    return "held" if value >= claim.published / 2 else "did not hold"
