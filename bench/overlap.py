"""How much communication hides under computation: interval arithmetic on a GPU trace. Pure."""

from dataclasses import dataclass, field
from typing import Any

Interval = tuple[float, float]

KINDS = ("ReduceScatter", "AllGather", "AllReduce", "Broadcast")
"""As NCCL spells them in the names of its kernels."""
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Communication:
    """Milliseconds of NCCL kernels a step, all and by kind; a kernel's wait for peers included."""

    ms: float
    hidden_ms: float
    """While a compute kernel ran on another stream."""


@dataclass(frozen=True)
class Overlap:
    """One rank's GPU over some steps, in milliseconds a step."""

    window_ms: float
    """From the start of the first GPU work to the end of the last."""
    busy_ms: float
    """In which anything ran."""
    communication: Communication
    kinds: dict[str, Communication] = field(default_factory=dict)


def union(intervals: list[Interval]) -> list[Interval]:
    """The same points, as disjoint intervals in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(disjoint: list[Interval]) -> float:
    """Total length of disjoint intervals."""
    return sum(end - begin for begin, end in disjoint)


def intersection(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Points in both; `a` and `b` are disjoint and in order."""
    common: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            common.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def read(raw: list[dict[str, Any]], steps: int) -> Overlap | None:
    """Read the events of a Chrome trace of `steps` steps (times in us); None without GPU work."""
    work = [e for e in raw if e.get("ph") == "X" and e.get("cat") in GPU_CATEGORIES]
    if not work:
        return None
    kernels = [e for e in work if e["cat"] == "kernel"]
    compute = union([_interval(e) for e in kernels if not _is_communication(e)])
    talks = [e for e in kernels if _is_communication(e)]

    def measured(events: list[dict[str, Any]]) -> Communication:
        spans = union([_interval(e) for e in events])
        hidden = intersection(spans, compute)
        return Communication(length(spans) / 1000 / steps, length(hidden) / 1000 / steps)

    by_kind = {kind: [e for e in talks if kind in e["name"]] for kind in KINDS}
    everything = union([_interval(e) for e in work])
    return Overlap(
        window_ms=(everything[-1][1] - everything[0][0]) / 1000 / steps,
        busy_ms=length(everything) / 1000 / steps,
        communication=measured(talks),
        kinds={kind: measured(events) for kind, events in by_kind.items() if events},
    )


def _interval(e: dict[str, Any]) -> Interval:
    return e["ts"], e["ts"] + e["dur"]


def _is_communication(e: dict[str, Any]) -> bool:
    return "nccl" in e["name"].lower()
