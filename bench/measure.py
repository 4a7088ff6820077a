"""One subject against its fixed reference: rounds in turn, and the ratio of each round."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from bench.stopwatch import Subject, times_interleaved

FEWEST_ROUNDS = 2
MOST_ROUNDS = 60


@dataclass(frozen=True)
class Case:
    """A subject, the reference it is measured in, and the clock to use.

    Attributes:
        subject: takes the number of the round.
        reference: fixed work, timed right after the subject in every round.
        reference_name: changes whenever `reference` does.
        clock: "cuda" for CUDA events, "cpu" for the host's clock, "thread" for the calling
            thread's own time, if all the work is that thread's.
        details: figures to store beside the times, read after measuring.
        close: ends what the case started.
    """

    subject: Subject
    reference: Subject
    reference_name: str
    clock: str
    details: Callable[[], dict[str, Any]] = dict
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Measurement:
    """Medians over the rounds of one measurement."""

    reference: str
    ratio: float
    """Median over rounds of subject time / reference time."""
    subject_ms: float
    reference_ms: float
    subject_times_ms: tuple[float, ...] = field(repr=False)
    details: dict[str, Any] = field(default_factory=dict)


def warm_up(case: Case) -> None:
    """Compile, allocate and warm the clocks, before the first measurement."""
    pair = {"subject": case.subject, "reference": case.reference}
    times_interleaved(pair, rounds=0, warm_up_rounds=2, device=case.clock)


def measure(case: Case, budget_s: float) -> Measurement:
    """Time a warm `case` for about `budget_s` seconds, at least FEWEST_ROUNDS rounds."""
    pair = {"subject": case.subject, "reference": case.reference}
    times = times_interleaved(pair, rounds=1, warm_up_rounds=0, device=case.clock)
    round_ms = sum(first[0] for first in times.values())
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, round(1000 * budget_s / round_ms)))
    more = times_interleaved(pair, rounds=rounds - 1, warm_up_rounds=0, device=case.clock)
    times = {name: times[name] + more[name] for name in pair}
    ratios = [s / r for s, r in zip(times["subject"], times["reference"], strict=True)]
    return Measurement(
        reference=case.reference_name,
        ratio=statistics.median(ratios),
        subject_ms=statistics.median(times["subject"]),
        reference_ms=statistics.median(times["reference"]),
        subject_times_ms=tuple(times["subject"]),
        details=case.details(),
    )


def repeated(case: Case, subject_calls: int, reference_calls: int) -> Case:
    """The case with several calls in place of one; more of the subject's is a slower subject."""

    def times(work: Subject, calls: int) -> Subject:
        def run(number: int) -> None:
            for _ in range(calls):
                work(number)

        return run

    return replace(
        case,
        subject=times(case.subject, subject_calls),
        reference=times(case.reference, reference_calls),
    )
