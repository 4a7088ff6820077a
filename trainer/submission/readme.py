"""README.md of a submission: results, legality, how to run it again, what it was measured on."""

import shlex
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from kernels.build import HEADER_PACKAGE
from trainer import collect, legality, seed_tables
from trainer.config import SIZE_LIMIT_BYTES
from trainer.statistics import PUBLISHED
from trainer.submission.arguments import arguments_for
from trainer.submission.contents import Submission
from trainer.submission.runs import FinishedRun


def readme(submission: Submission) -> str:
    """The whole file."""
    sections = [
        f"# {submission.name}",
        _headline(submission),
        "## Results\n\n" + _results(submission),
        "## Against earlier results\n\n" + _comparisons(submission),
        *(_legality(submission, run) for run in submission.runs),
        "## Running it again\n\n" + _commands(submission),
        "## The script\n\n" + _script(submission),
        "## Measured on\n\n" + _environment(submission),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _headline(submission: Submission) -> str:
    bpb = [run.score(submission.mode)["bpb"] for run in submission.runs]
    total = max(submission.bytes_total(run) for run in submission.runs)
    lines = [
        f"**{_mean(bpb, 4)} bits per byte** (SLOT `{submission.mode}`, "
        f"{'causal' if submission.causal else 'NOT causal'} by probe, mean of {len(bpb)} seed(s)), "
        f"{total:,} of {SIZE_LIMIT_BYTES:,} bytes.",
        submission.blurb,
    ]
    if not submission.causal:
        lines.append(
            "**Not causal: predictions were fitted on targets they are scored on. This score is a "
            "reproduction, not a claim.**"
        )
    return "\n\n".join(lines)


def _results(submission: Submission) -> str:
    rows: list[tuple[str, int, Sequence[float]]] = [
        ("steps", 0, [run.stages["train"]["steps"] for run in submission.runs]),
        ("ms/step", 1, [run.stages["train"]["ms_per_step"] for run in submission.runs]),
        ("training, s", 1, [run.stages["train"]["train_s"] for run in submission.runs]),
        ("averaged weights, full windows, BPB", 4, _stage(submission, "post_ema", "bpb")),
        ("quantized, full windows, BPB", 4, _stage(submission, "round_trip", "bpb")),
    ]
    for mode in submission.runs[0].modes:
        scores = [run.score(mode) for run in submission.runs]
        causal = "" if all(run.causal(mode) for run in submission.runs) else ", not causal"
        label = f"sliding windows, SLOT `{mode}`{causal}"
        rows += [
            (f"{label}, BPB", 4, [score["bpb"] for score in scores]),
            (f"{label}, nats/token", 5, [score["nats"] for score in scores]),
            (f"{label}, s", 1, [score["seconds"] for score in scores]),
        ]
    rows += [
        ("artifact, bytes", 0, [run.artifact_bytes for run in submission.runs]),
        ("train_gpt.py, bytes", 0, [submission.bytes_code for _ in submission.runs]),
        ("total, bytes", 0, [submission.bytes_total(run) for run in submission.runs]),
    ]
    seeds = [f"seed {run.seed}" for run in submission.runs]
    lines = ["| " + " | ".join(["", *seeds, "mean"]) + " |", "| --- " * (len(seeds) + 2) + "|"]
    for label, digits, values in rows:
        cells = [f"{value:,.{digits}f}" for value in values]
        lines.append("| " + " | ".join([label, *cells, _mean(values, digits)]) + " |")
    return "\n".join(lines)


def _comparisons(submission: Submission) -> str:
    """The headline score against the published results that are scored in a like manner."""
    earlier = [result for result in PUBLISHED if result.causal == submission.causal]
    compared = collect.comparisons(submission.found, [submission.mode], earlier)
    return seed_tables.comparison_table(submission.found, compared)


def _stage(submission: Submission, stage: str, key: str) -> list[float]:
    return [run.stages[stage][key] for run in submission.runs]


def _mean(values: Sequence[float], digits: int) -> str:
    """Mean, with the standard deviation where values differ."""
    spread = f" +- {stdev(values):,.{digits}f}" if len(set(values)) > 1 else ""
    return f"{fmean(values):,.{digits}f}{spread}"


def _legality(submission: Submission, run: FinishedRun) -> str:
    """The run's findings, with the script as submitted for its code."""
    artifact = {**run.stages["artifact"], "code_bytes": submission.bytes_code}
    found = legality.run_findings({**run.stages, "artifact": artifact})
    return f"## Legality, seed {run.seed}\n\n{legality.markdown(found)}"


def _commands(submission: Submission) -> str:
    run = submission.runs[0]
    ranks = run.stages["train"]["world_size"]
    program = f"torchrun --standalone --nproc-per-node {ranks}" if ranks > 1 else "python"
    arguments = shlex.join(arguments_for(run.config))
    lines = ["```", "pip install -r requirements.txt"]
    if run.config.mlp == "cutlass":
        lines += [
            f"pip install --no-deps {HEADER_PACKAGE}    # C++ headers",
            "python train_gpt.py -m kernels.build --jobs 8    # once; needs nvcc",
        ]
    lines += [
        f"{program} train_gpt.py {arguments} --data.dir DATA --seed {r.seed}"
        for r in submission.runs
    ]
    lines += [
        "python train_gpt.py -m trainer.evaluate runs/NAME/artifact.fwy --data DATA"
        "    # the artifact alone",
        "```",
        "",
    ]
    if run.config.data.dir is None:
        lines.append(
            "DATA is the folder of the embedded corpus, which the script leaves out: Fairway's "
            "repository builds it by `python -m trainer smoke`, in `.cache/embedded-*`."
        )
    else:
        lines.append(
            "DATA is a folder with the contest's `fineweb_train_*.bin`, `fineweb_val_*.bin` and "
            "tokenizer (`*.model`)."
        )
    lines.append(
        "The script writes no report; `python -m trainer --resume RUN` of the repository does, "
        "from the same results."
    )
    return "\n".join(lines)


def _script(submission: Submission) -> str:
    same = (
        "Every run counted exactly this many bytes of code."
        if submission.same_code
        else "**The runs counted code of another size than this script's: it was packed from other "
        "sources than theirs.**"
    )
    return (
        f"`train_gpt.py` ({submission.bytes_code:,} bytes) holds the minified sources of the "
        "packages `trainer` and `kernels`, as far as a run needs them, compressed, and "
        f"unpacks them into a hidden folder beside itself when it starts. {same} It was made by "
        "`python -m trainer.submission`; the same sources give the same bytes."
    )


def _environment(submission: Submission) -> str:
    runs = submission.runs
    first: dict[str, Any] = runs[0].environment
    packages = ", ".join(f"{name} {version}" for name, version in first["packages"].items())
    commits = ", ".join(f"`{commit}`" for commit in submission.found.commits)
    data = runs[0].stages["data"]
    driver = f"driver {first['driver']}, CUDA {first['cuda']}, " if first["driver"] else ""
    return (
        f"{submission.found.hardware}; {first['cpu']}, {first['cores']} cores; {driver}"
        f"Python {first['python']}; {packages}. Code: {commits}. Text: "
        f"{data['name']}, {data['train_tokens']:,} training tokens, {data['val_tokens']:,} held "
        "out. All settings and machine facts are in the logs."
    )
