"""The gate: is a subject slower than its baseline by more than the measured noise?

Every figure is a ratio: a subject's time over that of a fixed reference timed in turn with it, so
that clocks, temperature and neighbours cancel. A baseline holds the ratios of several measurements;
their scatter is the noise. A suspicious ratio is measured again, and only a subject that is too
slow every time fails: chance rarely strikes three times, a real regression always does.
"""

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import Measurement

BASELINES = Path(__file__).parent / "baselines"
RUNS = Path(__file__).resolve().parents[1] / "runs" / "bench"
"""Every run of `pytest bench` leaves its figures here, for trends."""
SMALLEST_MARGIN = 0.03
NOISE_MULTIPLE = 4.0
"""Margin in standard deviations of the baseline's ratios, which are estimated from few."""
NORMAL_OVER_MAD = 1.4826
"""Standard deviation of normal noise over its median absolute deviation; one disturbed
measurement must not widen a margin."""
PAUSES_S = (2.0, 8.0)
"""Pauses before the second and the third measurement of a subject that looks slower: a neighbour
that disturbs it may be gone by then."""
NOISY_MARGIN = 0.25
"""A baseline with a margin above this is called noisy when it is written."""


@dataclass(frozen=True)
class Baseline:
    """What one subject took, in units of its reference, each time it was measured."""

    reference: str
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def margin(self) -> float:
        """Relative slowdown that noise explains: at least SMALLEST_MARGIN."""
        deviation = statistics.median(abs(r - self.ratio) for r in self.ratios)
        noise = NORMAL_OVER_MAD * deviation / self.ratio
        return max(SMALLEST_MARGIN, NOISE_MULTIPLE * noise)


@dataclass(frozen=True)
class Verdict:
    """Outcome for one subject; `message` names it and both figures."""

    passed: bool
    message: str


def judge(
    name: str,
    baseline: Baseline | None,
    measure: Callable[[], Measurement],
    where: str,
    pauses_s: Sequence[float] = PAUSES_S,
) -> tuple[Verdict, list[Measurement]]:
    """Compare a subject with its baseline, measuring again while it looks too slow.

    Args:
        name: the subject.
        baseline: its baseline, if there is one.
        measure: times subject and reference once more.
        where: file the baseline was looked for in.
        pauses_s: seconds to wait before each repetition; as many as there may be repetitions.

    Returns:
        The verdict, and all measurements made (one if the first was good).
    """
    made = [measure()]
    if baseline is None:
        missing = f"{name}: no baseline in {where}. Make one: pytest bench --update-baseline"
        return Verdict(False, missing), made
    if baseline.reference != made[0].reference:
        changed = (
            f"{name}: the baseline in {where} was taken against {baseline.reference!r}, now it is "
            f"{made[0].reference!r}. Make a new one: pytest bench --update-baseline"
        )
        return Verdict(False, changed), made
    limit = baseline.ratio * (1 + baseline.margin)
    for pause_s in pauses_s:
        if made[-1].ratio <= limit:
            break
        time.sleep(pause_s)
        made.append(measure())
    best = min(m.ratio for m in made)
    change = best / baseline.ratio - 1
    figures = (
        f"{name}: {best:.4f} x {baseline.reference}, baseline {baseline.ratio:.4f} "
        f"({change:+.1%}, margin {baseline.margin:.1%}, {len(made)} measurement(s))"
    )
    if best > limit:
        return Verdict(False, f"slower than its baseline: {figures}"), made
    return Verdict(True, figures), made


def machine_class(environment: dict[str, Any]) -> str:
    """Name of a class of machines that share a baseline: the GPU's model, or CPU and cores.

    Args:
        environment: as `trainer.environment.describe` returns.
    """
    if environment["device"] != "cpu":
        return _slug(environment["device"])
    return _slug(f"cpu-{environment['cores']}-cores-{environment['cpu']}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def load(path: Path) -> dict[str, Baseline]:
    """Baselines by subject; none if there is no such file."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())["subjects"]
    return {
        name: Baseline(entry["reference"], tuple(entry["ratios"])) for name, entry in stored.items()
    }


def document(environment: dict[str, Any], subjects: dict[str, list[Measurement]]) -> dict[str, Any]:
    """JSON of a baseline, or of one run: environment, and every subject's ratios and times."""
    return {
        "environment": environment,
        "load_average": round(os.getloadavg()[0], 2),
        "subjects": {
            name: {
                "reference": made[0].reference,
                "ratios": [round(m.ratio, 5) for m in made],
                "margin": round(
                    Baseline(made[0].reference, tuple(m.ratio for m in made)).margin, 4
                ),
                "subject_ms": round(statistics.median(m.subject_ms for m in made), 5),
                "reference_ms": round(statistics.median(m.reference_ms for m in made), 5),
                **made[0].details,
            }
            for name, made in sorted(subjects.items())
        },
    }


def merged(old: dict[str, Any] | None, new: dict[str, Any], *, extend: bool) -> dict[str, Any]:
    """A baseline with `new` subjects put in place of old ones, or with their ratios joined.

    Subjects that were not measured stay as they were.
    """
    if old is None:
        return new
    subjects = dict(old["subjects"])
    for name, entry in new["subjects"].items():
        before = subjects.get(name)
        if extend and before is not None and before["reference"] == entry["reference"]:
            ratios = before["ratios"] + entry["ratios"]
            margin = round(Baseline(entry["reference"], tuple(ratios)).margin, 4)
            entry = {**entry, "ratios": ratios, "margin": margin}
        subjects[name] = entry
    return {**new, "subjects": dict(sorted(subjects.items()))}
