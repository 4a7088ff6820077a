"""Where the milliseconds go.

    python -m profiles step                    one training step: table, pictures, summary
    python -m profiles kernel mlp_dpre         one kernel beside its roofline
    python -m profiles compare BEFORE AFTER    two profiles as stacked bars
    python -m profiles trend micro_step        a bench subject over stored runs
    python -m profiles model RUN               inside a trained model: ranks, heads, bits

A CUDA machine runs the record's shapes, a CPU the smoke preset's. Nsight Compute is used where it
can be, else the PyTorch profiler; the output says which.
"""

import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bench.gate import machine_class
from bench.scale import Scale, current
from bench.stopwatch import time_interleaved
from profiles import ceilings, kernels, nsight, pictures, table, torch_trace, workload
from profiles.components import Sizes, component
from profiles.model import analysis
from profiles.profile import Component, Profile, build, load, save
from trainer import environment, files
from trainer.config import AttentionBackend, MlpBackend, PassesBackend
from trainer.errors import ConfigError, DataError, FairwayError, RunError
from trainer.progress import log
from trainer.run import check_implementations

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 3
TRACED_STEPS = 3
NsightChoice = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Step:
    """Profile one training step."""

    mode: Literal["auto", "compiled", "eager"] = "auto"
    """torch.compile or plain PyTorch; auto: the preset's way (compiled on a GPU)."""
    mlp: MlpBackend | None = None
    """MLP backend; none: the preset's."""
    passes: PassesBackend | None = None
    """What lies between the products, by name; none: the preset's way."""
    attention: AttentionBackend | None = None
    """Attention, by name; none: the preset's."""
    nsight: NsightChoice = "auto"
    """Nsight Compute's counters: where possible, insisted upon, or not at all."""
    out: Path | None = None
    """Folder for the results; none: runs/profiles/<date>-<device>-<mode>."""


@dataclass(frozen=True)
class OneKernel:
    """Time one kernel and read its counters."""

    name: tyro.conf.Positional[Literal["mlp_forward", "mlp_dpre", "attention", "gemm"]]
    """Which one."""
    mlp: MlpBackend | None = None
    """MLP backend; none: the preset's."""
    nsight: NsightChoice = "auto"
    """Nsight Compute's counters: where possible, insisted upon, or not at all."""
    out: Path | None = None
    """JSON file for the figures."""


@dataclass(frozen=True)
class Compare:
    """Draw two profiles side by side."""

    before: tyro.conf.Positional[Path]
    """Folder or JSON file of the first."""
    after: tyro.conf.Positional[Path]
    """Folder or JSON file of the second."""
    out: Path = ROOT / "runs" / "profiles" / "compare.png"
    """The picture."""


@dataclass(frozen=True)
class Trend:
    """Draw a bench subject over the runs in runs/bench."""

    subject: tyro.conf.Positional[str]
    """Name of the subject, as the gate prints it."""
    runs: Path = ROOT / "runs" / "bench"
    """Folder of stored runs."""
    out: Path = ROOT / "runs" / "profiles" / "trend.png"
    """The picture."""


Command = (
    Annotated[Step, tyro.conf.subcommand("step")]
    | Annotated[OneKernel, tyro.conf.subcommand("kernel")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Trend, tyro.conf.subcommand("trend")]
    | Annotated[analysis.Options, tyro.conf.subcommand("model")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    command: Any = tyro.cli(Command, args=arguments, description=__doc__, prog="python -m profiles")  # pyright: ignore
    actions: dict[type, Callable[[Any], None]] = {
        Step: step,
        OneKernel: one_kernel,
        Compare: compare,
        Trend: trend,
        analysis.Options: analysis.main,
    }
    try:
        actions[type(command)](command)
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def step(command: Step) -> None:
    """Profile, print the summary, write JSON, Markdown and pictures."""
    scale = current(command.passes, command.attention)
    backend = _backend(scale, command.mlp)
    compiled = scale.config.compile if command.mode == "auto" else command.mode == "compiled"
    with_nsight = _nsight_wanted(scale, command.nsight)
    mode = "compiled" if compiled else "eager"
    described = environment.describe()
    log(f"profiling a training step: {mode}, MLP {backend}")
    profile, launches = profile_step(scale, backend, compiled, described)
    if with_nsight:
        config = scale.config
        request = {"kind": "step", "mlp": backend, "passes": config.passes,
                   "attention": config.attention, "compiled": compiled}  # fmt: skip
        profile = _with_counters(profile, request, launches, command.nsight)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    default = ROOT / "runs" / "profiles" / f"{today}-{machine_class(described)}-{mode}"
    folder = command.out or default
    save(folder / "profile.json", profile)
    text = table.markdown(profile)
    files.write_text(folder / "summary.md", text)
    pictures.stacked_bars(folder / "step.png", {mode: profile})
    pictures.roofline(folder / "roofline.png", profile)
    log(f"{text}\nwritten to {folder}")


def _with_counters(
    profile: Profile, request: dict[str, Any], launches: list[tuple[str, str]], choice: NsightChoice
) -> Profile:
    """The profile with Nsight's figures; with `auto`, a failure is told in its source instead."""
    log("collecting Nsight Compute's counters")
    try:
        rows = nsight.collect(request, nsight.STEP_METRICS)
    except RunError as error:
        if choice == "on":
            raise
        log(f"Nsight Compute failed: {error}")
        return replace(profile, source=f"{profile.source}; Nsight Compute failed, no counters")
    return replace(
        profile,
        source=f"{profile.source}; counters: {nsight.describe()}",
        counters=nsight.by_component(rows, launches),
    )


def profile_step(
    scale: Scale, backend: MlpBackend, compiled: bool, described: dict[str, Any]
) -> tuple[Profile, list[tuple[str, str]]]:
    """The step by the PyTorch profiler; and (kernel, component) of one step's launches in order."""
    device = scale.device.type
    work = workload.training_step(scale, backend, compiled)
    try:
        times = time_interleaved(
            {"step": lambda i: work.step()}, rounds=5, warm_up_rounds=WARM_UP_STEPS, device=device
        )
        torch_trace.trace(work.step, 1, scale.cuda)  # the first trace pays for its own set-up
        traced = torch_trace.trace(work.step, TRACED_STEPS, scale.cuda)
    finally:
        work.close()
    model = scale.config.model
    sizes = Sizes(model, scale.windows * model.seq_len)
    profile = build(
        source=f"PyTorch profiler ({'GPU kernels' if scale.cuda else 'CPU operations'})",
        title=f"One training step, {'compiled' if compiled else 'eager'}, MLP {backend}, "
        f"passes {scale.config.passes}, attention {scale.config.attention}, "
        f"{scale.windows} x {model.seq_len} tokens",
        events=traced.events,
        idle_ms=traced.idle_ms,
        steps=TRACED_STEPS,
        step_ms=traced.step_ms,
        unprofiled_ms=times["step"].median_ms,
        sizes=sizes,
        element_bytes=scale.dtype.itemsize,
        ceilings=ceilings.measure(device),
        environment=described,
    )
    names = [(e.name, component(e, sizes)) for e in traced.events if e.on_gpu]
    launches = names[: len(names) // TRACED_STEPS]
    return profile, [(n, c) for n, c in launches if not n.startswith(("Memcpy", "Memset"))]


def one_kernel(command: OneKernel) -> None:
    """Print a kernel's time, its distance from the roof and, with Nsight, its counters."""
    scale = current()
    backend = _backend(scale, command.mlp)
    case = kernels.case(scale, command.name, backend)
    pair = {"kernel": case.subject, "reference": case.reference}
    times = time_interleaved(pair, rounds=30, warm_up_rounds=5, device=case.clock)
    ideal, roof = kernels.ideal(scale, command.name), ceilings.measure(scale.device.type)
    took = Component(command.name, times["kernel"].median_ms, 1, ideal.flops, ideal.bytes)
    floor_ms = max(ideal.flops / roof.tflops / 1e9, ideal.bytes / roof.gbytes / 1e6)
    result: dict[str, Any] = {
        "kernel": command.name,
        "mlp": backend,
        "environment": environment.describe(),
        "ms": times["kernel"].as_json(),
        "over_reference": times["kernel"].median_ms / times["reference"].median_ms,
        "reference": case.reference_name,
        "tflops": took.tflops,
        "gbytes": took.gbytes,
        "roofline_ms": floor_ms,
        "share_of_roof": floor_ms / took.ms,
        "ceilings": {"tflops": roof.tflops, "gbytes": roof.gbytes},
    }
    if _nsight_wanted(scale, command.nsight):
        request = {"kind": "kernel", "name": command.name, "mlp": backend}
        rows = nsight.collect(request, nsight.KERNEL_METRICS)
        result["nsight"] = [{"kernel": nsight.short_name(r.name), **r.values} for r in rows]
        result["nsight_versions"] = nsight.describe()
    if command.out is not None:
        files.write_json(command.out, result)
    log(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=2))


def compare(command: Compare) -> None:
    """Print the difference component by component, draw the bars; gaps are without the profiler."""
    before, after = (load(p).without_profiler() for p in (command.before, command.after))
    old = {c.name: c.ms for c in before.components}
    new = {c.name: c.ms for c in after.components}
    log("| component | before ms | after ms | change |\n| --- | ---: | ---: | ---: |")
    for name in sorted(old.keys() | new.keys(), key=lambda n: -abs(new.get(n, 0) - old.get(n, 0))):
        a, b = old.get(name, 0.0), new.get(name, 0.0)
        log(f"| {name} | {a:.3f} | {b:.3f} | {b - a:+.3f} |")
    total = after.step_ms - before.step_ms
    log(f"| **step** | {before.step_ms:.3f} | {after.step_ms:.3f} | {total:+.3f} |")
    bars = {f"before: {before.title}": before, f"after: {after.title}": after}
    bars = {title.replace(", ", "\n"): profile for title, profile in bars.items()}
    if before.title == after.title:
        bars = {"before": before, "after": after}
    pictures.stacked_bars(command.out, bars)
    log(f"written to {command.out}")


def trend(command: Trend) -> None:
    """Draw a subject over stored runs."""
    runs = []
    for path in sorted(command.runs.glob("*.json")):
        subjects = json.loads(path.read_text())["subjects"]
        if command.subject in subjects:
            runs.append((path.stem, subjects[command.subject]))
    if not runs:
        raise DataError(
            f"no run in {command.runs} measured {command.subject!r}; `pytest bench` stores runs"
        )
    pictures.trend(command.out, command.subject, runs)
    log(f"{len(runs)} runs drawn; written to {command.out}")


def _backend(scale: Scale, chosen: MlpBackend | None) -> MlpBackend:
    backend = chosen or scale.config.mlp
    check_implementations(replace(scale.config, mlp=backend))
    return backend


def _nsight_wanted(scale: Scale, choice: NsightChoice) -> bool:
    """Whether to use Nsight. Raises ConfigError if it is insisted upon and cannot run."""
    if choice == "off":
        return False
    reason = nsight.unusable() if scale.cuda else "there is no CUDA GPU"
    if reason is not None and choice == "on":
        raise ConfigError(f"--nsight on: {reason}")
    if reason is not None:
        log(f"without Nsight Compute: {reason}; the PyTorch profiler alone is used")
    return reason is None


if __name__ == "__main__":
    sys.exit(main())
