"""Finished runs of several seeds as one result, and comparisons with earlier ones."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from trainer.config import RunConfig, SlotMode
from trainer.errors import ConfigError, RunError
from trainer.folder import RunFolder
from trainer.held_out import MODE_STAGES
from trainer.legality import Finding, run_findings
from trainer.statistics import Result, Text, Welch, obstacle, welch

FORMAT = 1
"""Of seeds.json (`trainer/seed_tables.py`)."""


@dataclass(frozen=True)
class ModeScore:
    """Score of one seed in one SLOT mode."""

    causal: bool
    """As the probe found."""
    nats: float
    bpb: float
    seconds: float


@dataclass(frozen=True)
class SeedResult:
    """What one finished run gave."""

    seed: int
    folder: str
    steps: int
    ms_per_step: float
    train_s: float
    post_ema_nats: float
    post_ema_bpb: float
    artifact_bytes: int
    code_bytes: int
    artifact_sha256: str
    scores: dict[SlotMode, ModeScore]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class SeedSet:
    """Runs that differ in their seed alone."""

    name: str
    text: Text
    hardware: str
    commits: tuple[str, ...]
    seeds: tuple[SeedResult, ...]
    format: int = FORMAT

    @property
    def modes(self) -> list[SlotMode]:
        """The SLOT modes every seed was scored in."""
        return [m for m in get_args(SlotMode) if all(m in s.scores for s in self.seeds)]

    def result(self, mode: SlotMode) -> Result:
        """Nats of the seeds in one mode. Raises RunError: the seeds disagree on causality."""
        scores = [s.scores[mode] for s in self.seeds]
        if len({score.causal for score in scores}) > 1:
            raise RunError(
                f"SLOT {mode} was probed causal in some seeds of {self.name} and not in others: "
                "look into the runs' stage `causality` before anything is concluded"
            )
        nats = tuple(score.nats for score in scores)
        return Result(self.name, mode, scores[0].causal, nats, self.text, self.hardware)


@dataclass(frozen=True)
class Comparison:
    """One mode of a set against one earlier result; `test` is None where there cannot be one."""

    mode: SlotMode
    earlier: Result
    test: Welch | None
    obstacle: str | None

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        row = {"mode": self.mode, "earlier": self.earlier.name, "earlier_mode": self.earlier.mode}
        if self.test is None:
            return {**row, "not_comparable": self.obstacle}
        return {**row, **dataclasses.asdict(self.test), "clears_bar": self.test.clears_bar}


# Reading runs.


def unfinished(folder: RunFolder, config: RunConfig) -> str | None:
    """The first stage without a result; None when the run is finished."""
    needed = ["data", "train", "post_ema", "artifact", "sliding"]
    needed += [MODE_STAGES[mode] for mode in config.eval.slot_modes] + ["causality"]
    return next((stage for stage in needed if not folder.finished(stage)), None)


def shared_settings(config: RunConfig) -> RunConfig:
    """The settings that runs of one set have in common: all but the seed and where things lie."""
    data = dataclasses.replace(config.data, dir=None)
    return dataclasses.replace(config, seed=0, name=None, out=Path(), data=data)


def collect(name: str, paths: list[Path]) -> SeedSet:
    """Read finished run folders.

    Raises:
        ConfigError: no folders.
        RunError: a run is missing or unfinished, or two differ in more than their seed.
    """
    if not paths:
        raise ConfigError("no run folders were given: name at least one with --runs")
    opened = [RunFolder.open(path) for path in paths]
    for folder, config in opened:
        missing = unfinished(folder, config)
        if missing is not None:
            raise RunError(
                f"{folder.path} has no result of stage {missing}. Finish it with "
                f"`python -m trainer --resume {folder.path}`"
            )
    stages = [_stages(folder) for folder, _ in opened]
    environments = [
        json.loads((folder.path / "environment.json").read_text()) for folder, _ in opened
    ]
    hardware = [
        f"{s['train']['world_size']} x {e['device']}"
        for s, e in zip(stages, environments, strict=True)
    ]
    _same("settings", [shared_settings(config) for _, config in opened], paths)
    _same("scored text", [s["causality"]["text_sha256"] for s in stages], paths)
    _same("training text", [s["data"]["unigram_nats"] for s in stages], paths)
    _same("hardware", hardware, paths)
    seeds = [config.seed for _, config in opened]
    if len(set(seeds)) < len(seeds):
        raise RunError(f"a seed occurs twice among {seeds}: it would count as two results")
    probed = stages[0]["causality"]
    return SeedSet(
        name=name,
        text=Text(stages[0]["data"]["name"], probed["text_tokens"], probed["text_sha256"]),
        hardware=hardware[0],
        commits=tuple(sorted({e["commit"] for e in environments})),
        seeds=tuple(
            _seed_result(seed, path, s) for seed, path, s in zip(seeds, paths, stages, strict=True)
        ),
    )


def _stages(folder: RunFolder) -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in (folder.path / "stages").glob("*.json")}


def _same(what: str, values: list[Any], paths: list[Path]) -> None:
    for value, path in zip(values, paths, strict=True):
        if value != values[0]:
            raise RunError(
                f"{paths[0]} and {path} differ in their {what}: their mean would mean nothing. "
                "Collect runs that differ in their seed alone."
            )


def _seed_result(seed: int, path: Path, stages: dict[str, dict[str, Any]]) -> SeedResult:
    train, artifact = stages["train"], stages["artifact"]
    probed = stages["causality"]["modes"]
    return SeedResult(
        seed=seed,
        folder=str(path),
        steps=train["steps"],
        ms_per_step=train["ms_per_step"],
        train_s=train["train_s"],
        post_ema_nats=stages["post_ema"]["nats"],
        post_ema_bpb=stages["post_ema"]["bpb"],
        artifact_bytes=artifact["artifact_bytes"],
        code_bytes=artifact["code_bytes"],
        artifact_sha256=artifact["sha256"],
        scores={
            mode: ModeScore(
                probed[mode]["causal"],
                stages[stage]["nats"],
                stages[stage]["bpb"],
                stages[stage]["seconds"],
            )
            for mode, stage in MODE_STAGES.items()
            if stage in stages
        },
        findings=tuple(run_findings(stages)),
    )


# Comparisons.


def comparisons(found: SeedSet, modes: list[SlotMode], earlier: list[Result]) -> list[Comparison]:
    """Every mode against every earlier result, in order; obstacles are told, never passed over."""
    return [_compared(found.result(mode), old) for mode in modes for old in earlier]


def _compared(new: Result, old: Result) -> Comparison:
    reason = obstacle(new, old)
    if reason is not None:
        return Comparison(new.mode, old, None, reason)
    try:
        return Comparison(new.mode, old, welch(new.nats, old.nats), None)
    except ConfigError as error:
        return Comparison(new.mode, old, None, str(error))
