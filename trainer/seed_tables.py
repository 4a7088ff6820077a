"""The result of several seeds on disk and for people: seeds.json, seeds.md and their tables.

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
from pathlib import Path
from typing import Any

import dacite

from trainer import files
from trainer.collect import FORMAT, Comparison, SeedSet
from trainer.config import SlotMode
from trainer.errors import ConfigError
from trainer.legality import legal, markdown
from trainer.statistics import ALPHA, MARGIN_NATS

MODE_TITLES: dict[SlotMode, str] = {
    "off": "sliding",
    "context": "SLOT `context`",
    "shared": "SLOT `shared`",
}


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
