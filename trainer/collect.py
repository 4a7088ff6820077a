"""Finished runs of several seeds as one result: a table, JSON, and comparisons with earlier ones.

`seeds.json`, for whatever comes after (a submission, a later comparison):

    format       1
    name         of the set
    text         name, tokens and sha256 of what was scored
    hardware     such as "8 x NVIDIA H100 80GB HBM3"
    commits      of the code, one or more
    seeds        a list; each: seed, folder (of the run), steps, ms_per_step, train_s,
                 post_ema_nats, post_ema_bpb, artifact_bytes, code_bytes, artifact_sha256,
                 scores by SLOT mode (causal as probed, nats, bpb, seconds), and findings
                 (rule, found, verdict: kept, broken or unknown; mode)
    mean         of the figures above, scores by SLOT mode
    comparisons  mode, earlier result and its mode, then either why not comparable, or
                 difference_nats, t, df, p (one-sided) and clears_bar
"""

import dataclasses
import json
import statistics as sample
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import dacite

from trainer import files
from trainer.config import RunConfig, SlotMode
from trainer.errors import ConfigError, RunError
from trainer.folder import RunFolder
from trainer.legality import MODE_STAGES, Finding, legal, markdown, run_findings
from trainer.statistics import ALPHA, MARGIN_NATS, Result, Text, Welch, obstacle, welch

FORMAT = 1
MODE_TITLES: dict[SlotMode, str] = {
    "off": "sliding",
    "context": "SLOT `context`",
    "shared": "SLOT `shared`",
}


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


# Writing, and reading back.


def write(found: SeedSet, compared: list[Comparison], folder: Path) -> str:
    """Write seeds.json and seeds.md into `folder`; returns the latter. Raises RunError."""
    record = {
        **dataclasses.asdict(found),
        "mean": _means(found),
        "comparisons": [comparison.summary() for comparison in compared],
    }
    files.write_json(folder / "seeds.json", record)
    text = _markdown(found, compared)
    files.write_text(folder / "seeds.md", text)
    return text


def read(path: Path) -> SeedSet:
    """The set in a seeds.json. Raises ConfigError: not such a file."""
    try:
        values = json.loads(path.read_text())
        found = dacite.from_dict(SeedSet, values, dacite.Config(cast=[tuple]))
    except (OSError, ValueError, dacite.DaciteError) as error:
        raise ConfigError(f"{path} cannot be read as a seeds.json: {error}") from error
    if found.format != FORMAT:
        raise ConfigError(f"{path} has format {found.format}; this code reads {FORMAT}")
    return found


FIGURES = (
    "steps",
    "ms_per_step",
    "train_s",
    "post_ema_nats",
    "post_ema_bpb",
    "artifact_bytes",
    "code_bytes",
)


def _means(found: SeedSet) -> dict[str, Any]:
    def mean(values: list[float]) -> float:
        return sample.fmean(values)

    return {
        **{name: mean([getattr(s, name) for s in found.seeds]) for name in FIGURES},
        "scores": {
            mode: {
                unit: mean([getattr(s.scores[mode], unit) for s in found.seeds])
                for unit in ("nats", "bpb", "seconds")
            }
            for mode in found.modes
        },
    }


def _markdown(found: SeedSet, compared: list[Comparison]) -> str:
    sections = [
        f"# {found.name}",
        f"{len(found.seeds)} seeds on {found.hardware}, commit {', '.join(found.commits)}. "
        f"Scored text: {found.text.name}, {found.text.tokens:,} tokens.",
        _table(found),
        "## Against earlier results\n\n" + comparison_table(found, compared),
        "## Legality",
        *(f"### Seed {s.seed}\n\n{markdown(list(s.findings))}" for s in found.seeds),
    ]
    return "\n\n".join(sections) + "\n"


def _table(found: SeedSet) -> str:
    columns: list[tuple[str, str, Sequence[float]]] = [
        ("steps", ",.0f", [s.steps for s in found.seeds]),
        ("ms/step", ",.1f", [s.ms_per_step for s in found.seeds]),
        ("post-EMA BPB", ".4f", [s.post_ema_bpb for s in found.seeds]),
    ]
    for mode in found.modes:
        title = MODE_TITLES[mode] + ("" if found.result(mode).causal else " (**not causal**)")
        scores = [s.scores[mode] for s in found.seeds]
        columns.append((f"{title} BPB", ".4f", [score.bpb for score in scores]))
        columns.append((f"{title} nats", ".5f", [score.nats for score in scores]))
    columns += [
        ("artifact bytes", ",.0f", [s.artifact_bytes for s in found.seeds]),
        ("with code", ",.0f", [s.artifact_bytes + s.code_bytes for s in found.seeds]),
    ]
    rows = [
        [str(s.seed), *(f"{values[i]:{form}}" for _, form, values in columns)]
        for i, s in enumerate(found.seeds)
    ]
    rows.append(["**mean**", *(f"**{sample.fmean(v):{form}}**" for _, form, v in columns)])
    if len(found.seeds) > 1:
        rows.append(["std dev", *(f"{sample.stdev(v):{form}}" for _, form, v in columns)])
    head = ["seed", *(title for title, _, _ in columns)]
    return "\n".join(_row(cells) for cells in (head, ["---"] * len(head), *rows))


def comparison_table(found: SeedSet, compared: list[Comparison]) -> str:
    """Each comparison with its test and verdict, or why there is none, as Markdown."""
    head = ["this", "earlier", "nats", "earlier nats", "difference", "t", "df", "p, one-sided",
            f"{MARGIN_NATS} nats better at p < {ALPHA}"]  # fmt: skip
    rows = [_comparison_row(found, c) for c in compared]
    if not rows:
        return "None that may be compared: a causal score is never set against one that is not."
    table = "\n".join(_row(cells) for cells in (head, ["---"] * len(head), *rows))
    reasons = dict.fromkeys(f"- {c.obstacle}" for c in compared if c.test is None)
    return "\n\n".join([table, "\n".join(reasons)]) if reasons else table


def _comparison_row(found: SeedSet, c: Comparison) -> list[str]:
    mine = found.result(c.mode)
    names = [
        MODE_TITLES[c.mode],
        f"{c.earlier.name} ({MODE_TITLES[c.earlier.mode]}, {c.earlier.hardware})",
    ]
    means = [f"{mine.mean_nats:.5f}", f"{c.earlier.mean_nats:.5f}"]
    if c.test is None:
        return [*names, *means, "", "", "", "", "not comparable"]
    verdict = "cleared" if c.test.clears_bar else "not cleared"
    if c.test.clears_bar and not all(legal(list(s.findings), c.mode) for s in found.seeds):
        verdict = "cleared by the figures, **not a legal record**: see below"
    t = c.test
    return [*names, *means, f"{t.difference_nats:+.5f}", f"{t.t:.2f}", f"{t.df:.2f}",
            f"{t.p:.2g}", verdict]  # fmt: skip


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
