"""The MLP kernels at the record's shape on one Hopper GPU: errors, times, ratios, memory.

    python -m bench.mlp_kernels --out bench/mlp_kernels_h100.json

Every subject runs in one process on real random data, interleaved; figures are medians. Errors
are relative to float32 on the same rounded inputs, beside those of plain bfloat16 PyTorch.

Letters: M rows (tokens), D model width, F MLP width.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.stopwatch import Subject, Timing, time_interleaved
from kernels import backward_triton, cutlass, forward_triton, reference
from kernels.mlp import mlp
from kernels.tiles import CANDIDATES, PUBLISHED_BACKWARD, PUBLISHED_FORWARD
from kernels.variants import VARIANTS, Plan
from trainer import environment, files
from verify.tolerance import relative_error

ROTATIONS = 2
"""Input sets; one call touches some 450 MB, nine times the L2."""


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.mlp_kernels`."""

    out: Path
    """JSON file for the results."""
    rows: int = 98_304
    """M: tokens of a micro-step."""
    width: int = 512
    """D."""
    mlp_width: int = 1792
    """F."""
    rounds: int = 40
    """Measured rounds."""
    rasters: bool = False
    """Time every CUTLASS variant with several tile orders."""


@dataclass(frozen=True)
class Inputs:
    """One set of random inputs, bfloat16."""

    x_MD: Tensor
    go_MD: Tensor
    w_up_FD: Tensor
    w_down_DF: Tensor
    act_grad_MF: Tensor


def make_inputs(arguments: Arguments, seed: int) -> Inputs:
    """Random inputs at the scale training has: unit activations, weights of 1/sqrt(fan-in)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    m, d, f = arguments.rows, arguments.width, arguments.mlp_width

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, device="cuda", generator=generator)
        return (values * scale).bfloat16()

    x, w_up = normal(m, d), normal(f, d, scale=d**-0.5)
    act_grad, _ = reference.up_activation(x, w_up)
    return Inputs(x, normal(m, d), w_up, normal(d, f, scale=f**-0.5), act_grad)


def plans(op: str, rasters: bool) -> dict[str, Plan]:
    """CUTLASS plans to time, by name."""
    orders = [(False, 1), (False, 2), (False, 4), (True, 8)] if rasters else [(False, 1)]
    return {
        f"cutlass {v.name} {'m' if along_m else 'n'}{swizzle}": Plan(v.name, along_m, swizzle)
        for v in VARIANTS.values()
        if v.op == op
        for along_m, swizzle in orders
    }


def forward_subjects(sets: list[Inputs], rasters: bool) -> dict[str, Subject]:
    """Everything that computes act_grad and post, and the bare GEMM."""
    compiled = torch.compile(reference.up_activation)

    def pick(i: int) -> tuple[Tensor, Tensor]:
        chosen = sets[i % len(sets)]
        return chosen.x_MD, chosen.w_up_FD

    subjects: dict[str, Subject] = {
        "gemm": lambda i: torch.nn.functional.linear(*pick(i)),
        "eager": lambda i: reference.up_activation(*pick(i)),
        "torch.compile": lambda i: compiled(*pick(i)),
        "triton published": lambda i: forward_triton.up_activation(*pick(i), PUBLISHED_FORWARD),
    }
    for tile in CANDIDATES:
        subjects[f"triton {tile.name}"] = lambda i, t=tile: forward_triton.up_activation(
            *pick(i), t
        )
    for name, plan in plans("up", rasters).items():
        subjects[name] = lambda i, p=plan: cutlass.run_up_activation(*pick(i), p)
    return subjects


def backward_subjects(sets: list[Inputs], rasters: bool) -> dict[str, Subject]:
    """Everything that computes dpre, and the bare GEMM."""
    compiled = torch.compile(reference.dpre)

    def pick(i: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = sets[i % len(sets)]
        return chosen.go_MD, chosen.w_down_DF, chosen.act_grad_MF

    subjects: dict[str, Subject] = {
        "gemm": lambda i: torch.mm(*pick(i)[:2]),
        "eager": lambda i: reference.dpre(*pick(i)),
        "torch.compile": lambda i: compiled(*pick(i)),
        "triton published": lambda i: backward_triton.dpre(*pick(i), PUBLISHED_BACKWARD),
    }
    for tile in CANDIDATES:
        subjects[f"triton {tile.name}"] = lambda i, t=tile: backward_triton.dpre(*pick(i), t)
    for name, plan in plans("dpre", rasters).items():
        subjects[name] = lambda i, p=plan: cutlass.run_dpre(*pick(i), p)
    return subjects


def runnable(subjects: dict[str, Subject]) -> tuple[dict[str, Subject], dict[str, str]]:
    """Subjects that run once, and why the others do not (too much shared memory, say)."""
    good: dict[str, Subject] = {}
    refused: dict[str, str] = {}
    for name, subject in subjects.items():
        try:
            subject(0)
            torch.cuda.synchronize()
            good[name] = subject
        except Exception as error:  # recorded in the results, by name
            refused[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return good, refused


def errors(subjects: dict[str, Subject], exact: tuple[Tensor, ...]) -> dict[str, list[float]]:
    """Relative error of each output of each subject against float32."""
    found: dict[str, list[float]] = {}
    for name, subject in subjects.items():
        if name == "gemm":
            continue
        outputs: Any = subject(0)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found[name] = [relative_error(o, e) for o, e in zip(outputs, exact, strict=True)]
    return found


def mlp_step(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """Forward and backward of the whole MLP: y and the gradients of x, w_up, w_down."""
    leaves = [t.detach().requires_grad_() for t in (inputs.x_MD, inputs.w_up_FD, inputs.w_down_DF)]
    y, _ = mlp(leaves[0], leaves[1], leaves[2], backend=backend)
    return y.detach(), *torch.autograd.grad(y, leaves, inputs.go_MD)


def plain_step(inputs: Inputs) -> tuple[Tensor, ...]:
    """The same through the plain formula and autograd."""
    leaves = [t.detach().requires_grad_() for t in (inputs.x_MD, inputs.w_up_FD, inputs.w_down_DF)]
    y = reference.mlp(leaves[0], leaves[1], leaves[2])
    return y.detach(), *torch.autograd.grad(y, leaves, inputs.go_MD)


def whole_mlp(sets: list[Inputs], rounds: int) -> dict[str, Any]:
    """Forward plus backward: time, peak memory and errors, fused against torch.compile."""
    compiled = torch.compile(plain_step)
    steps = {
        "eager": plain_step,
        "torch.compile": compiled,
        "triton": lambda s: mlp_step(s, "triton"),
        "cutlass": lambda s: mlp_step(s, "cutlass"),
    }
    exact = plain_step(Inputs(*(t.float() for t in vars(sets[0]).values())))
    result: dict[str, Any] = {}
    for name, step in steps.items():
        outputs = step(sets[0])
        measured = [relative_error(o, e) for o, e in zip(outputs, exact, strict=True)]
        del outputs
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(sets[0])
        peak = torch.cuda.max_memory_allocated() - before
        result[name] = {"errors_y_dx_dup_ddown": measured, "peak_extra_bytes": peak}
    subjects: dict[str, Subject] = {
        name: (lambda i, f=step: f(sets[i % len(sets)])) for name, step in steps.items()
    }
    times = time_interleaved(subjects, rounds=rounds, warm_up_rounds=5, device="cuda")
    for name, timing in times.items():
        result[name]["ms"] = timing.as_json()
        result[name]["ratio_to_torch_compile"] = timing.median_ms / times["torch.compile"].median_ms
    return result


def ratios(times: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """Each subject over the named comparison points."""
    points = ("gemm", "eager", "torch.compile", "triton published")
    return {
        name: {f"over {p}": t.median_ms / times[p].median_ms for p in points}
        for name, t in times.items()
    }


def section(subjects: dict[str, Subject], exact: tuple[Tensor, ...], rounds: int) -> dict[str, Any]:
    """Errors, times and ratios of one kernel's subjects."""
    good, refused = runnable(subjects)
    found = errors(good, exact)
    times = time_interleaved(good, rounds=rounds, warm_up_rounds=5, device="cuda")
    return {
        "refused": refused,
        "errors": found,
        "ms": {name: timing.as_json() for name, timing in times.items()},
        "ratios": ratios(times),
    }


def show(title: str, result: dict[str, Any]) -> None:
    """The section as a table, fastest first."""
    table = Table(title=title)
    for heading in ("subject", "ms", "p10-p90", "/gemm", "/eager", "/compile", "/published", "err"):
        table.add_column(heading, no_wrap=True)
    for name, ms in sorted(result["ms"].items(), key=lambda item: item[1]["median_ms"]):
        over = [f"{v:.3f}" for v in result["ratios"][name].values()]
        worst = max(result["errors"].get(name, [float("nan")]))
        spread = f"{ms['p10_ms']:.3f}-{ms['p90_ms']:.3f}"
        table.add_row(name, f"{ms['median_ms']:.4f}", spread, *over, f"{worst:.1e}")
    console = Console(width=150)
    console.print(table)
    for name, reason in result["refused"].items():
        console.print(f"refused: {name}: {reason}")


def main() -> int:
    """Measure everything, write the JSON, print the tables."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if not torch.cuda.is_available():
        print("error: bench.mlp_kernels needs a Hopper GPU; torch finds no CUDA", file=sys.stderr)
        return 2
    sets = [make_inputs(arguments, seed) for seed in range(ROTATIONS)]
    first = sets[0]
    exact_forward = reference.up_activation(first.x_MD.float(), first.w_up_FD.float())
    exact_backward = (
        reference.dpre(first.go_MD.float(), first.w_down_DF.float(), first.act_grad_MF.float()),
    )
    forward = section(forward_subjects(sets, arguments.rasters), exact_forward, arguments.rounds)
    backward = section(backward_subjects(sets, arguments.rasters), exact_backward, arguments.rounds)
    del exact_forward, exact_backward
    results = {
        "environment": environment.describe(),
        "settings": {k: str(v) for k, v in asdict(arguments).items() if k != "out"},
        "forward": forward,
        "backward": backward,
        "whole_mlp": whole_mlp(sets, arguments.rounds),
    }
    files.write_json(arguments.out, results)
    show("forward: act_grad and post", forward)
    show("backward: dpre", backward)
    for name, row in results["whole_mlp"].items():
        print(name, row["ms"]["median_ms"], "ms, x compile", f"{row['ratio_to_torch_compile']:.3f}",
              "peak", f"{row['peak_extra_bytes'] / 1e9:.2f} GB",
              [f"{e:.1e}" for e in row["errors_y_dx_dup_ddown"]])  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
