"""Claims about the product that has XSA's backward pass in its epilogue.

Letters: M rows (tokens), D model width, B windows, T positions, L padded positions, H query heads,
G key/value heads, K head size, N = H K, W joint width.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cutlass, exclude_self_cutlass, reference
from kernels.exclude_self_cutlass import MEMBERS
from kernels.heads_cutlass import HEAD_SIZE
from kernels.variants import EXCLUDE_SELF_PLAN, VARIANTS, Plan
from verify import hopper_code
from verify.tolerance import check, kernel_budget, relative_error, rounding_budget

BF16, F64 = torch.bfloat16, torch.float64
NAMES = [name for name, variant in VARIANTS.items() if variant.op == "exclude_self"]

Arguments = tuple[Any, ...]
"""Those of `exclude_self_gradient`."""


def _inputs(
    windows: int, window: int, d: int, heads: tuple[int, int], padded: int, device: str,
    size: int = HEAD_SIZE,
) -> Arguments:  # fmt: skip
    """Random arguments, bfloat16 values in float64; of every third row the first value is zero."""
    g = torch.Generator(device).manual_seed(windows * window + d)
    (h, kv), m = heads, windows * window

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(BF16).to(F64)

    joint = normal(m, (h + 2 * kv) * size)
    joint[::3, (h + kv) * size : (h + kv + 1) * size] = 0
    w = (normal(d, h * size) * d**-0.5).to(BF16).to(F64)
    return normal(m, d), w, normal(m, h * size), joint, h, window, padded


def _typed(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in arguments)


# The meaning.


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_formula_is_the_derivative_of_xsa_and_projection(heads: tuple[int, int]) -> None:
    """Gradients at attention's output and at the values are autograd's, whatever the groups."""
    (h, kv), size, windows, window = heads, 8, 2, 5
    arguments = _inputs(windows, window, 16, heads, 7, "cpu", size)
    go, w, y, joint, *_ = arguments
    leaves = [t.detach().requires_grad_() for t in (y, joint[:, -kv * size :])]
    y_4, v_4 = (t.view(windows, window, n, size) for t, n in zip(leaves, (h, kv), strict=True))
    # `exclude_self` computes in float32 at the least; here its formula in float64.
    u = torch.nn.functional.normalize(v_4, dim=-1, eps=reference.SMALLEST_NORM)
    u = u.repeat_interleave(h // kv, dim=2)
    rest = y_4 - (y_4 * u).sum(-1, keepdim=True) * u
    budget = rounding_budget(32, torch.float32)
    check("xsa", relative_error(rest, reference.exclude_self(y_4, v_4)), budget)
    want = torch.autograd.grad(rest.flatten(0, 1).flatten(1) @ w.t(), leaves, go)
    dy, dv, row_sums = reference.exclude_self_gradient(*arguments)
    budget = rounding_budget(64 * size, F64)
    check("dy", relative_error(dy, want[0]), budget)
    check("dv", relative_error(dv, want[1]), budget)
    sums = (y * dy).view(windows, window, h, size).sum(-1).transpose(1, 2)
    check("row sums", relative_error(row_sums[..., :window], sums), budget)
    assert row_sums.shape == (windows, h, 7)
    assert (row_sums[..., window:] == 0).all()


# What the operator says of itself, and what it refuses.


def test_default_plan_names_a_variant() -> None:
    """There is a default and another to compare with; a tile of each holds the heads of a group."""
    assert EXCLUDE_SELF_PLAN.variant in NAMES
    assert len(NAMES) >= 2
    for name in NAMES:
        variant = VARIANTS[name]
        assert variant.tile[1] == MEMBERS * HEAD_SIZE
        assert variant.epilogue[1] == HEAD_SIZE


@pytest.mark.parametrize(("window", "padded"), [(128, 128), (5, 128)])
def test_operator_has_true_shapes_for_the_compiler(window: int, padded: int) -> None:
    """Its fake gives shapes, types and layout."""
    arguments = _typed(_inputs(2, window, 24, (4, 2), padded, "cpu"), BF16)
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    found = exclude_self_cutlass.exclude_self_gradient(*meta)
    for got, want in zip(found, reference.exclude_self_gradient(*arguments), strict=True):
        assert (got.shape, got.dtype, got.is_contiguous()) == (want.shape, want.dtype, True)


def _changed(**changes: Any) -> list[Any]:
    """Fitting arguments, but for their place, with some of them changed."""
    names = ("go", "w", "y", "heads", "query_heads", "window", "padded")
    values = _typed(_inputs(2, 4, 8, (2, 1), 128, "cpu"), BF16)
    return list((dict(zip(names, values, strict=True)) | changes).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w": torch.zeros(8, 64, dtype=BF16)}, r"w \[D, N\] \(8, 64\) must be \(8, 128\)"),
        ({"y": torch.zeros(8, 64, dtype=BF16)}, r"y \[M, N\].*must be \(8, 128\)"),
        ({"heads": torch.zeros(8, 192, dtype=BF16)}, r"heads \[M, W\].*must be \(8, 256\)"),
        ({"query_heads": 3}, "3 query heads do not make groups of 2"),
        ({"query_heads": 0}, "0 query heads"),
        ({"window": 3}, "8 rows are not whole windows of 3"),
        ({"window": 0}, "not whole windows of 0"),
        ({"padded": 3}, "3 padded positions are fewer than the 4"),
    ],
)
def test_bad_arguments_are_named(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel would read or write past is refused by name."""
    with pytest.raises(ValueError, match="go must be on a CUDA device"):
        exclude_self_cutlass.check_exclude_self_gradient(*_changed())
    monkeypatch.setattr(exclude_self_cutlass.checks, "check_matrices", lambda **_: None)
    exclude_self_cutlass.check_exclude_self_gradient(*_changed())
    with pytest.raises(ValueError, match=words):
        exclude_self_cutlass.check_exclude_self_gradient(*_changed(**changes))


def test_plan_of_another_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan must name a variant of this operator."""
    monkeypatch.setattr(exclude_self_cutlass, "check_exclude_self_gradient", lambda *_: None)
    other = next(name for name, variant in VARIANTS.items() if variant.op == "up")
    with pytest.raises(ValueError, match=rf"{other}.*is not one of {NAMES[0]}"):
        exclude_self_cutlass.run_exclude_self_gradient(*_changed(), plan=Plan(other))


# With the compiler: the machine code.


@pytest.mark.nvcc
@pytest.mark.timeout(900)
def test_machine_code_spills_nothing() -> None:
    """The default variant is warp-group products and bulk copies, without spills or warnings."""
    name = EXCLUDE_SELF_PLAN.variant
    code = hopper_code.read(hopper_code.cutlass_library(name))
    rows, columns, depth = VARIANTS[name].tile
    assert code.opcodes["HGMMA"] >= (rows // 64) * (columns / 256) * (depth // 16)
    assert code.opcodes["UTMALDG"] >= 4
    assert code.opcodes["UTMASTG"] >= 1
    assert code.opcodes["LDL"] == code.opcodes["STL"] == 0
    log = hopper_code.compiler_log(name)
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log) == [("0", "0")]


# On a Hopper GPU.

SHAPES = [
    (1, 1, 512, (8, 4), 128),
    (1, 127, 64, (2, 1), 128),
    (3, 43, 72, (4, 2), 128),
    (5, 200, 512, (8, 4), 256),
    (9, 2048, 520, (8, 4), 2048),
]
"""B, T, D, heads and L: ragged tiles along M and K, windows of few and of many positions."""


@pytest.mark.hopper
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("windows", "window", "d", "heads", "padded"), SHAPES)
def test_gradients_meet_the_budget(
    name: str, windows: int, window: int, d: int, heads: tuple[int, int], padded: int
) -> None:
    """Every head, and every 1024 rows, lies within budget of float64; zero values give zeros."""
    arguments = _inputs(windows, window, d, heads, padded, "cuda")
    exact = reference.exclude_self_gradient(*arguments)
    plain = reference.exclude_self_gradient(*_typed(arguments, BF16))
    got = exclude_self_cutlass.run_exclude_self_gradient(*_typed(arguments, BF16), plan=Plan(name))
    for result, a, p, e in zip(("dy", "dv"), got, plain, exact, strict=False):
        heads_of = zip(*(t.split(HEAD_SIZE, dim=1) for t in (a, p, e)), strict=True)
        rows_of = zip(*(t.split(1024) for t in (a, p, e)), strict=True)
        for part, plain_part, exact_part in (*heads_of, *rows_of):
            budget = kernel_budget(plain_part, exact_part, BF16)
            check(result, relative_error(part, exact_part), budget)
    # The sums are of dy as it was rounded, and belong to it.
    own = (arguments[2] * got[0].double()).unflatten(1, (heads[0], -1)).sum(-1)
    own = own.unflatten(0, (windows, window)).transpose(1, 2)
    found = got[2][..., :window]
    check("row sums", relative_error(found, own), rounding_budget(8 * HEAD_SIZE, torch.float32))
    assert (got[2][..., window:] == 0).all()
    assert got[1].isfinite().all()


@pytest.mark.hopper
@pytest.mark.parametrize("name", NAMES)
def test_order_of_tiles_changes_no_bit(name: str) -> None:
    """Along M or N, in bands of any width, the result is the same."""
    arguments = _typed(_inputs(9, 2048, 520, (8, 4), 2048, "cuda"), BF16)
    run = exclude_self_cutlass.run_exclude_self_gradient
    first = run(*arguments, plan=Plan(name))
    for along_m in (False, True):
        for swizzle in (1, 2, 8):
            other = run(*arguments, plan=Plan(name, along_m, swizzle))
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.hopper
@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_the_results_is_written(name: str) -> None:
    """Ragged tiles, and those past the last head, write nothing but rows, columns and sums."""
    windows, window, d, heads, padded = 3, 43, 72, (6, 3), 43
    arguments = _typed(_inputs(windows, window, d, heads, padded, "cuda"), BF16)
    want = exclude_self_cutlass.run_exclude_self_gradient(*arguments, plan=Plan(name))
    buffers = [torch.full((3 * t.numel(),), 7, device="cuda", dtype=t.dtype) for t in want]
    pairs = zip(buffers, want, strict=True)
    results = [b[t.numel() : 2 * t.numel()].view(t.shape) for b, t in pairs]
    sizes = (windows * window, d, window, heads[0], padded)
    cutlass.launch(Plan(name, max_swizzle=8), (*arguments[:4], *results), sizes)
    for buffer, result, t in zip(buffers, results, want, strict=True):
        assert torch.equal(result, t)
        assert (buffer[: t.numel()] == 7).all()
        assert (buffer[2 * t.numel() :] == 7).all()


@pytest.mark.hopper
def test_operator_runs_on_the_current_stream() -> None:
    """On a side stream the kernel waits for that stream's earlier work."""
    go, *rest = _typed(_inputs(3, 100, 64, (8, 4), 128, "cuda"), BF16)
    want = exclude_self_cutlass.exclude_self_gradient(go, *rest)
    late = torch.zeros_like(go)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s, so that another stream would be first
        late.copy_(go)
        got = exclude_self_cutlass.exclude_self_gradient(late, *rest)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
