"""The gate: is a subject slower than its baseline by more than the measured noise?

Every figure is a ratio: a subject's time over that of a fixed reference timed in turn with it, so
that clocks, temperature and neighbours cancel. A baseline holds the ratios of several measurements
in each of several processes. Noise has two parts: measurements of one process scatter, and
processes differ as wholes (memory layout, placement on cores and caches, autotuned choices), which
repeating inside a process never shows. A suspicious ratio is measured again, and only a subject
that is too slow every time fails: chance rarely strikes three times, a real regression always does.
"""

import json
import math
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
"""Margin in standard deviations, which are estimated from few measurements."""
PRIOR_BETWEEN = 0.02
"""Deviation between processes to expect before any is seen: the median over the subjects of a
quiet machine (the Xeon of `baselines/`, three processes)."""
PRIOR_WEIGHT = 2
"""Degrees of freedom the expectation counts for. Two or three processes may agree by luck, and a
margin made of their luck alone flags the next one. Simulated with deviations between processes of
0.3 to 6 %, three processes: 0.3 % of good subjects are flagged, 99 % of 1.33x slowdowns caught."""
NORMAL_OVER_MAD = 1.4826
"""Standard deviation of normal noise over its median absolute deviation; one disturbed
measurement must not widen a margin."""
PAUSES_S = (2.0, 8.0)
"""Pauses before the second and the third measurement of a subject that looks slower: a neighbour
that disturbs it may be gone by then."""
NOISY_MARGIN = 0.25
"""A baseline with a margin above this is called noisy: a 1.33x slowdown may pass."""


@dataclass(frozen=True)
class Baseline:
    """What one subject took, in units of its reference: in each process, each time."""

    reference: str
    processes: tuple[tuple[float, ...], ...]

    @property
    def medians(self) -> list[float]:
        """Median ratio of each process."""
        return [statistics.median(ratios) for ratios in self.processes]

    @property
    def ratio(self) -> float:
        """Median over processes of their medians."""
        return statistics.median(self.medians)

    @property
    def within(self) -> float:
        """Relative standard deviation inside a process: robust, pooled over processes."""
        deviations = [
            abs(ratio / middle - 1)
            for ratios, middle in zip(self.processes, self.medians, strict=True)
            for ratio in ratios
        ]
        # Each process spends one degree of freedom on its own median.
        free = max(1, len(deviations) - len(self.processes))
        correction = math.sqrt(len(deviations) / free)
        return NORMAL_OVER_MAD * statistics.median(deviations) * correction

    @property
    def between(self) -> float:
        """Relative standard deviation between a new process and the baseline.

        The variance of the medians, weighed by its degrees of freedom against PRIOR_BETWEEN; plus
        what the baseline itself is off by, one part in the number of processes.
        """
        free = len(self.processes) - 1
        seen = statistics.variance(self.medians) / self.ratio**2 if free else 0.0
        expected = PRIOR_WEIGHT * PRIOR_BETWEEN**2
        variance = (expected + free * seen) / (PRIOR_WEIGHT + free)
        return math.sqrt(variance * (1 + 1 / len(self.processes)))

    @property
    def margin(self) -> float:
        """Relative slowdown that noise explains: at least SMALLEST_MARGIN."""
        return max(SMALLEST_MARGIN, NOISE_MULTIPLE * math.hypot(self.within, self.between))


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
        missing = f"{name}: no baseline in {where}. Make one: python -m bench.baseline"
        return Verdict(False, missing), made
    if baseline.reference != made[0].reference:
        changed = (
            f"{name}: the baseline in {where} was taken against {baseline.reference!r}, now it is "
            f"{made[0].reference!r}. Make a new one: python -m bench.baseline"
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
    return {
        name: _baseline(entry) for name, entry in json.loads(path.read_text())["subjects"].items()
    }


def describe(name: str, baseline: Baseline) -> str:
    """One line: the baseline and the parts of its margin."""
    noisy = ", NOISY: measure again on a quieter machine" if baseline.margin > NOISY_MARGIN else ""
    return (
        f"{name}: {baseline.ratio:.4f} x {baseline.reference}, margin {baseline.margin:.1%} "
        f"(inside a process {baseline.within:.1%}, between {len(baseline.processes)} "
        f"{baseline.between:.1%}){noisy}"
    )


def _baseline(entry: dict[str, Any]) -> Baseline:
    return Baseline(entry["reference"], tuple(tuple(ratios) for ratios in entry["processes"]))


def document(environment: dict[str, Any], subjects: dict[str, list[Measurement]]) -> dict[str, Any]:
    """JSON of one run, which is one process: environment, every subject's ratios and times."""
    return {
        "environment": environment,
        "load_average": round(os.getloadavg()[0], 2),
        "subjects": {
            name: {
                "reference": made[0].reference,
                "ratios": [round(m.ratio, 5) for m in made],
                "subject_ms": round(statistics.median(m.subject_ms for m in made), 5),
                "reference_ms": round(statistics.median(m.reference_ms for m in made), 5),
                **made[0].details,
            }
            for name, made in sorted(subjects.items())
        },
    }


def merged(old: dict[str, Any] | None, run: dict[str, Any], *, extend: bool) -> dict[str, Any]:
    """A baseline with a run's subjects put in place of old ones, or joined as a further process.

    Subjects that were not measured stay as they were; ratios to another reference than the run's
    are replaced.

    Args:
        old: the baseline so far, if there is one.
        run: as `document` makes it.
        extend: join instead of replacing.
    """
    subjects = {} if old is None else dict(old["subjects"])
    for name, measured in run["subjects"].items():
        before = subjects.get(name)
        figures = {key: value for key, value in measured.items() if key != "ratios"}
        processes = [measured["ratios"]]
        if extend and before is not None and before["reference"] == measured["reference"]:
            processes = before["processes"] + processes
        entry = {"reference": measured["reference"], "processes": processes}
        margin = round(_baseline(entry).margin, 4)
        commit = run["environment"].get("commit")
        subjects[name] = {**entry, "margin": margin, **figures, "commit": commit}
    return {**run, "subjects": dict(sorted(subjects.items()))}
