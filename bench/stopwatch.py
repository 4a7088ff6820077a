"""The only timing code of the project: subjects are timed interleaved, and compared by medians.

On a GPU, CUDA events bracket each call. Before it a buffer larger than the L2 cache is written, as
often as the host needs to launch the whole call meanwhile: caches are cold, and launch overhead
stays out of the figures. On a CPU the clock is read around each call: the wall clock, or for work
of a single thread that thread's own, which stands still while a neighbour has the core. Subjects
take turns within a round, so that drifting clocks and temperatures meet all of them alike.
"""

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

Subject = Callable[[int], object]
"""Takes the round's number, by which it may rotate its buffers."""

ROUNDS_IN_FLIGHT = 4
FLUSH_BYTES = 1 << 28
"""Several times the L2 cache of any GPU so far (50 MB on Hopper)."""
FLUSH_S = 5e-5
"""The least that writing it takes, at 5 TB/s."""
LONGEST_LEAD_S = 0.01
"""Calls that need longer to launch keep the GPU busy by themselves."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one subject over all rounds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int

    @classmethod
    def of(cls, times_ms: list[float]) -> "Timing":
        """Summary of at least two times."""
        deciles = statistics.quantiles(times_ms, n=10, method="inclusive")
        return cls(statistics.median(times_ms), deciles[0], deciles[-1], len(times_ms))

    def as_json(self) -> dict[str, float]:
        """JSON-able, rounded to a nanosecond."""
        return {key: round(value, 6) for key, value in asdict(self).items()}


def time_interleaved(
    subjects: dict[str, Subject], *, rounds: int, warm_up_rounds: int, device: str
) -> dict[str, Timing]:
    """Time all subjects in turn, `rounds` times each.

    Args:
        subjects: by name.
        rounds: measured rounds, at least two.
        warm_up_rounds: rounds before them that compile, allocate and warm the clocks.
        device: "cuda", "cpu", or "thread" for the calling thread's own time on a CPU.
    """
    times = times_interleaved(subjects, rounds=rounds, warm_up_rounds=warm_up_rounds, device=device)
    return {name: Timing.of(times_ms) for name, times_ms in times.items()}


def times_interleaved(
    subjects: dict[str, Subject], *, rounds: int, warm_up_rounds: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of every subject in every round; arguments as in `time_interleaved`."""
    for number in range(warm_up_rounds):
        for subject in subjects.values():
            subject(number)
    if device == "cuda":
        return _cuda_rounds(subjects, rounds)
    clock_s = time.thread_time if device == "thread" else time.perf_counter
    return _cpu_rounds(subjects, rounds, clock_s)


def _cpu_rounds(
    subjects: dict[str, Subject], rounds: int, clock_s: Callable[[], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name, subject in subjects.items():
            started = clock_s()
            subject(number)
            times[name].append(1000 * (clock_s() - started))
    return times


def _cuda_rounds(subjects: dict[str, Subject], rounds: int) -> dict[str, list[float]]:
    torch.cuda.synchronize()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    flushes = {name: 1 + round(_lead_s(subject) / FLUSH_S) for name, subject in subjects.items()}
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for first in range(0, rounds, ROUNDS_IN_FLIGHT):
        marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        for number in range(first, min(first + ROUNDS_IN_FLIGHT, rounds)):
            for name, subject in subjects.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(flushes[name]):
                    flush.zero_()
                begin.record()
                subject(number)
                end.record()
                marks.append((name, begin, end))
        torch.cuda.synchronize()
        for name, begin, end in marks:
            times[name].append(begin.elapsed_time(end))
    return times


_leads_s: "weakref.WeakKeyDictionary[Subject, float]" = weakref.WeakKeyDictionary()
"""Measured once for every subject."""


def _lead_s(subject: Subject) -> float:
    """Seconds of head start the host wants: twice what it takes to launch a call."""
    if subject not in _leads_s:
        torch.cuda.synchronize()
        started = time.perf_counter()
        subject(0)
        launched_s = time.perf_counter() - started
        torch.cuda.synchronize()
        _leads_s[subject] = min(LONGEST_LEAD_S, 2 * launched_s)
    return _leads_s[subject]
