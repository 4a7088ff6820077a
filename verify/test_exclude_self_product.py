"""Claims about the product that has XSA's backward pass in its epilogue.

Letters: M rows (tokens), D model width, B windows, T positions, L padded positions, H query heads,
G key/value heads, K head size, N = H K, V = G K, W joint width.
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

Arguments = tuple[Tensor, ...]
"""Those of `exclude_self_gradient`."""

SHORT = 2.0**-44
"""Factor on values that makes heads of them shorter than reference.SMALLEST_NORM."""
SCALES = pytest.mark.parametrize("scale", [1.0, SHORT], ids=["long", "short"])


def _inputs(
    windows: int, window: int, d: int, heads: tuple[int, int], padded: int, device: str,
    size: int = HEAD_SIZE, scale: float = 1.0,
) -> Arguments:  # fmt: skip
    """Random arguments as the kernel rounds them, in float64.

    Values are multiplied by `scale`; of every third row the first is zero. Of `own`, positions past
    the last are NaN.
    """
    g = torch.Generator(device).manual_seed(windows * window + d)
    (h, kv), m = heads, windows * window

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(BF16).to(F64)

    joint = normal(m, (h + 2 * kv) * size)
    v_MV = joint[:, -kv * size :].mul_(scale)
    v_MV[::3, :size] = 0
    rest, own = _parts(normal(m, h * size), v_MV, window, (h, kv))
    own = torch.nn.functional.pad(own.float().to(F64), (0, padded - window), value=torch.nan)
    w = (normal(d, h * size) * d**-0.5).to(BF16).to(F64)
    return normal(m, d), w, rest.to(BF16).to(F64), own, joint


def _parts(
    y_MN: Tensor, v_MV: Tensor, window: int, heads: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`exclude_self_parts` of rows: rest [M, N] and own [B, H, T]."""
    parts = zip((y_MN, v_MV), heads, strict=True)
    y_4, v_4 = (t.unflatten(0, (-1, window)).unflatten(2, (n, -1)) for t, n in parts)
    rest, own = reference.exclude_self_parts(y_4, v_4)
    return rest.flatten(0, 1).flatten(1), own


def _rounded(arguments: Arguments) -> Arguments:
    """As the kernel takes them: `own` in float32, matrices in bfloat16."""
    return tuple(a.to(torch.float32 if a.ndim == 3 else BF16) for a in arguments)


# The meaning.


@SCALES
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_formula_is_the_derivative_of_xsa_and_projection(
    heads: tuple[int, int], scale: float
) -> None:
    """Gradients at attention's output and at the values are autograd's, whatever the groups.

    The values' too where they are shorter than what their length counts as.
    """
    (h, kv), size, windows, window = heads, 8, 2, 5
    go, w, _, _, joint = _inputs(windows, window, 16, heads, 7, "cpu", size, scale)
    y = joint[:, : h * size].clone()  # nothing reads the queries
    leaves = [t.detach().requires_grad_() for t in (y, joint[:, -kv * size :])]
    y_4, v_4 = (t.view(windows, window, n, size) for t, n in zip(leaves, heads, strict=True))
    u = torch.nn.functional.normalize(v_4, dim=-1, eps=reference.SMALLEST_NORM)
    assert (u.norm(dim=-1) < 0.99).all() == (scale == SHORT)
    u = u.repeat_interleave(h // kv, dim=2)
    attended = (y_4 - (y_4 * u).sum(-1, keepdim=True) * u).flatten(0, 1).flatten(1)
    rest, own = _parts(leaves[0], leaves[1], window, heads)
    budget = rounding_budget(64 * size, F64)
    check("xsa", relative_error(rest, attended), budget)
    v_BTHK = v_4.repeat_interleave(h // kv, dim=2)
    taken = own.transpose(1, 2).unsqueeze(-1) * v_BTHK
    check("own part", relative_error(taken, y_4 - rest.view_as(y_4)), budget)
    want = torch.autograd.grad(attended @ w.t(), leaves, go)
    padded_own = torch.nn.functional.pad(own, (0, 2), value=torch.nan)
    with torch.no_grad():
        dy, dv, row_sums = reference.exclude_self_gradient(go, w, rest, padded_own, joint)
    check("dy", relative_error(dy, want[0]), budget)
    check("dv", relative_error(dv, want[1]), budget)
    sums = (y * dy).view(windows, window, h, size).sum(-1).transpose(1, 2)
    check("row sums", relative_error(row_sums[..., :window], sums), budget)
    assert row_sums.shape == (windows, h, 7)
    assert (row_sums[..., window:] == 0).all()


def test_parts_of_low_precision_are_computed_in_float32() -> None:
    """Of bfloat16 the result is rounded once and what it takes not at all."""
    g = torch.Generator().manual_seed(0)
    y, v = (torch.randn(2, 5, n, 8, generator=g).to(BF16) for n in (4, 2))
    rest, own = reference.exclude_self_parts(y, v)
    exact_rest, exact_own = reference.exclude_self_parts(y.to(F64), v.to(F64))
    assert torch.equal(rest, reference.exclude_self(y, v))
    assert (rest.dtype, own.dtype, exact_own.dtype) == (BF16, torch.float32, F64)
    assert own.is_contiguous()
    check("rest", relative_error(rest, exact_rest), rounding_budget(2, BF16))
    check("own", relative_error(own, exact_own), rounding_budget(32, torch.float32))


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
    arguments = _rounded(_inputs(2, window, 24, (4, 2), padded, "cpu"))
    meta = [t.to("meta") for t in arguments]
    found = exclude_self_cutlass.exclude_self_gradient(*meta)
    for got, want in zip(found, reference.exclude_self_gradient(*arguments), strict=True):
        assert (got.shape, got.dtype, got.is_contiguous()) == (want.shape, want.dtype, True)


def _changed(**changes: Any) -> list[Any]:
    """Fitting arguments, but for their place, with some of them changed."""
    names = ("go", "w", "rest", "own", "heads")
    values = _rounded(_inputs(2, 4, 8, (2, 1), 128, "cpu"))
    return list((dict(zip(names, values, strict=True)) | changes).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w": torch.zeros(8, 64, dtype=BF16)}, r"w \[D, N\] \(8, 64\) must be \(8, 128\)"),
        ({"rest": torch.zeros(8, 64, dtype=BF16)}, r"rest \[M, N\].*must be \(8, 128\)"),
        ({"own": torch.zeros(2, 2, 3)}, "8 rows are not 2 windows of at most 3"),
        ({"own": torch.zeros(3, 2, 128)}, "8 rows are not 3 windows"),
        ({"own": torch.zeros(0, 2, 128)}, "8 rows are not 0 windows"),
        ({"own": torch.zeros(2, 3, 128)}, "3 query heads do not make groups of 2"),
        ({"own": torch.zeros(2, 0, 128)}, "0 query heads"),
        ({"own": torch.zeros(2, 256)}, r"own must be float32 \[B, H, L\]"),
        ({"own": torch.zeros(2, 2, 128, dtype=F64)}, "own .*not torch.float64"),
        ({"own": torch.zeros(2, 128, 2).mT}, "own must be contiguous"),
        ({"own": torch.zeros(2, 2, 128, device="meta")}, "own is on meta, its rows on cpu"),
        ({"own": torch.zeros(513)[1:].view(2, 2, 128)}, "own must begin at a multiple of 16 bytes"),
        ({"heads": torch.zeros(8, 192, dtype=BF16)}, r"heads \[M, W\].*must be \(8, 256\)"),
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
@SCALES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("windows", "window", "d", "heads", "padded"), SHAPES)
def test_gradients_meet_the_budget(
    name: str, windows: int, window: int, d: int, heads: tuple[int, int], padded: int, scale: float
) -> None:
    """Every head, and every 1024 rows, lies within budget of float64; zero values give zeros."""
    arguments = _inputs(windows, window, d, heads, padded, "cuda", scale=scale)
    exact = reference.exclude_self_gradient(*arguments)
    plain = reference.exclude_self_gradient(*_rounded(arguments))
    got = exclude_self_cutlass.run_exclude_self_gradient(*_rounded(arguments), plan=Plan(name))
    for result, a, p, e in zip(("dy", "dv"), got, plain, exact, strict=False):
        heads_of = zip(*(t.split(HEAD_SIZE, dim=1) for t in (a, p, e)), strict=True)
        rows_of = zip(*(t.split(1024) for t in (a, p, e)), strict=True)
        for part, plain_part, exact_part in (*heads_of, *rows_of):
            budget = kernel_budget(plain_part, exact_part, BF16)
            check(result, relative_error(part, exact_part), budget)
    # The sums are of dy as it was rounded, and belong to it.
    _, _, rest, own, joint = arguments
    own_MH = own[..., :window].transpose(1, 2).flatten(0, 1)
    v_MGK = joint[:, -heads[1] * HEAD_SIZE :].unflatten(1, (heads[1], -1))
    taken = own_MH.unsqueeze(-1) * v_MGK.repeat_interleave(MEMBERS, dim=1)
    y = rest.view_as(taken) + taken
    sums = (y * got[0].double().view_as(y)).sum(-1)
    sums = sums.unflatten(0, (windows, window)).transpose(1, 2)
    found = got[2][..., :window]
    check("row sums", relative_error(found, sums), rounding_budget(8 * HEAD_SIZE, torch.float32))
    assert (got[2][..., window:] == 0).all()
    assert got[1].isfinite().all()


@pytest.mark.hopper
@pytest.mark.parametrize("name", NAMES)
def test_order_of_tiles_changes_no_bit(name: str) -> None:
    """Along M or N, in bands of any width, the result is the same."""
    arguments = _rounded(_inputs(9, 2048, 520, (8, 4), 2048, "cuda"))
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
    arguments = _rounded(_inputs(windows, window, d, heads, padded, "cuda"))
    want = exclude_self_cutlass.run_exclude_self_gradient(*arguments, plan=Plan(name))
    buffers = [torch.full((3 * t.numel(),), 7, device="cuda", dtype=t.dtype) for t in want]
    pairs = zip(buffers, want, strict=True)
    results = [b[t.numel() : 2 * t.numel()].view(t.shape) for b, t in pairs]
    sizes = (windows * window, d, window, heads[0], padded)
    cutlass.launch(Plan(name, max_swizzle=8), (*arguments, *results), sizes)
    for buffer, result, t in zip(buffers, results, want, strict=True):
        assert torch.equal(result, t)
        assert (buffer[: t.numel()] == 7).all()
        assert (buffer[2 * t.numel() :] == 7).all()


@pytest.mark.hopper
def test_operator_runs_on_the_current_stream() -> None:
    """On a side stream the kernel waits for that stream's earlier work."""
    go, *rest = _rounded(_inputs(3, 100, 64, (8, 4), 128, "cuda"))
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
