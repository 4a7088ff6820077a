"""A finished profile: components, kernels and the split of the wall clock; to and from JSON."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import dacite

from profiles.components import IDLE, UNATTRIBUTED, Event, Sizes, component, work
from trainer import files
from trainer.errors import DataError

SUM_TOLERANCE = 0.03
"""The components, the gap and what is unattributed must sum to the measured step within this."""


@dataclass(frozen=True)
class Component:
    """A named part of one step."""

    name: str
    ms: float
    launches: float
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def tflops(self) -> float:
        """Achieved TFLOP/s."""
        return self.flops / self.ms / 1e9 if self.ms else 0.0

    @property
    def gbytes(self) -> float:
        """Achieved GB/s of the least traffic."""
        return self.bytes / self.ms / 1e6 if self.ms else 0.0


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel (or operation) in a step."""

    name: str
    component: str
    ms: float
    launches: float


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of the device."""

    tflops: float
    """A large square matrix product."""
    gbytes: float
    """A large copy, bytes read plus written."""


@dataclass(frozen=True)
class Profile:
    """Where one training step's time goes."""

    source: str
    """Which profiler said so."""
    title: str
    step_ms: float
    """Wall clock of a profiled step."""
    unprofiled_ms: float
    """Wall clock of a step without the profiler."""
    components: list[Component]
    kernels: list[Kernel]
    ceilings: Ceilings
    environment: dict[str, Any] = field(default_factory=dict)
    counters: list[dict[str, Any]] = field(default_factory=list)
    """Nsight Compute's figures per kernel, where it ran."""

    @property
    def on_gpu(self) -> bool:
        """Taken on a GPU."""
        return self.environment.get("device", "cpu") != "cpu"

    @property
    def busy_ms(self) -> float:
        """Time in kernels (on a CPU: in operations)."""
        return sum(c.ms for c in self.components if c.name not in (IDLE,))

    @property
    def gap_ms(self) -> float:
        """Time in which nothing ran: launches, Python, waiting."""
        return sum(c.ms for c in self.components if c.name == IDLE)

    @property
    def launches(self) -> float:
        """Kernel launches (on a CPU: operations) of a step."""
        return sum(c.launches for c in self.components)

    def without_profiler(self) -> "Profile":
        """The same step with the gap and the clock it has when nobody watches.

        The profiler costs the host several microseconds a launch, which a GPU that is ahead shows
        as a gap; its kernels are as fast as ever. On a CPU there is no such split.
        """
        if not self.on_gpu:
            return self
        gap = Component(IDLE, max(0.0, self.unprofiled_ms - self.busy_ms), 0)
        parts = [gap if c.name == IDLE else c for c in self.components]
        return replace(self, step_ms=self.busy_ms + gap.ms, components=parts)

    @property
    def sum_error(self) -> float:
        """How far components and gap are from the measured step, relative."""
        return (self.busy_ms + self.gap_ms) / self.step_ms - 1


def build(
    *,
    source: str,
    title: str,
    events: list[Event],
    idle_ms: float,
    steps: int,
    step_ms: float,
    unprofiled_ms: float,
    sizes: Sizes,
    element_bytes: int,
    ceilings: Ceilings,
    environment: dict[str, Any],
) -> Profile:
    """Group the events of `steps` steps; times and counts are per step."""
    groups: dict[str, list[Event]] = defaultdict(list)
    kernels: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        name = component(event, sizes)
        groups[name].append(event)
        kernels[event.name, name].append(event)
    parts = [
        Component(
            name,
            sum(e.ms for e in members) / steps,
            len(members) / steps,
            sum(work(e).flops for e in members) / steps,
            sum(work(e).elements for e in members) * element_bytes / steps,
        )
        for name, members in groups.items()
    ]
    if UNATTRIBUTED not in groups:
        parts.append(Component(UNATTRIBUTED, 0.0, 0))
    parts.sort(key=lambda c: -c.ms)
    parts.append(Component(IDLE, idle_ms / steps, 0))
    rows = [
        Kernel(name, group, sum(e.ms for e in members) / steps, len(members) / steps)
        for (name, group), members in kernels.items()
    ]
    rows.sort(key=lambda k: -k.ms)
    return Profile(source, title, step_ms, unprofiled_ms, parts, rows, ceilings, environment)


def save(path: Path, profile: Profile) -> None:
    """Write the profile as JSON. Raises RunError."""
    files.write_json(path, asdict(profile))


def load(path: Path) -> Profile:
    """Read a profile, or the `profile.json` of a folder. Raises DataError."""
    path = path / "profile.json" if path.is_dir() else path
    try:
        return dacite.from_dict(Profile, json.loads(path.read_text()), dacite.Config(cast=[float]))
    except (OSError, ValueError, dacite.DaciteError) as error:
        raise DataError(
            f"{path} is not a profile ({error}); `python -m profiles step --out FOLDER` makes one"
        ) from error
