"""Claims about the product that has the entry of the next block in its epilogue.

Letters: M rows (tokens), K and N widths of the product's operands.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cutlass, entry_cutlass, epilogue, reference
from kernels.variants import LINEAR_MIX_PLAN, LINEAR_MIX_SKIP_PLAN, VARIANTS, Plan
from verify import hopper_code
from verify.tolerance import check, kernel_budget, relative_error, rounding_budget

BF16, F64 = torch.bfloat16, torch.float64
PLANS = {"linear_mix": LINEAR_MIX_PLAN, "linear_mix_skip": LINEAR_MIX_SKIP_PLAN}
NAMES = [name for name, variant in VARIANTS.items() if variant.op in PLANS]
DAMP, NEXT_DAMP = 0.6, 0.8

Arguments = tuple[Any, ...]
"""Those of `linear_mix`."""


def _inputs(m: int, n: int, k: int, skip: bool, device: str) -> Arguments:
    """Random arguments; matrices hold bfloat16 values in float64, channels' factors are float32."""
    g = torch.Generator(device).manual_seed(m + n)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g, device=device)).to(BF16).to(F64)

    mix, weight = (torch.rand(*s, generator=g, device=device) + 0.5 for s in ((2, n), (n,)))
    joined = (normal(m, n), weight) if skip else (None, None)
    rows = normal(m, k), normal(n, k, scale=k**-0.5), normal(m, n), normal(m, n)
    return *rows, mix, *joined


def _typed(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same with matrices in `dtype`; channels' factors stay float32."""
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.dtype == F64 else a for a in arguments)


# The meaning.


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_block_ends_and_the_next_begins(
    skip: bool, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are autograd's of the MLP, then of mix and skip, each as it reads."""
    for name in ("cutlass", "entry_cutlass"):
        monkeypatch.setattr(epilogue, name, reference)
    monkeypatch.setattr(epilogue.pass_ops, "mix_norm_backward", _plain_entry_backward)
    g = torch.Generator().manual_seed(0)
    shapes = [(7, 16), (40, 16), (16, 40), (7, 16), (2, 16)] + skip * [(7, 16), (16,)]
    leaves = [torch.randn(s, generator=g, dtype=F64).requires_grad_() for s in shapes]
    t, w_up, w_down, x0, mix, *joined = leaves
    skip_rows, weight = joined if skip else (None, None)
    grads = [torch.randn(7, 16, generator=g, dtype=F64) for _ in range(2 + keep)]

    def plain() -> list[Tensor]:
        x = t + reference.mlp(DAMP * reference.rms_norm(t), w_up, w_down)
        mixed = x if skip_rows is None or weight is None else x + weight * skip_rows
        u = mix[0] * mixed + mix[1] * x0
        return [u, NEXT_DAMP * reference.rms_norm(u), x][: 2 + keep]

    u, rows, factor, kept = epilogue.mlp_enter(
        t, t.square().sum(1, keepdim=True), w_up, w_down, DAMP, x0, mix, NEXT_DAMP,
        skip=skip_rows, skip_weight_D=weight, keep=keep,
    )  # fmt: skip
    # A reader of `rows` applies the factor and sends its own gradient times it, the factor held.
    got = [u, rows * factor.detach()[:, None]] + ([] if kept is None else [kept])
    budget = rounding_budget(64 * 40 * 16, F64)
    for a, e in zip(got, plain(), strict=True):
        check("value", relative_error(a, e), budget)
    found = torch.autograd.grad(got, leaves, grads)
    for a, e in zip(found, torch.autograd.grad(plain(), leaves, grads), strict=True):
        check("gradient", relative_error(a, e), budget)


def _plain_entry_backward(
    du: Tensor, through: Tensor, kept: Tensor | None, x: Tensor, x0: Tensor, skip: Tensor | None,
    weight: Tensor | None, mix: Tensor, damp: None,
) -> list[Tensor]:  # fmt: skip
    """`mix_norm_backward` after a factor, by autograd and the factor's gradient (epilogue.py)."""
    leaves = [t.detach().requires_grad_() for t in (x, x0, mix, skip, weight) if t is not None]
    joined, its_weight = leaves[3:] if skip is not None else (None, None)
    with torch.enable_grad():
        u, _ = reference.mix_factor(leaves[0], joined, its_weight, leaves[1], leaves[2], 1.0)
    square = u.detach().square().mean(1, keepdim=True) + reference.EPS
    along = (through * u.detach()).mean(1, keepdim=True)
    total = du + through - along / square * u.detach()
    dx, dx0, d_mix, *more = torch.autograd.grad(u, leaves, total)
    dx = dx if kept is None else dx + kept
    d_weight = more[1] if more else torch.zeros_like(x[0])
    sums = torch.cat((d_mix, d_weight[None]))[None]
    return [dx, dx0, sums, more[0]] if more else [dx, dx0, sums]


# What the operator says of itself, and what it refuses.


@pytest.mark.parametrize("op", list(PLANS))
def test_default_plan_names_a_variant(op: str) -> None:
    """The default names a variant of its operator, and there is another to compare with."""
    names = [name for name in NAMES if VARIANTS[name].op == op]
    assert PLANS[op].variant in names
    assert len(names) >= 2


@pytest.mark.parametrize("skip", [False, True])
def test_operator_has_true_shapes_for_the_compiler(skip: bool) -> None:
    """Its fake gives shapes, types and layout; squares have a column per tile."""
    arguments = _typed(_inputs(130, 264, 40, skip, "cpu"), BF16)
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    x, u, squares = entry_cutlass.linear_mix(*meta)
    for got, want in zip((x, u), reference.linear_mix(*arguments), strict=False):
        assert (got.shape, got.dtype, got.is_contiguous()) == (want.shape, want.dtype, True)
    tiles = math.ceil(264 / VARIANTS[LINEAR_MIX_PLAN.variant].tile[1])
    assert (tuple(squares.shape), squares.dtype) == ((130, tiles), torch.float32)


def _changed(**changes: Any) -> list[Any]:
    """Fitting arguments, but for their place, with some of them changed."""
    names = ("y", "w", "residual", "x0", "mix", "skip", "weight")
    values = _typed(_inputs(4, 16, 8, True, "cpu"), BF16)
    return list((dict(zip(names, values, strict=True)) | changes).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w": torch.zeros(16, 16, dtype=BF16)}, r"w \[N, K\].*does not fit x"),
        ({"residual": torch.zeros(4, 8, dtype=BF16)}, r"residual \[M, N\].*must be \(4, 16\)"),
        ({"x0": torch.zeros(4, 8, dtype=BF16)}, r"x0 \[M, N\].*must be \(4, 16\)"),
        ({"skip": torch.zeros(5, 16, dtype=BF16)}, r"skip \[M, N\].*must be \(4, 16\)"),
        ({"skip": None}, "skip is missing"),
        ({"weight": None}, "skip_weight is missing"),
        ({"mix": torch.zeros(2, 8)}, r"mix \[2, N\] must be float32 \(2, 16\)"),
        ({"mix": torch.zeros(2, 16, dtype=BF16)}, "mix .* must be float32"),
        ({"weight": torch.zeros(8)}, r"skip_weight \[N\] must be float32 \(16,\)"),
        ({"weight": torch.zeros(17)[1:]}, "skip_weight must start at a multiple of 8 bytes"),
    ],
)
def test_bad_arguments_are_named(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel would read past is refused by name."""
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        entry_cutlass.check_linear_mix(*_changed())
    for name in ("check_matrices", "check_cuda_tensors"):
        monkeypatch.setattr(entry_cutlass.checks, name, lambda **_: None)
    entry_cutlass.check_linear_mix(*_changed())
    with pytest.raises(ValueError, match=words):
        entry_cutlass.check_linear_mix(*_changed(**changes))


@pytest.mark.parametrize("skip", [False, True])
def test_plan_of_another_operator_is_refused(skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a skip the plan must be of the product with one, and without of the other."""
    monkeypatch.setattr(entry_cutlass, "check_linear_mix", lambda *_: None)
    arguments = _inputs(4, 16, 8, skip, "cpu")
    with pytest.raises(ValueError, match="is not one of linear_mix"):
        entry_cutlass.run_linear_mix(
            *arguments, plan=LINEAR_MIX_PLAN if skip else LINEAR_MIX_SKIP_PLAN
        )


# With the compiler: the machine code.


@pytest.mark.nvcc
@pytest.mark.timeout(900)
def test_machine_code_hardly_spills() -> None:
    """With a skip, it is warp-group products and bulk copies, and spills a few registers at most.

    Without one it is the same code with less to load; one compilation must do.
    """
    name = LINEAR_MIX_SKIP_PLAN.variant
    code = hopper_code.read(hopper_code.cutlass_library(name))
    rows, columns, depth = VARIANTS[name].tile
    assert code.opcodes["HGMMA"] >= (rows // 64) * (columns / 256) * (depth // 16)
    assert code.opcodes["UTMALDG"] >= 5
    assert code.opcodes["UTMASTG"] >= 2
    assert code.opcodes["LDL"] <= 16
    assert code.opcodes["STL"] <= 16


# On a Hopper GPU.

SHAPES = [(1, 512, 1792), (127, 64, 192), (129, 72, 136), (1000, 512, 72), (20_001, 520, 1800)]
"""M, N, K: one row, ragged widths, and more tiles than a GPU has multiprocessors."""


@pytest.mark.hopper
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_results_meet_the_budget(name: str, m: int, n: int, k: int) -> None:
    """Every 1024 rows, and every 64 columns, lie within budget of float64; so do the squares."""
    arguments = _inputs(m, n, k, VARIANTS[name].op == "linear_mix_skip", "cuda")
    *exact, squares = reference.linear_mix(*arguments)
    plain = reference.linear_mix(*_typed(arguments, BF16))
    *got, found = entry_cutlass.run_linear_mix(*_typed(arguments, BF16), plan=Plan(name))
    for result, a, p, e in zip("xu", got, plain, exact, strict=False):
        rows = zip(*(t.split(1024) for t in (a, p, e)), strict=True)
        columns = zip(*(t.split(64, dim=1) for t in (a, p, e)), strict=True)
        for part, plain_part, exact_part in (*rows, *columns):
            budget = kernel_budget(plain_part, exact_part, BF16)
            check(result, relative_error(part, exact_part), budget)
    budget = rounding_budget(8 * (n + k), torch.float32)
    check("squares", relative_error(found.sum(1, keepdim=True), squares), budget)


@pytest.mark.hopper
@pytest.mark.parametrize("name", NAMES)
def test_order_of_tiles_changes_no_bit(name: str) -> None:
    """Along M or N, in bands of any width, the result is the same."""
    skip = VARIANTS[name].op == "linear_mix_skip"
    arguments = _typed(_inputs(20_001, 520, 264, skip, "cuda"), BF16)
    first = entry_cutlass.run_linear_mix(*arguments, plan=Plan(name))
    for along_m in (False, True):
        for swizzle in (1, 2, 8):
            other = entry_cutlass.run_linear_mix(*arguments, plan=Plan(name, along_m, swizzle))
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.hopper
@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_the_results_is_written(name: str) -> None:
    """Ragged tiles, and those past the last column, write their rows, columns and squares alone."""
    m, n, k = 333, 264, 72
    arguments = _typed(_inputs(m, n, k, VARIANTS[name].op == "linear_mix_skip", "cuda"), BF16)
    want = entry_cutlass.run_linear_mix(*arguments, plan=Plan(name))
    buffers = [torch.full((3 * t.numel(),), 7, device="cuda", dtype=t.dtype) for t in want]
    pairs = zip(buffers, want, strict=True)
    results = [b[t.numel() : 2 * t.numel()].view(t.shape) for b, t in pairs]
    absent = torch.empty(0, device="cuda")
    given = [absent if a is None else a for a in arguments]
    cutlass.launch(Plan(name, max_swizzle=8), (*given, *results), (m, n, k))
    for buffer, result, t in zip(buffers, results, want, strict=True):
        assert torch.equal(result, t)
        assert (buffer[: t.numel()] == 7).all()
        assert (buffer[2 * t.numel() :] == 7).all()
