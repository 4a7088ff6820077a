"""report.md and its plots: what people read of a run."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from trainer import files, legality
from trainer.allocate import WIDTHS
from trainer.config import MICRO_BATCHES, RECORD_STEPS, RunConfig
from trainer.folder import RunFolder
from trainer.held_out import CLOSED_STAGES
from trainer.record import RECORD

PUBLISHED = {
    "steps": "6,819",
    "ms_per_step": "87.7",
    "post_ema": "1.1260",
    "sliding": "1.1125",
    "shared": "1.1088",
    "artifact": "14,522,866",
}
"""Means of the three published seeds, 8xH100, FineWeb; SLOT is the `shared` form."""

PUBLISHED_SECONDS = {
    "train": "600 (8 GPUs)",
    "calibrate": "197",
    "sliding": "94 to 105 (8 GPUs)",
    "slot_shared": "148 (8 GPUs)",
}
"""By stage; SLOT's includes the plain evaluation it is added to."""

SCORE_ROWS = (
    ("post_ema", "averaged weights, full windows"),
    ("round_trip", "after quantization, full windows"),
    ("sliding", "after quantization, sliding windows"),
    ("slot_context", "sliding windows, SLOT `context`"),
    ("slot_shared", "sliding windows, SLOT `shared`"),
)


def write_report(folder: RunFolder, config: RunConfig) -> None:
    """Write report.md and plots/*.png of a finished run from its stage results and metrics."""
    stages = _stage_results(folder.path)
    metrics = [row for row in folder.read_metrics() if "train_nats" in row]
    _save(_loss_plot(metrics, stages), folder.plots / "loss.png")
    _save(_learning_rate_plot(metrics), folder.plots / "learning_rate.png")
    _save(_bits_plot(stages["quantize"]["matrices"]), folder.plots / "bits.png")
    environment = json.loads((folder.path / "environment.json").read_text())
    files.write_text(folder.report, _markdown(folder, config, stages, environment))


def _stage_results(path: Path) -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in sorted((path / "stages").glob("*.json"))}


def _markdown(
    folder: RunFolder,
    config: RunConfig,
    stages: dict[str, dict[str, Any]],
    environment: dict[str, Any],
) -> str:
    train, data, artifact = stages["train"], stages["data"], stages["artifact"]
    legal = legality.markdown(legality.run_findings(stages))
    sections = [
        f"# {folder.path.name}",
        _origin(environment, data, train) + _shortfall(train, config),
        "## Scores\n\n" + _score_table(stages),
        f"## Legality\n\n{legal}\n\n{_legality_notes(stages)}",
        "## Size\n\n" + _size_table(artifact),
        "## Training\n\n" + _training_table(train, config),
        "## Settings counted in steps\n\n" + _scaled_table(train, config),
        "## Time\n\n" + _time_table(stages),
        "## Pictures\n\n"
        "![Training loss](plots/loss.png)\n\n"
        "![Learning rate](plots/learning_rate.png)\n\n"
        "![Bits per matrix](plots/bits.png)",
        "## Settings\n\nEvery setting is in `config.json`, the machine in `environment.json`.",
    ]
    return "\n\n".join(sections) + "\n"


def _origin(environment: dict[str, Any], data: dict[str, Any], train: dict[str, Any]) -> str:
    packages = environment["packages"]
    return (
        f"Measured on {train['world_size']} x {environment['device']} "
        f"({environment['cpu']}, {environment['cores']} cores), "
        f"torch {packages['torch']}, triton {packages['triton']}, "
        f"Python {environment['python']}, commit `{environment['commit']}`. "
        f"Text: {data['name']}, {data['train_tokens']:,} training tokens, "
        f"{data['val_tokens']:,} held out. "
        "The published column is the record's mean on 8 x H100 and FineWeb: figures on other "
        "text or other hardware are not comparable with it."
    )


def _shortfall(train: dict[str, Any], config: RunConfig) -> str:
    """Why fewer GPUs than the record's must score worse; empty with as many."""
    if config.device == "cuda" and train["world_size"] >= MICRO_BATCHES:
        return ""
    tokens = train["steps"] * config.train.sequences_per_step * config.model.seq_len
    record = RECORD_STEPS * RECORD.train.sequences_per_step * RECORD.model.seq_len
    had = train["world_size"] if config.device == "cuda" else "none"
    return (
        f"\n\n**This run had {had} of the record's {MICRO_BATCHES} GPUs and did a fraction of the "
        f"record's work: {tokens:,} training tokens, {100 * tokens / record:.2g} % of the "
        f"record's {record:,}. Its scores say nothing about what the same code reaches on 8 "
        "GPUs.**"
    )


def _legality_notes(stages: dict[str, dict[str, Any]]) -> str:
    between = sum(stages[name]["seconds"] for name in CLOSED_STAGES[1:])
    return (
        "The contest's limits are for 8 x H100. Making the artifact after training (calibration "
        f"to compression) took {between:.1f} s, which the published record counts in neither "
        "limit. The probe runs the plain programs of the quantized model, in batches of "
        f"{legality.PROBE_WINDOWS} windows at most."
    )


def _score_table(stages: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| score | causal (probed) | nats/token | bits per byte | tokens | published BPB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    published = {"post_ema": "post_ema", "sliding": "sliding", "slot_shared": "shared"}
    probed = stages["causality"]["modes"]
    for name, meaning in SCORE_ROWS:
        if name not in stages:
            continue
        score = stages[name]
        known = PUBLISHED[published[name]] if name in published else ""
        lines.append(
            f"| {meaning} | {'yes' if probed[score['mode']]['causal'] else '**no**'} "
            f"| {score['nats']:.5f} "
            f"| {score['bpb']:.4f} | {score['tokens']:,} | {known} |"
        )
    loss = stages["round_trip"]["nats"] - stages["post_ema"]["nats"]
    entropy = stages["data"]["unigram_nats"]
    lines += [
        "",
        f"Quantization costs {loss:+.4f} nats (round trip minus averaged weights). "
        f"The unigram entropy of the training text is {entropy:.4f} nats.",
        "SLOT `shared` fits its offset on the very targets it scores: it is not causal, and is "
        "reported for reproduction alone.",
    ]
    return "\n".join(lines)


def _size_table(artifact: dict[str, Any]) -> str:
    total = artifact["artifact_bytes"] + artifact["code_bytes"]
    fits = "fits" if total <= artifact["limit_bytes"] else "**over**"
    return "\n".join(
        [
            "| part | bytes | published |",
            "| --- | --- | --- |",
            f"| artifact ({artifact['compressor']}) | {artifact['artifact_bytes']:,} "
            f"| {PUBLISHED['artifact']} |",
            f"| the same tensors with {artifact['baseline_compressor']}, unpruned "
            f"| {artifact['baseline_bytes']:,} | |",
            f"| code | {artifact['code_bytes']:,} | |",
            f"| total, limit {artifact['limit_bytes']:,} ({fits}) | {total:,} | |",
            "",
            f"Artifact SHA-256 `{artifact['sha256']}`; {artifact['pruned']:,} codes pruned to fit.",
        ]
    )


def _training_table(train: dict[str, Any], config: RunConfig) -> str:
    memory = train["peak_memory_bytes"]
    rows = [
        ("parameters", f"{train['parameters']:,}", "29,951,068"),
        ("steps", f"{train['steps']:,}", PUBLISHED["steps"]),
        ("ms/step", f"{train['ms_per_step']:.1f}", PUBLISHED["ms_per_step"]),
        ("tokens per step", f"{config.train.sequences_per_step * config.model.seq_len:,}", ""),
        ("last training loss, nats", f"{train['final_train_nats']:.4f}", ""),
        ("waiting for data", f"{100 * train['data_stall_share']:.2f} % of the time", ""),
        ("peak GPU memory", f"{memory / 1e9:.2f} GB" if memory else "no GPU", ""),
        ("weights used", config.train.average, "ema"),
        ("late QAT", config.train.late_qat, "linears"),
    ]
    head = ["| | this run | published |", "| --- | --- | --- |"]
    return "\n".join(head + [f"| {a} | {b} | {c} |" for a, b, c in rows])


def _scaled_table(train: dict[str, Any], config: RunConfig) -> str:
    """Each such setting: the record's own number, the one set, and what it came to here."""
    scale = train["step_scale"]
    rows = [
        ("warmdown", RECORD.train.warmdown_steps, config.train.warmdown_steps),
        (
            "Muon momentum warm-up",
            RECORD.optim.muon_momentum_steps,
            config.optim.muon_momentum_steps,
        ),
        ("widening of the shard mix", RECORD.data.mix_steps, config.data.mix_steps),
    ]
    lines = [
        f"Counts refer to the record's {RECORD_STEPS:,} steps. {train['expected_steps']:,} were "
        f"expected here, so each is multiplied by {scale:.4f}.",
        "",
        "| steps of | the record | setting | in this run |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {name} | {own:,} | {put:,} | {put * scale:,.1f} |" for name, own, put in rows]
    every = max(1, round(config.train.swa_every * scale))
    own, put = RECORD.train.swa_every, config.train.swa_every
    lines.append(f"| SWA: between snapshots | {own} | {put} | {every} |")
    own, put = (_time_constant(c.train.ema_decay) for c in (RECORD, config))
    lines.append(f"| EMA: time constant | {own:,.0f} | {put:,.0f} | {put * scale:,.1f} |")
    return "\n".join(lines)


def _time_constant(decay: float) -> float:
    """Steps over which an exponential average forgets all but 1/e."""
    if decay <= 0:
        return 0.0
    return -1 / math.log(decay) if decay < 1 else math.inf


def _time_table(stages: dict[str, dict[str, Any]]) -> str:
    listed = [name for name in STAGE_ORDER if name in stages]
    listed += [name for name in stages if name not in STAGE_ORDER]
    lines = ["| stage | seconds | published |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {stages[name]['seconds']:.1f} | {PUBLISHED_SECONDS.get(name, '')} |"
        for name in listed
    ]
    lines.append(f"| all | {sum(result['seconds'] for result in stages.values()):.1f} | |")
    return "\n".join(lines)


STAGE_ORDER = (
    "data",
    "train",
    "post_ema",
    "calibrate",
    "hessians",
    "quantize",
    "artifact",
    "round_trip",
    "sliding",
    "slot_context",
    "slot_shared",
    "causality",
)


def _loss_plot(metrics: list[dict[str, Any]], stages: dict[str, dict[str, Any]]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4.5))
    steps = [row["step"] for row in metrics]
    axes.plot(steps, [row["train_nats"] for row in metrics], label="training batch")
    entropy = stages["data"]["unigram_nats"]
    axes.axhline(entropy, color="grey", linestyle=":", label="unigram entropy of the text")
    axes.axhline(
        stages["post_ema"]["nats"], color="C1", linestyle="--", label="held out, averaged weights"
    )
    quantized_from = next((row["step"] for row in metrics if row["late_qat"]), None)
    if quantized_from is not None:
        axes.axvline(quantized_from, color="C2", linewidth=1, label="late QAT starts")
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Training loss")
    axes.legend()
    return figure


def _learning_rate_plot(metrics: list[dict[str, Any]]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 3.5))
    axes.plot([row["step"] for row in metrics], [row["lr_scale"] for row in metrics])
    axes.set(xlabel="step", ylabel="scale", title="Learning rate scale", ylim=(0, 1.05))
    return figure


def _bits_plot(matrices: list[dict[str, Any]]) -> Figure:
    """Sensitivity of every matrix, coloured by its bits."""
    ranked = sorted(matrices, key=lambda m: -m["sensitivity"])
    figure, axes = plt.subplots(figsize=(max(8.0, 0.17 * len(ranked)), 4.5))
    for bits in sorted({m["bits"] for m in ranked}):
        at = [i for i, m in enumerate(ranked) if m["bits"] == bits]
        heights = [ranked[i]["sensitivity"] for i in at]
        axes.bar(at, heights, color=f"C{WIDTHS.index(bits)}", label=f"int{bits:g}")
    names = [m["name"].removeprefix("blocks.") for m in ranked]
    axes.set_xticks(range(len(ranked)), names, rotation=90, fontsize=6)
    axes.set(ylabel="trace of the Hessian", title="Bits per matrix, most sensitive first")
    axes.set_yscale("log")
    axes.legend()
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    with files.atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    plt.close(figure)
