"""The fused passes at the record's shapes on a GPU, beside torch.compile and the memory floor.

    python -m bench.passes --out passes.json [--blocks] [--passes mix_factor ...]

Every subject runs in one process on random data, interleaved. The floor is the bytes a pass must
move (each input read once, each output written once) at the copy rate measured beside it.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.scale import Scale, current
from bench.stopwatch import Subject, time_interleaved
from kernels import flash4, heads_triton, joined_heads_triton, reference, residual_triton
from kernels.tiles import (
    HEADS_SUMMING_BLOCK,
    ROW_BLOCK,
    SKIP_SUMMING_BLOCK,
    SUMMING_BLOCK,
    RowBlock,
)
from profiles import ceilings
from trainer import environment, files
from trainer.errors import ConfigError, FairwayError
from trainer.layers import rotary_tables

MAPPING = (RowBlock(1, 1), RowBlock(2, 2), RowBlock(2, 4), RowBlock(4, 4), RowBlock(4, 8))
SUMMING = tuple(
    RowBlock(rows, warps, programs)
    for rows, warps in ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8))
    for programs in (528, 1056, 2112)
)
PAIRED = tuple(
    RowBlock(rows, warps, programs)
    for rows, warps in ((2, 2), (2, 4), (4, 4), (4, 8), (8, 4), (8, 8))
    for programs in (1056, 2112, 4224)
)
"""For a pass that takes rows in pairs."""
DAMP = 0.5


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.passes`."""

    out: Path
    """JSON file for the results."""
    blocks: bool = False
    """Time every pass with several block shapes."""
    passes: tuple[str, ...] = ()
    """Names of those to time; without a name, all."""
    rounds: int = 30
    """Measured rounds."""


@dataclass(frozen=True)
class Pass:
    """One pass: its kernel, its plain meaning, its traffic."""

    kernel: Callable[[RowBlock], Any]
    plain: Callable[[], Any] | None
    """None where the compiler has no such form of it."""
    tensors: Callable[[], Iterable[Tensor]]
    """Everything read and written, for the floor."""
    summing: RowBlock | None = None
    """Block shape of a pass that sums over rows; none: one that does not."""
    blocks: tuple[RowBlock, ...] = MAPPING
    """Shapes to try."""


def passes(scale: Scale) -> dict[str, Pass]:
    """Every pass by name."""
    c = scale.config.model
    m, d, h, g, k = scale.windows * c.seq_len, c.width, c.query_heads, c.kv_heads, c.head_size
    x, branch, skip, x0, du, dn, dt, t = (scale.normal(m, d) for _ in range(8))
    w, mix = (torch.randn(*s, device=scale.device) for s in ((d,), (2, d)))
    lead = (scale.windows, c.seq_len)
    qkv = scale.normal(*lead, (h + 2 * g) * k)
    dq, y, grad = (scale.normal(*lead, h, k) for _ in range(3))
    dk, dv, dv_more, v = (scale.normal(*lead, g, k) for _ in range(4))
    dk_apart, dv_apart = (scale.normal(h // g, *lead, g, k) for _ in range(2))
    gain = torch.rand(h, device=scale.device) + 1
    cos, sin = (table.to(scale.device) for table in rotary_tables(c))

    def mixed(b: RowBlock, s: Tensor | None) -> list[Tensor]:
        chosen = None if s is None else w
        return residual_triton.mix_norm(x, branch, s, chosen, x0, mix, DAMP, b)

    def mixed_back(b: RowBlock, s: Tensor | None) -> list[Tensor]:
        chosen = None if s is None else w
        return residual_triton.mix_norm_backward(du, dn, None, t, x0, s, chosen, mix, DAMP, b)

    def entered(b: RowBlock, s: Tensor | None) -> Sequence[Tensor]:
        return residual_triton.mix_factor(x, s, None if s is None else w, x0, mix, DAMP, b)

    def entered_back(b: RowBlock, s: Tensor | None) -> list[Tensor]:
        chosen = None if s is None else w
        return residual_triton.mix_norm_backward(du, dn, None, t, x0, s, chosen, mix, None, b)

    finished = scale.normal(m, (h + 2 * g) * k)
    inverse, factor, sums = (
        torch.rand(*shape, device=scale.device) + 0.5
        for shape in ((h + g, m), (m,), (scale.windows, h, flash4.padded(c.seq_len) * k))
    )

    compiled_mix = torch.compile(reference.mix_norm)
    compiled_factor = torch.compile(reference.mix_factor)
    compiled_add = torch.compile(reference.add_norm)
    compiled_joined = torch.compile(reference.project_heads_backward)
    compiled_heads = torch.compile(reference.split_heads)
    compiled_xsa = torch.compile(reference.exclude_self)
    plain_heads_backward = _gradients(
        lambda a, n: compiled_heads(a, None, n, g, cos, sin), (qkv, gain), (dq, dk, dv)
    )
    return {
        "mix_norm": Pass(
            lambda b: mixed(b, None),
            lambda: compiled_mix(x, branch, None, None, x0, mix, DAMP),
            lambda: (x, branch, x0, *mixed(ROW_BLOCK, None)),
        ),
        "mix_norm, skip": Pass(
            lambda b: mixed(b, skip),
            lambda: compiled_mix(x, branch, skip, w, x0, mix, DAMP),
            lambda: (x, branch, skip, x0, *mixed(ROW_BLOCK, skip)),
        ),
        "mix_factor": Pass(
            lambda b: entered(b, None),
            lambda: compiled_factor(x, None, None, x0, mix, DAMP),
            lambda: (x, x0, *entered(ROW_BLOCK, None)),
        ),
        "mix_factor, skip": Pass(
            lambda b: entered(b, skip),
            lambda: compiled_factor(x, skip, w, x0, mix, DAMP),
            lambda: (x, skip, x0, *entered(ROW_BLOCK, skip)),
        ),
        "add_norm": Pass(
            lambda b: residual_triton.add_norm(x, branch, DAMP, b),
            lambda: compiled_add(x, branch, DAMP),
            lambda: (x, branch, *residual_triton.add_norm(x, branch, DAMP)),
        ),
        "split_heads": Pass(
            lambda b: heads_triton.split_heads(qkv, None, gain, g, cos, sin, b),
            lambda: compiled_heads(qkv, None, gain, g, cos, sin),
            lambda: (qkv, *heads_triton.split_heads(qkv, None, gain, g, cos, sin)),
        ),
        "exclude_self": Pass(
            lambda b: heads_triton.exclude_self(y, v, b),
            lambda: compiled_xsa(y, v),
            lambda: (y, v, heads_triton.exclude_self(y, v)),
        ),
        "mix_norm backward": Pass(
            lambda b: mixed_back(b, None),
            _gradients(
                lambda *a: compiled_mix(a[0], None, None, None, a[1], a[2], DAMP)[:2],
                (t, x0, mix),
                (du, dn),
            ),
            lambda: (du, dn, t, x0, *mixed_back(SUMMING_BLOCK, None)[:2]),
            summing=SUMMING_BLOCK,
            blocks=SUMMING,
        ),
        "mix_norm backward, skip": Pass(
            lambda b: mixed_back(b, skip),
            _gradients(
                lambda *a: compiled_mix(a[0], None, a[3], a[4], a[1], a[2], DAMP)[:2],
                (t, x0, mix, skip, w),
                (du, dn),
            ),
            lambda: (du, dn, t, x0, skip, *mixed_back(SUMMING_BLOCK, None)[:2], skip),
            summing=SKIP_SUMMING_BLOCK,
            blocks=SUMMING,
        ),
        "mix_factor backward": Pass(
            lambda b: entered_back(b, None),
            None,
            lambda: (du, dn, t, x0, *entered_back(SUMMING_BLOCK, None)[:2]),
            summing=SUMMING_BLOCK,
            blocks=SUMMING,
        ),
        "mix_factor backward, skip": Pass(
            lambda b: entered_back(b, skip),
            None,
            lambda: (du, dn, t, x0, skip, *entered_back(SUMMING_BLOCK, None)[:2], skip),
            summing=SKIP_SUMMING_BLOCK,
            blocks=SUMMING,
        ),
        "joined_heads backward": Pass(
            lambda b: joined_heads_triton.joined_heads_backward(
                sums, dk_apart, dv_apart, dv_more, finished, inverse, factor, gain, cos, sin, b
            ),
            lambda: compiled_joined(finished, finished, inverse, factor, gain, cos, sin),
            lambda: (sums, dk_apart, dv_apart, dv_more, finished[:, : (h + g) * k], finished),
            summing=HEADS_SUMMING_BLOCK,
            blocks=PAIRED,
        ),
        "add_norm backward": Pass(
            lambda b: residual_triton.add_norm_backward(dt, dn, t, DAMP, b),
            _gradients(lambda a, b: compiled_add(a, b, DAMP), (x, branch), (dt, dn)),
            lambda: (dt, dn, t, t),
        ),
        "split_heads backward": Pass(
            lambda b: heads_triton.split_heads_backward(
                dq, dk, dv, dv_more, qkv, gain, cos, sin, b
            ),
            plain_heads_backward,
            lambda: (dq, dk, dv, dv_more, qkv, qkv),
            summing=HEADS_SUMMING_BLOCK,
            blocks=SUMMING,
        ),
        "split_heads backward, by member": Pass(
            lambda b: heads_triton.split_heads_backward(
                dq, dk_apart, dv_apart, dv_more, qkv, gain, cos, sin, b
            ),
            plain_heads_backward,  # of the sums, which it does not form
            lambda: (dq, dk_apart, dv_apart, dv_more, qkv, qkv),
            summing=HEADS_SUMMING_BLOCK,
            blocks=SUMMING,
        ),
        "exclude_self backward": Pass(
            lambda b: heads_triton.exclude_self_backward(grad, y, v, b),
            _gradients(lambda *a: (compiled_xsa(*a),), (y, v), (grad,)),
            lambda: (grad, y, v, y, v),
        ),
    }


def _gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
) -> Callable[[], Any]:
    """The backward pass alone of a compiled function whose graph is kept."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    outputs = function(*leaves)
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def name_of(block: RowBlock) -> str:
    """Short name of a block shape."""
    return f"{block.rows} rows, {block.warps} warps, {block.programs} programs"


def measure(arguments: Arguments) -> dict[str, Any]:
    """Every pass: floor, torch.compile, kernel; JSON-able."""
    scale = current()
    roof = ceilings.measure(scale.device.type)
    results: dict[str, Any] = {"copy_gbytes_per_s": roof.gbytes, "passes": {}}
    made = passes(scale)
    if strange := sorted(set(arguments.passes) - made.keys()):
        raise ConfigError(f"no pass {', '.join(strange)}; choose of {', '.join(made)}")
    for name in arguments.passes or made:
        one = made[name]
        own = one.summing or ROW_BLOCK
        subjects: dict[str, Subject] = {"kernel": lambda i, p=one, b=own: p.kernel(b)}
        if one.plain is not None:
            subjects["torch.compile"] = lambda i, plain=one.plain: plain()
        for block in one.blocks if arguments.blocks else ():
            subjects[name_of(block)] = lambda i, p=one, b=block: p.kernel(b)
        times = time_interleaved(
            subjects, rounds=arguments.rounds, warm_up_rounds=3, device=scale.device.type
        )
        moved = sum(t.nbytes for t in one.tensors())
        results["passes"][name] = {
            "bytes": moved,
            "floor_ms": moved / roof.gbytes / 1e6,
            "ms": {subject: timing.as_json() for subject, timing in times.items()},
        }
    return results


def show(results: dict[str, Any]) -> None:
    """One line a pass."""
    table = Table(title=f"passes, copy {results['copy_gbytes_per_s']:.0f} GB/s")
    for heading in (
        "pass",
        "floor ms",
        "kernel ms",
        "torch.compile ms",
        "of compile",
        "best block",
    ):
        table.add_column(heading)
    for name, row in results["passes"].items():
        ms = {subject: timing["median_ms"] for subject, timing in row["ms"].items()}
        kernel, compiled = ms.pop("kernel"), ms.pop("torch.compile", None)
        best = min(ms, key=lambda b: ms[b]) if ms else ""
        table.add_row(
            name,
            f"{row['floor_ms']:.3f}",
            f"{kernel:.3f}",
            f"{compiled:.3f}" if compiled else "",
            f"{kernel / compiled:.2f}" if compiled else "",
            f"{best}: {ms[best]:.3f}" if best else "",
        )
    Console(width=140).print(table)


def main() -> int:
    """Measure, write the JSON, print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if not torch.cuda.is_available():
        print("error: bench.passes needs a CUDA GPU; torch finds none", file=sys.stderr)
        return 2
    try:
        results = measure(arguments)
        files.write_json(arguments.out, {"environment": environment.describe(), **results})
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
