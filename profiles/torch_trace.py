"""The PyTorch profiler's trace of some steps as a list of events.

A kernel is tied to the host operations around its launch, and to a phase by the time of its
launch: autograd launches the backward kernels from a thread of its own while the main thread
waits inside the range.
"""

import bisect
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from profiles.components import Event
from profiles.workload import PREFIX

GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Traced:
    """Events of some steps, the time in which nothing ran, and the wall clock of a step."""

    events: list[Event]
    idle_ms: float
    step_ms: float


def trace(step: Callable[[], None], steps: int, cuda: bool) -> Traced:
    """Profile `steps` calls of `step`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    _wait(cuda)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        started = time.perf_counter()
        for _ in range(steps):
            with torch.profiler.record_function(PREFIX + "step"):
                step()
                _wait(cuda)
        step_ms = 1000 * (time.perf_counter() - started) / steps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        raw = json.loads(path.read_text())["traceEvents"]
    events, busy_ms, window_ms = read(raw)
    return Traced(events, max(0.0, window_ms - busy_ms), step_ms)


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def read(raw: list[dict[str, Any]]) -> tuple[list[Event], float, float]:
    """Events of a Chrome trace, their total and the length of the step ranges, in ms.

    The events are GPU work if there is any, else the own times of host operations.
    """
    complete = [e for e in raw if e.get("ph") == "X"]
    annotations = [e for e in complete if e.get("cat") == "user_annotation"]
    steps = [e for e in annotations if e["name"] == PREFIX + "step"]
    window_ms = sum(e["dur"] for e in steps) / 1000
    host = _Host(complete, annotations)
    device = [e for e in complete if e.get("cat") in GPU_CATEGORIES]
    events = _device_events(complete, device, host) if device else host.own_times(steps)
    return events, sum(e.ms for e in events), window_ms


class _Host:
    """Host operations by thread, and the phases of the step by time."""

    def __init__(self, complete: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> None:
        self.phases = sorted(
            (e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(PREFIX))
            for e in annotations
            if e["name"].startswith(PREFIX) and e["name"] != PREFIX + "step"
        )
        self.starts = [p[0] for p in self.phases]
        self.threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for e in complete:
            if e.get("cat") == "cpu_op":
                self.threads[e["tid"]].append(e)
        for operations in self.threads.values():
            operations.sort(key=lambda e: (e["ts"], -e["dur"]))

    def phase_at(self, ts: float) -> str:
        """Name of the phase that covers a time; "" if none does."""
        i = bisect.bisect_right(self.starts, ts) - 1
        return self.phases[i][2] if i >= 0 and ts < self.phases[i][1] else ""

    def around(self, moments: list[tuple[Any, float]]) -> list[list[dict[str, Any]]]:
        """For each (thread, time) the operations that contain it, outermost first."""
        found: list[list[dict[str, Any]]] = [[] for _ in moments]
        by_thread: dict[Any, list[tuple[float, int]]] = defaultdict(list)
        for i, (tid, ts) in enumerate(moments):
            by_thread[tid].append((ts, i))
        for tid, wanted in by_thread.items():
            operations, at = self.threads.get(tid, []), 0
            stack: list[dict[str, Any]] = []
            for ts, i in sorted(wanted):
                while at < len(operations) and operations[at]["ts"] <= ts:
                    _pop_finished(stack, operations[at]["ts"])
                    stack.append(operations[at])
                    at += 1
                _pop_finished(stack, ts)
                found[i] = list(stack)
        return found

    def own_times(self, steps: list[dict[str, Any]]) -> list[Event]:
        """Every operation inside the steps, with its time less that of operations it calls."""
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in steps)
        main = {e["tid"] for e in steps}
        events: list[Event] = []
        seen: set[int] = set()
        for tid in main:
            operations = self.threads.get(tid, [])
            own = {id(e): e["dur"] for e in operations}
            parents: list[dict[str, Any]] = []
            chains: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
            for e in operations:
                _pop_finished(parents, e["ts"])
                if parents:
                    own[id(parents[-1])] -= e["dur"]
                parents.append(e)
                chains.append((e, list(parents)))
            for e, chain in chains:
                if any(begin <= e["ts"] < end for begin, end in spans):
                    phase = self.phase_at(e["ts"])
                    own_ms = own[id(e)] / 1000
                    events.append(_event(e["name"], chain, phase, own_ms, seen, on_gpu=False))
        return events


def _pop_finished(stack: list[dict[str, Any]], ts: float) -> None:
    while stack and stack[-1]["ts"] + stack[-1]["dur"] <= ts:
        stack.pop()


def _device_events(
    complete: list[dict[str, Any]], device: list[dict[str, Any]], host: _Host
) -> list[Event]:
    """GPU work in order of its start; time covered by earlier work is not counted again."""
    launches = {
        e["args"]["correlation"]: e
        for e in complete
        if e.get("cat") in LAUNCH_CATEGORIES and "correlation" in e.get("args", {})
    }
    device.sort(key=lambda e: e["ts"])
    launched = [launches.get(e.get("args", {}).get("correlation")) for e in device]
    chains = host.around([(e["tid"], e["ts"]) if e else (None, 0.0) for e in launched])
    events: list[Event] = []
    covered = float("-inf")
    seen: set[int] = set()
    for e, launch, chain in zip(device, launched, chains, strict=True):
        end = e["ts"] + e["dur"]
        own_us = max(0.0, end - max(e["ts"], covered))
        covered = max(covered, end)
        phase = host.phase_at(launch["ts"]) if launch else ""
        events.append(_event(e["name"], chain, phase, own_us / 1000, seen, on_gpu=True))
    return events


def _event(
    name: str,
    chain: list[dict[str, Any]],
    phase: str,
    ms: float,
    seen: set[int],
    *,
    on_gpu: bool,
) -> Event:
    """An event; its shapes come from attention's own operation or the innermost telling one."""
    attention = [e for e in chain if "scaled_dot_product" in e["name"] and _informative(_dims(e))]
    inwards = attention or chain
    source = max(reversed(inwards), key=lambda e: _informative(_dims(e)), default=None)
    dims, op = (_dims(source), source["name"]) if source else ((), "")
    key = id(source) if source else id(chain)
    first = key not in seen
    seen.add(key)
    return Event(name, tuple(e["name"] for e in chain), dims, phase, ms, on_gpu, first, op)


def _informative(dims: tuple[tuple[int, ...], ...]) -> bool:
    """Two matrices or more: enough to tell a product's role. `max` takes the innermost such."""
    return sum(len(d) >= 2 for d in dims) >= 2


def _dims(e: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Shapes of an operation's tensor arguments."""
    listed = e.get("args", {}).get("Input Dims", [])
    return tuple(tuple(d) for d in listed if d and all(isinstance(n, int) for n in d))
