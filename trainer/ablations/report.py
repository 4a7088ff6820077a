"""ablations.md and ablations.png: every row against the base, and every claim."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer import files
from trainer.ablations.claims import (
    CLAIMS,
    NOISE_DEVIATIONS,
    Claim,
    Results,
    noise_bpb,
    verdict,
)
from trainer.ablations.execute import Result
from trainer.ablations.rows import BASE, Row
from trainer.config import SIZE_LIMIT_BYTES

MEANING = {
    "post_ema": "averaged weights, full windows",
    "round_trip": "quantized, full windows",
    "sliding": "quantized, sliding windows",
    "slot_context": "quantized, sliding windows, SLOT `context`",
    "slot_shared": "quantized, sliding windows, SLOT `shared`",
}
BETTER, WORSE, NOISE = "C0", "C3", "lightgrey"
SIZED_GROUPS = ("MLP width", "Bits", "Compressor", "Optimizer")
"""Groups whose rows are about size as well."""


@dataclass(frozen=True)
class Ablations:
    """What the report is made of."""

    command: str
    rows: Sequence[Row]
    results: Results
    seeds: Sequence[Result]
    """Base runs of every seed that is finished."""
    failed: Mapping[str, str]
    """Why runs that are not among the results failed."""


def write_report(out: Path, ablations: Ablations) -> None:
    """Write ablations.md, and ablations.png once the base is there. Raises RunError."""
    if BASE in ablations.results:
        figure = picture(ablations)
        with files.atomic_path(out / "ablations.png") as partial:
            figure.savefig(partial, format="png", dpi=130)
        plt.close(figure)
    files.write_text(out / "ablations.md", markdown(ablations))


def markdown(ablations: Ablations) -> str:
    """The report's text; rows that are not done yet say so."""
    sections = [
        "# Ablations",
        _origin(ablations),
        "## Rows\n\n" + _table(ablations),
        "## Published claims\n\n" + _claims(ablations),
        "## Noise\n\n" + _noise(ablations),
        "## Commands\n\n" + _commands(ablations),
    ]
    if BASE in ablations.results:
        sections.insert(3, "![Every row against the base](ablations.png)")
    return "\n\n".join(sections) + "\n"


def _origin(ablations: Ablations) -> str:
    base = ablations.results.get(BASE)
    if base is None:
        return "The base run is not done yet."
    machine, train, data = base["environment"], base["stages"]["train"], base["stages"]["data"]
    return (
        f"One change at a time against one base run: {train['steps']:,} steps, seed "
        f"{base['seed']}, on {train['world_size']} x {machine['device']}, torch "
        f"{machine['packages']['torch']}, commit `{machine['commit']}`. Text: {data['name']}, "
        f"{base['stages']['post_ema']['tokens']:,} held-out tokens scored. The published figures "
        "are from 6,819 steps on 8 x H100 and FineWeb.\n\n"
        "Every training row has the same data, seed and number of steps. Rows about bits, SLOT, "
        "compressor and average share the base's training: the same weights, no training noise. "
        "Nothing is pruned but where a budget is filled, so that sizes compare."
    )


def _table(ablations: Ablations) -> str:
    lines = [
        "| | row | compared | BPB | base BPB | BPB minus base | nats minus base "
        "| artifact bytes | minus base |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = ablations.results.get(BASE)
    for row in ablations.rows:
        result = ablations.results.get(row.run)
        head = f"| {row.group} | {row.label} "
        if result is None or base is None:
            state = ablations.failed.get(row.run, "not done yet")
            lines.append(f"{head}| {state} | | | | | | |")
            continue
        size, base_size = _bytes(result, row), _bytes(base)
        if row.baseline_bytes:
            scores = "| the same weights | | | | "
        else:
            here, there = result["stages"][row.metric], base["stages"][row.base_metric]
            scores = (
                f"| {MEANING[row.metric]} | {here['bpb']:.4f} | {there['bpb']:.4f} "
                f"| {here['bpb'] - there['bpb']:+.4f} | {here['nats'] - there['nats']:+.5f} "
            )
        lines.append(f"{head}{scores}| {size:,} | {_signed(size - base_size)} |")
    return "\n".join(lines)


def _bytes(result: Result, row: Row | None = None) -> int:
    stage = result["stages"]["artifact"]
    return stage["baseline_bytes" if row is not None and row.baseline_bytes else "artifact_bytes"]


def _signed(difference: int) -> str:
    return f"{difference:+,}" if difference else "0"


def _claims(ablations: Ablations) -> str:
    lines = ["| published | here | verdict |", "| --- | --- | --- |"]
    for claim in CLAIMS:
        noise = noise_bpb(ablations.seeds, "post_ema")
        judged = verdict(claim, ablations.results, noise)
        here = "" if judged == "not measured" else _amount(claim, ablations.results)
        unknown = claim.trains and noise is None and judged != "not measured"
        note = " (noise unknown: `--seeds 2`)" if unknown else ""
        lines.append(f"| {claim.text} | {here} | {judged}{note} |")
    lines += [
        "",
        "Held: an effect has the published sign and at least half the published size; a limit is "
        f"kept or passed as published ({SIZE_LIMIT_BYTES:,} bytes with the code). Within noise: a "
        "difference of two trainings that is no larger than the noise below.",
    ]
    return "\n".join(lines)


def _amount(claim: Claim, results: Results) -> str:
    value = claim.measure(results)
    if claim.unit == "bytes":
        return f"{value:,.0f} bytes"
    return f"{value:.1f} %" if claim.unit == "%" else f"{value:+.4f} BPB"


def _noise(ablations: Ablations) -> str:
    noise = noise_bpb(ablations.seeds, "post_ema")
    if noise is None:
        return "Unknown: the base ran with one seed. `--seeds 2` or more trains it again."
    lines = ["| seed | averaged weights, BPB | quantized, BPB |", "| --- | --- | --- |"]
    lines += [
        f"| {s['seed']} | {s['stages']['post_ema']['bpb']:.4f} "
        f"| {s['stages']['round_trip']['bpb']:.4f} |"
        for s in ablations.seeds
    ]
    lines += [
        "",
        f"Noise of a difference of two trainings: {noise:.4f} BPB, {NOISE_DEVIATIONS:.2f} standard "
        f"deviations of the {len(ablations.seeds)} seeds. From so few seeds it is a rough figure.",
    ]
    return "\n".join(lines)


def _commands(ablations: Ablations) -> str:
    done = [*ablations.results.values()]
    lines = [f"All rows: `{ablations.command}`", "", "Each run alone, sharing nothing:", ""]
    for result in done:
        shared = f" (here it took over `{result['source']}`)" if result["source"] else ""
        lines.append(f"- {result['name']}{shared}: `{result['command']}`")
    return "\n".join(lines)


# The picture.


def picture(ablations: Ablations) -> Figure:
    """Left: BPB against the base, with the noise. Right: artifact bytes, with the limit."""
    results = ablations.results
    done = [row for row in ablations.rows if row.run in results]
    scored = [row for row in done if not row.baseline_bytes]
    sized = [row for row in done if row.group in SIZED_GROUPS]
    height = 1.6 + 0.32 * max(len(scored), len(sized) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, height))
    _score_bars(left, ablations, scored)
    _size_bars(right, ablations, sized)
    figure.tight_layout()
    return figure


def _name(row: Row) -> str:
    return f"{row.group}: {row.label}"


def _score_bars(axes: Axes, ablations: Ablations, rows: Sequence[Row]) -> None:
    base = ablations.results[BASE]["stages"]
    deltas = [
        ablations.results[row.run]["stages"][row.metric]["bpb"] - base[row.base_metric]["bpb"]
        for row in rows
    ]
    legend = "bits per byte minus the base's: left is better"
    noise = noise_bpb(ablations.seeds, "post_ema")
    if noise is not None:
        trained = [i for i, row in enumerate(rows) if row.trains]
        axes.barh(trained, [2 * noise] * len(trained), 1, -noise, color=NOISE)
        legend += "; grey: noise of two trainings"
    colours = [BETTER if delta <= 0 else WORSE for delta in deltas]
    bars = axes.barh(range(len(rows)), deltas, color=colours)
    axes.bar_label(bars, [f"{delta:+.4f}" for delta in deltas], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.2)
    axes.set(xlabel=legend, title="Scores")


def _size_bars(axes: Axes, ablations: Ablations, rows: Sequence[Row]) -> None:
    base = ablations.results[BASE]
    names = ["base", *(_name(row) for row in rows)]
    sizes = [_bytes(base), *(_bytes(ablations.results[row.run], row) for row in rows)]
    bars = axes.barh(range(len(sizes)), [size / 1e6 for size in sizes], color="C0")
    bars[0].set_color("C7")
    texts = [f"{size / 1e6:.4g}" for size in sizes]
    axes.bar_label(bars, texts, label_type="center", color="white", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    legend = "MB"
    limit = SIZE_LIMIT_BYTES - base["stages"]["artifact"]["code_bytes"]
    if max(sizes) > limit / 3:  # a tiny model's bars would vanish beside it
        axes.axvline(limit / 1e6, color=WORSE)
        legend += f"; red: {SIZE_LIMIT_BYTES:,} bytes less the code"
    axes.set(xlabel=legend, title="Artifacts")
