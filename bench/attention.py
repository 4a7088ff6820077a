"""Attention at the record's shapes on one GPU: implementations side by side.

    python -m bench.attention --out bench/attention_h100.json [--variants]

One layer: queries and keys normalised, turned and scaled as the model does it, values left as
columns of the joint projection. Every subject runs in one process on random data, interleaved;
times are medians. Errors are relative to float32 on the same rounded inputs, on fewer windows.
What cannot run here is listed with its reason.

Letters: B windows, T positions, H query heads, G key/value heads, K head size.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.flash4_variants import Attend, backward_chains, forward_chains, variants
from bench.scale import Scale, current
from bench.stopwatch import Subject, Timing, time_interleaved
from kernels import reference
from trainer import environment, files
from trainer.config import AttentionBackend
from trainer.layers import causal_attention, rotary_tables
from verify.tolerance import relative_error

PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "apache-tvm-ffi")
OUTPUTS = ("out", "dq", "dk", "dv")
BASE = "cudnn"
"""What the others are measured in, if it runs."""
WORK = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""Least work of each pass, in forward passes."""


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.attention`."""

    out: Path
    """JSON file for the results."""
    variants: bool = False
    """Also time other ways to call the flash4 kernels, and the passes around them."""
    rounds: int = 20
    """Measured rounds."""
    exact_windows: int = 2
    """Windows on which errors are taken."""


@dataclass(frozen=True)
class Inputs:
    """What one layer's attention and its backward pass read, bfloat16."""

    q_BTHK: Tensor
    k_BTGK: Tensor
    v_BTGK: Tensor
    grad_BTHK: Tensor

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as they lie, asking for gradients."""
        q, k, v = (t.detach().requires_grad_() for t in (self.q_BTHK, self.k_BTGK, self.v_BTGK))
        return q, k, v


def make_inputs(scale: Scale, windows: int) -> Inputs:
    """Random inputs as the model makes them; v is a view of the joint projection."""
    c = scale.config.model
    lead, h, g = (windows, c.seq_len), c.query_heads, c.kv_heads
    qkv = scale.normal(*lead, (h + 2 * g) * c.head_size)
    gain = torch.full((h,), c.q_gain, device=scale.device)
    cos, sin = (table.to(scale.device) for table in rotary_tables(c))
    q, k, _ = reference.split_heads(qkv, None, gain, g, cos, sin)
    v = qkv[..., -g * c.head_size :].unflatten(-1, (g, c.head_size))
    return Inputs(q.contiguous(), k.contiguous(), v, scale.normal(*lead, h, c.head_size))


def implementations(scale: Scale, more: bool) -> dict[str, Attend]:
    """Every implementation by name."""

    def ours(name: AttentionBackend) -> Attend:
        return lambda q, k, v: causal_attention(q, k, v, name)

    found: dict[str, Attend] = {
        "cudnn": ours("cudnn"),
        "torch flash": _torch_flash,
        "flex_attention": _flex(scale),
        "flash4": ours("flash4"),
    }
    return {**found, **variants()} if more else found


def _torch_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def _flex(scale: Scale) -> Attend:
    """Compiled FlexAttention with its own choice of tiles."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = scale.config.model.seq_len

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(seen, None, None, length, length, device=scale.device.type)
    compiled: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(*heads_first, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def step(attend: Attend, inputs: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward pass: the output and the gradients at q, k and v."""
    leaves = inputs.leaves()
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_BTHK)


def first_steps(
    found: dict[str, Attend], inputs: Inputs, wait: Callable[[], object]
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of every implementation's first step, compiling included; or why it cannot run."""
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, attend in found.items():
        started = time.perf_counter()
        try:
            step(attend, inputs)
            wait()
        except Exception as error:  # recorded in the results, by name
            refused[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"{name}: cannot run here: {refused[name]}", flush=True)
            continue
        seconds[name] = time.perf_counter() - started
        print(f"{name}: first step {seconds[name]:.1f} s", flush=True)
    return seconds, refused


def errors(found: dict[str, Attend], inputs: Inputs) -> dict[str, dict[str, float]]:
    """Relative error of the output and of every gradient against float32."""
    with sdpa_kernel(SDPBackend.MATH):
        exact = step(_sdpa, Inputs(*(t.float() for t in vars(inputs).values())))
    return {
        name: {
            what: relative_error(actual, wanted)
            for what, actual, wanted in zip(OUTPUTS, step(attend, inputs), exact, strict=True)
        }
        for name, attend in found.items()
    }


def forward_flops(inputs: Inputs) -> float:
    """Two products of T x T x K a head, of which causality leaves half."""
    B, T, H, K = inputs.q_BTHK.shape
    return 2.0 * B * H * T * T * K


def times(
    found: dict[str, Attend], inputs: Inputs, rounds: int, device: str
) -> dict[str, dict[str, Any]]:
    """Forward (keeping what backward needs) and both passes of one layer; backward by difference.

    A backward pass cannot be repeated alone: compiled ones overwrite what forward kept.
    """
    leaves = inputs.leaves()
    subjects: dict[str, Subject] = {}
    for name, attend in found.items():
        subjects[f"{name}/forward"] = lambda i, a=attend: a(*leaves)
        subjects[f"{name}/both"] = lambda i, a=attend: step(a, inputs)
    measured = time_interleaved(subjects, rounds=rounds, warm_up_rounds=3, device=device)
    parts = {name: _parts(measured, name, inputs) for name in found}
    base = parts[BASE if BASE in found else next(iter(found))]
    return {
        name: {
            part: {**row, "over_base": row["median_ms"] / base[part]["median_ms"]}
            for part, row in rows.items()
        }
        for name, rows in parts.items()
    }


def _parts(measured: dict[str, Timing], name: str, inputs: Inputs) -> dict[str, dict[str, float]]:
    """Times and rates of an implementation's passes."""
    forward, both = (measured[f"{name}/{part}"].as_json() for part in ("forward", "both"))
    backward = {"median_ms": both["median_ms"] - forward["median_ms"]}
    rows = {"forward": forward, "backward": backward, "both": both}
    return {
        part: {**row, "tflops": WORK[part] * forward_flops(inputs) / row["median_ms"] / 1e9}
        for part, row in rows.items()
    }


def chains(scale: Scale, inputs: Inputs, rounds: int) -> dict[str, dict[str, float]]:
    """Times of one layer's XSA, flash4 and heads, each two ways."""
    c = scale.config.model
    lead, h, g = (scale.windows, c.seq_len), c.query_heads, c.kv_heads
    cos, sin = (table.to(scale.device) for table in rotary_tables(c))
    found: dict[str, Callable[[], object]] = {}
    for name, chain in backward_chains(
        scale.normal(*lead, (h + 2 * g) * c.head_size),
        torch.full((h,), c.q_gain, device=scale.device),
        g,
        cos,
        sin,
        scale.normal(*lead, h, c.head_size),
    ).items():
        found[f"XSA, flash4 and heads backward, {name}"] = chain
    of_attention = (inputs.q_BTHK, inputs.k_BTGK, inputs.v_BTGK)
    for name, chain in forward_chains(*of_attention).items():
        found[f"flash4 and XSA forward, {name}"] = chain
    subjects: dict[str, Subject] = {
        name: lambda i, chain=chain: chain() for name, chain in found.items()
    }
    measured = time_interleaved(subjects, rounds=rounds, warm_up_rounds=3, device=scale.device.type)
    return {name: timing.as_json() for name, timing in measured.items()}


def measure(scale: Scale, found: dict[str, Attend], arguments: Arguments) -> dict[str, Any]:
    """Every implementation; JSON-able."""
    wait = torch.cuda.synchronize if scale.cuda else lambda: None
    inputs = make_inputs(scale, scale.windows)
    seconds, refused = first_steps(found, inputs, wait)
    running = {name: found[name] for name in seconds}
    print("errors against float32", flush=True)
    wrong = errors(running, make_inputs(scale, min(scale.windows, arguments.exact_windows)))
    print("times", flush=True)
    ms = times(running, inputs, arguments.rounds, scale.device.type)
    return {
        "shape_BTHGK": [*inputs.q_BTHK.shape[:3], inputs.k_BTGK.shape[2], inputs.k_BTGK.shape[3]],
        "versions": {name: _version(name) for name in PACKAGES},
        "cudnn": torch.backends.cudnn.version(),
        "refused": refused,
        "flash4_chains_ms": chains(scale, inputs, arguments.rounds)
        if arguments.variants and "flash4" in running
        else {},
        "implementations": {
            name: {
                "first_step_s": seconds[name],
                "errors": wrong[name],
                "errors_over_cudnn": {
                    what: error / wrong[BASE][what] for what, error in wrong[name].items()
                }
                if BASE in wrong
                else {},
                "ms": ms[name],
            }
            for name in running
        },
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def show(results: dict[str, Any]) -> None:
    """One line an implementation, fastest first."""
    table = Table(title="attention of one layer, B T H G K = {} {} {} {} {}".format(
        *results["shape_BTHGK"]
    ))  # fmt: skip
    headings = ("implementation", "forward ms", "backward ms", "both ms (p10-p90)", "TFLOP/s",
                "of base", "first s", *(f"err {what}" for what in OUTPUTS))  # fmt: skip
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    rows = results["implementations"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["ms"]["both"]["median_ms"]):
        ms = row["ms"]
        both = ms["both"]
        table.add_row(
            name,
            f"{ms['forward']['median_ms']:.3f}",
            f"{ms['backward']['median_ms']:.3f}",
            f"{both['median_ms']:.3f} ({both['p10_ms']:.3f}-{both['p90_ms']:.3f})",
            "/".join(f"{ms[part]['tflops']:.0f}" for part in ("forward", "backward", "both")),
            f"{both['over_base']:.3f}",
            f"{row['first_step_s']:.1f}",
            *(f"{row['errors'][what]:.1e}" for what in OUTPUTS),
        )
    console = Console(width=170)
    console.print(table)
    for name, row in results["flash4_chains_ms"].items():
        spread = f"{row['p10_ms']:.3f}-{row['p90_ms']:.3f}"
        console.print(f"{name}: {row['median_ms']:.3f} ms ({spread})")
    for name, reason in results["refused"].items():
        console.print(f"cannot run here: {name}: {reason}", markup=False)


def main() -> int:
    """Measure, write the JSON, print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if not torch.cuda.is_available():
        print("error: bench.attention needs a CUDA GPU; torch finds none", file=sys.stderr)
        return 2
    scale = current()
    results = measure(scale, implementations(scale, arguments.variants), arguments)
    files.write_json(arguments.out, {"environment": environment.describe(), **results})
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
