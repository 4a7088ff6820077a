"""Finished runs that together make a submission: the same settings, another seed each."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.collect import SeedSet, collect, unfinished
from trainer.config import RunConfig, SlotMode
from trainer.errors import RunError
from trainer.folder import RunFolder
from trainer.held_out import MODE_STAGES


@dataclass(frozen=True)
class FinishedRun:
    """A run whose every stage has a result and whose artifact is the one it scored."""

    folder: RunFolder
    config: RunConfig
    stages: dict[str, dict[str, Any]]
    """Result of each stage."""
    environment: dict[str, Any]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Logged training steps."""
        return [row for row in self.folder.read_metrics() if "train_nats" in row]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config.seed

    @property
    def artifact_bytes(self) -> int:
        """Size of the artifact."""
        return self.stages["artifact"]["artifact_bytes"]

    @property
    def finished(self) -> datetime:
        """When its last stage ended, UTC, to the second."""
        ends = [path.stat().st_mtime for path in (self.folder.path / "stages").glob("*.json")]
        return datetime.fromtimestamp(max(ends), UTC).replace(microsecond=0)

    @property
    def modes(self) -> list[SlotMode]:
        """SLOT modes it was scored in."""
        return [mode for mode, stage in MODE_STAGES.items() if stage in self.stages]

    def score(self, mode: SlotMode) -> dict[str, Any]:
        """Result of scoring in `mode`: nats, bpb, tokens, seconds."""
        return self.stages[MODE_STAGES[mode]]

    def causal(self, mode: SlotMode) -> bool:
        """What the probe found of `mode`."""
        return self.stages["causality"]["modes"][mode]["causal"]


def load_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], SeedSet]:
    """The runs in `paths` by seed, and their results as one set.

    Raises:
        RunError: one is no run folder, not finished, or has lost its artifact; or two have one
            seed, or differ in more than the seed.
    """
    runs = sorted((_load(path) for path in paths), key=lambda run: run.seed)
    return runs, collect("this submission", [run.folder.path for run in runs])


def _load(path: Path) -> FinishedRun:
    folder, config = RunFolder.open(path)
    missing = unfinished(folder, config)
    if missing is not None:
        raise RunError(
            f"{path} is not finished: it has no result of stage {missing}. "
            f"Finish it with `python -m trainer --resume {path}`"
        )
    stages = {p.stem: json.loads(p.read_text()) for p in sorted((path / "stages").glob("*.json"))}
    if not folder.artifact.is_file():
        raise RunError(f"{path} has no {folder.artifact.name} any more; bring it back")
    if hashlib.sha256(folder.artifact.read_bytes()).hexdigest() != stages["artifact"]["sha256"]:
        raise RunError(f"{folder.artifact} is not the artifact this run scored; bring that back")
    environment = json.loads((path / "environment.json").read_text())
    return FinishedRun(folder, config, stages, environment)
