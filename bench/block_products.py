"""The products of a block that take over passes, beside product and pass apart, on a Hopper GPU.

    python -m bench.block_products --out block_products.json

Every case's subjects run in one process on random data, interleaved, at the record's shape: each
variant of the operator in several tile orders, what it replaces, and the bare product. Figures are
medians.

Letters: M rows (tokens), D model width, F MLP width.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.stopwatch import Subject, time_interleaved
from kernels import (
    cutlass,
    entry_cutlass,
    exclude_self_cutlass,
    heads_cutlass,
    pass_ops,
    reference,
    residual_triton,
)
from kernels.variants import UP_SCALED_PLAN, VARIANTS, Plan
from trainer import environment, files, layers
from trainer.config import ModelConfig

DAMP = 0.5
ORDERS = ((False, 1), (False, 2), (False, 4), (True, 8))
"""Tiles along N in bands of 1, 2, 4; along M in bands of 8."""
BARE, REPLACED = "bare product", "replaced"


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.block_products`."""

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


@dataclass(frozen=True)
class Case:
    """One product of the block.

    Attributes:
        op: the operator.
        run: it, with a plan.
        bare: the product alone, by cuBLAS.
        replaced: the kernels that do the same work without it.
        words: what those are.
    """

    op: str
    run: Callable[[Plan], object]
    bare: Callable[[], object]
    replaced: Callable[[], object]
    words: str


def cases(arguments: Arguments) -> dict[str, Case]:
    """Every product of the block, on random inputs of the scale training has."""
    g = torch.Generator("cuda").manual_seed(0)
    m, d, f = arguments.rows, arguments.width, arguments.mlp_width

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device="cuda", generator=g)).bfloat16()

    x, h, go = (normal(m, d) for _ in range(3))
    w_out, w_up, w_down = (
        normal(rows, columns, scale=columns**-0.5) for rows, columns in ((d, d), (f, d), (d, f))
    )
    factor = DAMP * torch.rsqrt(h.float().square().mean(1) + reference.EPS)
    post, signs = cutlass.run_up_scaled(h, w_up, factor, UP_SCALED_PLAN)
    channels = torch.rand(2, d, device="cuda", generator=g)
    ended = (post, w_down, h, x, channels)
    act_grad, _ = cutlass.up_activation(h, w_up)
    dpre = cutlass.dpre(go, w_down, act_grad)
    shape = ModelConfig(width=d)
    cos, sin = (table.cuda() for table in layers.rotary_tables(shape))
    window = len(cos)
    w_qkv = normal(d + 2 * shape.kv_width, d, scale=d**-0.5)
    joint = F.linear(h, w_qkv)
    value = joint.view(-1, window, len(w_qkv))[..., -shape.kv_width :]
    value = value.unflatten(-1, (shape.kv_heads, -1))
    lse = torch.zeros(m // window, shape.query_heads, window, device="cuda")
    y_BTHK = x.view(*lse.mT.shape, -1)
    rest, own = reference.exclude_self_parts(y_BTHK, value)
    attended = (rest.flatten(0, 1).flatten(1), own, joint)
    heads = (torch.full((shape.query_heads,), 1.5, device="cuda"), shape.kv_heads, cos, sin)
    return {
        "joint projection": Case(
            "heads",
            lambda p: heads_cutlass.run_project_heads(h, w_qkv, factor, None, *heads, plan=p),
            lambda: F.linear(h, w_qkv),
            lambda: pass_ops.split_heads(
                F.linear(h, w_qkv).view(-1, window, len(w_qkv)),
                None,
                *heads,
                factor.view(-1, window),
            ),
            "product, split_heads",
        ),
        "gradient at attention's output": Case(
            "exclude_self",
            lambda p: exclude_self_cutlass.run_exclude_self_gradient(go, w_out, *attended, plan=p),
            lambda: go @ w_out,
            lambda: pass_ops.exclude_self_backward_numbers(
                (go @ w_out).view_as(y_BTHK), y_BTHK, value, lse, window
            ),
            "product, exclude_self backward",
        ),
        "out-projection": Case(
            "linear_add",
            lambda p: cutlass.run_linear_add(x, w_out, h, p),
            lambda: F.linear(x, w_out),
            lambda: residual_triton.add_norm(h, F.linear(x, w_out), DAMP),
            "product, add_norm",
        ),
        "down-projection": Case(
            "linear_add",
            lambda p: cutlass.run_linear_add(post, w_down, h, p),
            lambda: F.linear(post, w_down),
            lambda: F.linear(post, w_down) + h,
            "product, sum",
        ),
        "down-projection and entry": Case(
            "linear_mix",
            lambda p: entry_cutlass.run_linear_mix(*ended, None, None, plan=p),
            lambda: F.linear(post, w_down),
            lambda: pass_ops.mix_factor(
                cutlass.linear_add(*ended[:3])[0], None, None, x, channels, DAMP
            ),
            "linear_add, mix_factor",
        ),
        "down-projection and entry, skip": Case(
            "linear_mix_skip",
            lambda p: entry_cutlass.run_linear_mix(*ended, go, channels[0], plan=p),
            lambda: F.linear(post, w_down),
            lambda: pass_ops.mix_factor(
                cutlass.linear_add(*ended[:3])[0], go, channels[0], x, channels, DAMP
            ),
            "linear_add, mix_factor",
        ),
        "up-projection": Case(
            "up_scaled",
            lambda p: cutlass.run_up_scaled(h, w_up, factor, p),
            lambda: F.linear(h, w_up),
            lambda: cutlass.up_activation(h, w_up),
            "up_activation",
        ),
        "gradient at the pre-activation": Case(
            "dpre_scaled",
            lambda p: cutlass.run_dpre_scaled(go, w_down, post, signs, factor, p, UP_SCALED_PLAN),
            lambda: go @ w_down,
            lambda: cutlass.dpre(go, w_down, act_grad),
            "dpre",
        ),
        "gradient at the norm's input": Case(
            "norm_gradient",
            lambda p: cutlass.run_norm_gradient(dpre, w_up, go, h, factor, p),
            lambda: dpre @ w_up,
            lambda: residual_triton.add_norm_backward(go, dpre @ w_up, h, DAMP),
            "product, add_norm backward",
        ),
    }


def measure(arguments: Arguments) -> dict[str, Any]:
    """Milliseconds of every subject of every case; JSON-able."""
    results: dict[str, Any] = {}
    for name, case in cases(arguments).items():
        subjects: dict[str, Subject] = {
            BARE: lambda _, c=case: c.bare(),
            REPLACED: lambda _, c=case: c.replaced(),
        }
        for variant in VARIANTS.values():
            if variant.op == case.op:
                for along_m, swizzle in ORDERS:
                    plan = Plan(variant.name, along_m, swizzle)
                    order = f"{'m' if along_m else 'n'}{swizzle}"
                    subjects[f"{variant.name} {order}"] = lambda _, c=case, p=plan: c.run(p)
        times = time_interleaved(subjects, rounds=arguments.rounds, warm_up_rounds=3, device="cuda")
        results[name] = {
            "replaced": case.words,
            "ms": {subject: timing.as_json() for subject, timing in times.items()},
        }
    return results


def show(results: dict[str, Any]) -> None:
    """A table a case, fastest first, and what the fastest saves."""
    console = Console(width=120)
    for name, case in results.items():
        table = Table(title=f"{name}; {REPLACED}: {case['replaced']}")
        for heading in ("subject", "ms", "p10-p90", f"of {REPLACED}", f"of {BARE}"):
            table.add_column(heading, no_wrap=True)
        medians = {subject: ms["median_ms"] for subject, ms in case["ms"].items()}
        for subject, median in sorted(medians.items(), key=lambda item: item[1]):
            ms = case["ms"][subject]
            table.add_row(
                subject,
                f"{median:.4f}",
                f"{ms['p10_ms']:.3f}-{ms['p90_ms']:.3f}",
                f"{median / medians[REPLACED]:.2f}",
                f"{median / medians[BARE]:.2f}",
            )
        console.print(table)
        best = min(v for s, v in medians.items() if s not in (BARE, REPLACED))
        console.print(f"saved: {medians[REPLACED] - best:.4f} ms")


def main() -> int:
    """Measure everything, write the JSON, print the tables."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if not torch.cuda.is_available():
        print(
            "error: bench.block_products needs a Hopper GPU; torch finds no CUDA", file=sys.stderr
        )
        return 2
    results = measure(arguments)
    settings = {key: value for key, value in asdict(arguments).items() if key != "out"}
    files.write_json(
        arguments.out,
        {"environment": environment.describe(), "settings": settings, "cases": results},
    )
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
