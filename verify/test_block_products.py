"""Claims about the four products of a block whose epilogues take over passes beside them.

Small whole numbers, and powers of two as factors, make most results exact in float32, so that
every element can be demanded to the bit; random numbers then meet the error budget.

Letters: M rows (tokens), D model width, F MLP width, K and N widths of a product's operands, P
tiles along the columns of a product.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import checks, cutlass, reference
from kernels.variants import (
    DPRE_SCALED_PLAN,
    LINEAR_ADD_PLAN,
    NORM_GRADIENT_PLAN,
    UP_SCALED_PLAN,
    VARIANTS,
    Plan,
)
from verify import hopper_code
from verify.tolerance import check, kernel_budget, relative_error, rounding_budget, unit_roundoff

BF16 = torch.bfloat16
F64 = torch.float64
DAMP = 0.6
PLANS = {
    "linear_add": LINEAR_ADD_PLAN,
    "up_scaled": UP_SCALED_PLAN,
    "dpre_scaled": DPRE_SCALED_PLAN,
    "norm_gradient": NORM_GRADIENT_PLAN,
}


def _names(op: str) -> list[str]:
    return [name for name, variant in VARIANTS.items() if variant.op == op]


ALL = [name for op in PLANS for name in _names(op)]


# The meaning.


def _half(ops: Any, x: Tensor, w_out: Tensor, h: Tensor, w_up: Tensor, w_down: Tensor, go: Tensor):
    """y = t + mlp(damp norm(t)) of t = h + x @ w_out^T, and gradients, by the four products.

    Args:
        ops: `kernels.reference` or `kernels.cutlass`.
        x, w_out, h, w_up, w_down: inputs; go: gradient at y.

    Returns:
        y, and the gradients at h (that is, at t), w_up and w_down.
    """
    t, squares = ops.linear_add(x, w_out, h)
    scale = DAMP * torch.rsqrt(squares.sum(1) / t.shape[1] + reference.EPS)
    post, signs = ops.up_scaled(t, w_up, scale)
    y, _ = ops.linear_add(post, w_down, t)
    dpre, along = ops.dpre_scaled(go, w_down, post, signs, scale)
    factor = along.sum(1) * (scale / DAMP).square() / t.shape[1]
    dt = ops.norm_gradient(dpre, w_up, go, t, factor)
    return y, dt, dpre.t() @ t, go.t() @ post


def _plain_half(
    x: Tensor, w_out: Tensor, h: Tensor, w_up: Tensor, w_down: Tensor, go: Tensor
) -> tuple[Tensor, ...]:
    """The same as its formula reads, differentiated by autograd."""
    h, w_up, w_down = (t.detach().requires_grad_() for t in (h, w_up, w_down))
    t = h + x @ w_out.t()
    y = t + reference.mlp(DAMP * reference.rms_norm(t), w_up, w_down)
    return y.detach(), *torch.autograd.grad(y, (h, w_up, w_down), go)


def _half_inputs(m: int, d: int, f: int, device: str) -> tuple[Tensor, ...]:
    """x, w_out, h, w_up, w_down and go, float64."""
    g = torch.Generator(device).manual_seed(m + d)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=F64, device=device)

    return (
        normal(m, d),
        normal(d, d, scale=d**-0.5),
        normal(m, d),
        normal(f, d, scale=d**-0.5),
        normal(d, f, scale=f**-0.5),
        normal(m, d),
    )


@pytest.mark.parametrize(("m", "d", "f"), [(1, 8, 8), (7, 16, 40), (33, 24, 16)])
def test_the_four_products_make_half_a_block(m: int, d: int, f: int) -> None:
    """In float64 they give the half's value and autograd's gradients of its formula."""
    inputs = _half_inputs(m, d, f, "cpu")
    budget = rounding_budget(64 * (d + f), F64)
    got, want = _half(reference, *inputs), _plain_half(*inputs)
    for name, a, b in zip(("y", "dt", "dw_up", "dw_down"), got, want, strict=True):
        check(name, relative_error(a, b), budget)


def test_sums_along_rows_are_the_factors_gradient() -> None:
    """The second output of `dpre_scaled`, divided by scale, is autograd's gradient of scale."""
    x, _, _, w_up, w_down, go = _half_inputs(5, 16, 24, "cpu")
    scale = torch.linspace(0.5, 2.0, 5, dtype=F64)
    moving = scale.clone().requires_grad_()
    post, signs = reference.up_scaled(x, w_up, moving)
    (want,) = torch.autograd.grad(post @ w_down.t(), moving, go)
    _, along = reference.dpre_scaled(go, w_down, post.detach(), signs, scale)
    check("dscale", relative_error(along[:, 0] / scale, want), rounding_budget(512, F64))


def test_reference_keeps_the_type_of_its_matrices() -> None:
    """In bfloat16 with float32 factors, matrices stay bfloat16 and sums are float32."""
    x, w_out, h, w_up, w_down, go = (t.to(BF16) for t in _half_inputs(3, 8, 16, "cpu"))
    scale = torch.ones(3)
    t, squares = reference.linear_add(x, w_out, h)
    post, signs = reference.up_scaled(t, w_up, scale)
    dpre, along = reference.dpre_scaled(go, w_down, post, signs, scale)
    dt = reference.norm_gradient(dpre, w_up, go, t, scale)
    assert {tensor.dtype for tensor in (t, post, dpre, dt)} == {BF16}
    assert squares.dtype == along.dtype == torch.float32
    assert squares.shape == along.shape == (3, 1)


# Plans, layouts and what is refused.


@pytest.mark.parametrize("op", list(PLANS))
def test_plans_and_variants_of_an_operator(op: str) -> None:
    """The default plan names a variant of its operator, and there is another to compare with."""
    assert PLANS[op].variant in _names(op)
    assert len(_names(op)) >= 2


@pytest.mark.parametrize("name", _names("up_scaled") + _names("dpre_scaled"))
def test_signs_fill_one_vector_a_thread(name: str) -> None:
    """A thread has 32 values in each of a tile's 4 epilogue pieces: 16 bytes of signs."""
    variant = VARIANTS[name]
    rows, columns, _ = variant.tile
    piece = variant.epilogue[0] * variant.epilogue[1]
    assert piece == 32 * variant.threads
    assert rows * columns == 4 * piece
    for m, f in ((1, 8), (128, 128), (129, 136), (1000, 1792)):
        shape = cutlass.signs_shape(m, f, Plan(name))
        assert shape == (math.ceil(m / rows), math.ceil(f / columns), variant.threads, 4)


def test_signs_are_read_in_the_layout_they_are_stored_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of variants agrees on it; one with another tile, piece or schedule is refused."""
    reads, stores = VARIANTS[DPRE_SCALED_PLAN.variant], VARIANTS[UP_SCALED_PLAN.variant]
    for name in _names("dpre_scaled"):
        for other in _names("up_scaled"):
            assert VARIANTS[name].signs_layout == VARIANTS[other].signs_layout
    unread = torch.empty(1, 1)
    for changed in (
        replace(stores, tile=(128, 256, 64)),
        replace(stores, epilogue=(64, 32)),
        replace(stores, schedule="Cooperative"),
    ):
        known = {reads.name: reads, changed.name: changed}
        monkeypatch.setattr(cutlass, "VARIANTS", known)
        plans = Plan(reads.name), Plan(changed.name)
        with pytest.raises(ValueError, match=rf"{reads.name} cannot read.*{changed.name}"):
            cutlass.run_dpre_scaled(unread, unread, unread, unread, unread, *plans)


@pytest.mark.parametrize("op", list(PLANS))
def test_plan_of_another_operator_is_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan must name a variant of the operator it is given to."""
    for name in PLANS:
        monkeypatch.setattr(checks, f"check_{name}", lambda *_: None)
    t = torch.empty(8, 8)
    runs: dict[str, Callable[[Plan], object]] = {
        "linear_add": lambda p: cutlass.run_linear_add(t, t, t, p),
        "up_scaled": lambda p: cutlass.run_up_scaled(t, t, t, p),
        "dpre_scaled": lambda p: cutlass.run_dpre_scaled(t, t, t, t, t, p, UP_SCALED_PLAN),
        "norm_gradient": lambda p: cutlass.run_norm_gradient(t, t, t, t, t, p),
    }
    for plan in (Plan("absent"), *(other for name, other in PLANS.items() if name != op)):
        with pytest.raises(ValueError, match=rf"{plan.variant}.*is not one of {_names(op)[0]}"):
            runs[op](plan)


@pytest.mark.parametrize(("m", "d", "f"), [(5, 8, 24), (128, 512, 1792), (1000, 72, 136)])
def test_operators_have_true_shapes_for_the_compiler(m: int, d: int, f: int) -> None:
    """Each operator's fake gives shapes, types and layout; sums have a column per tile."""
    with torch.device("meta"):
        x, h, go, t = (torch.empty(m, d, dtype=BF16) for _ in range(4))
        w_out, w_up, w_down = (torch.empty(s, dtype=BF16) for s in ((d, d), (f, d), (d, f)))
        scale = torch.empty(m)
        out, squares = cutlass.linear_add(x, w_out, h)
        post, signs = cutlass.up_scaled(x, w_up, scale)
        dpre, along = cutlass.dpre_scaled(go, w_down, post, signs, scale)
        dt = cutlass.norm_gradient(dpre, w_up, go, t, scale)
    for tensor, shape in ((out, (m, d)), (post, (m, f)), (dpre, (m, f)), (dt, (m, d))):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, BF16)
    for sums, width, plan in ((squares, d, LINEAR_ADD_PLAN), (along, f, DPRE_SCALED_PLAN)):
        tiles = math.ceil(width / VARIANTS[plan.variant].tile[1])
        assert (tuple(sums.shape), sums.dtype) == ((m, tiles), torch.float32)
    assert (tuple(signs.shape), signs.dtype) == (
        cutlass.signs_shape(m, f, UP_SCALED_PLAN),
        torch.int32,
    )
    assert all(tensor.is_contiguous() for tensor in (out, squares, post, signs, dpre, along, dt))


def _on_gpu(*shape: int, dtype: torch.dtype = BF16, **changes: object) -> Any:
    """Stand-in for a CUDA tensor, so that argument checks run without a GPU."""
    values = {"pointer": 64, "contiguous": True, "device": "cuda:0"} | changes
    return SimpleNamespace(
        shape=torch.Size(shape),
        ndim=len(shape),
        dtype=dtype,
        is_cuda=True,
        device=values["device"],
        numel=lambda: math.prod(shape),
        is_contiguous=lambda: values["contiguous"],
        data_ptr=lambda: values["pointer"],
    )


def _vector(*shape: int, dtype: torch.dtype = torch.float32, **changes: object) -> Any:
    return _on_gpu(*shape, dtype=dtype, **changes)


X, W_UP, W_DOWN, POST, SCALE = (
    _on_gpu(4, 8),
    _on_gpu(16, 8),
    _on_gpu(8, 16),
    _on_gpu(4, 16),
    _vector(4),
)
SIGNS_SHAPE = (1, 1, 128, 4)
SIGNS = _vector(*SIGNS_SHAPE, dtype=torch.int32)


def test_fitting_arguments_pass() -> None:
    """Arguments that fit together are accepted by each check."""
    checks.check_linear_add(X, W_UP, POST)
    checks.check_up_scaled(X, W_UP, SCALE)
    checks.check_dpre_scaled(X, W_DOWN, POST, SIGNS, SCALE, SIGNS_SHAPE)
    checks.check_norm_gradient(POST, W_UP, X, X, SCALE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X, _on_gpu(16, 16), POST), r"w \[N, K\].*does not fit"),
        ((X, W_UP, X), r"residual \[M, N\] \(4, 8\) must be \(4, 16\)"),
        ((X, W_UP, _on_gpu(4, 16, dtype=torch.float32)), "residual must be bfloat16"),
        ((X, W_UP, _on_gpu(4, 16, contiguous=False)), "residual must be contiguous"),
    ],
)
def test_bad_arguments_of_linear_add_are_named(arguments: Any, words: str) -> None:
    """Type, shape and layout of each operand are checked by name."""
    with pytest.raises(ValueError, match=words):
        checks.check_linear_add(*arguments)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (_vector(5), r"scale must be float32 \(4,\), one a row, not torch.float32 \(5,\)"),
        (_vector(4, 1), r"scale must be float32 \(4,\)"),
        (_vector(4, dtype=BF16), "scale must be float32"),
        (_vector(4, device="cuda:1"), "scale is on cuda:1, its rows on cuda:0"),
        (_vector(4, contiguous=False), "scale must be contiguous"),
        (_vector(4, pointer=8), "scale must begin at a multiple of 16 bytes"),
    ],
)
def test_bad_factors_are_named(scale: Any, words: str) -> None:
    """Every product demands one contiguous float32 a row, on the rows' device."""
    with pytest.raises(ValueError, match=words):
        checks.check_up_scaled(X, W_UP, scale)
    with pytest.raises(ValueError, match=words):
        checks.check_dpre_scaled(X, W_DOWN, POST, SIGNS, scale, SIGNS_SHAPE)
    with pytest.raises(ValueError, match=words.replace("scale", "factor")):
        checks.check_norm_gradient(POST, W_UP, X, X, scale)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w_down": _on_gpu(16, 16)}, r"w_down \[D, F\].*does not fit go"),
        ({"post": X}, r"post \[M, F\].*must be \(4, 16\)"),
        ({"signs": _vector(*SIGNS_SHAPE)}, "signs must be int32.*not torch.float32"),
        ({"signs": _vector(1, 1, 256, 4, dtype=torch.int32)}, r"signs must be.*\(1, 1, 256, 4\)"),
        (
            {"signs": _vector(*SIGNS_SHAPE, dtype=torch.int32, pointer=8)},
            "signs must be contiguous",
        ),
        (
            {"signs": _vector(*SIGNS_SHAPE, dtype=torch.int32, device="cuda:1")},
            "signs must be contiguous, on cuda:0",
        ),
    ],
)
def test_bad_arguments_of_dpre_scaled_are_named(changes: dict[str, Any], words: str) -> None:
    """Shapes of the matrices, and type, shape and place of the signs, are checked by name."""
    given = {"w_down": W_DOWN, "post": POST, "signs": SIGNS} | changes
    with pytest.raises(ValueError, match=words):
        checks.check_dpre_scaled(
            X, given["w_down"], given["post"], given["signs"], SCALE, SIGNS_SHAPE
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((POST, W_DOWN, X, X), r"w_up \[F, D\].*does not fit dpre"),
        ((POST, W_UP, POST, X), r"go \[M, D\] \(4, 16\) must be \(4, 8\)"),
        ((POST, W_UP, X, POST), r"t \[M, D\] \(4, 16\) must be \(4, 8\)"),
    ],
)
def test_bad_arguments_of_norm_gradient_are_named(arguments: Any, words: str) -> None:
    """Shapes that do not fit are named."""
    with pytest.raises(ValueError, match=words):
        checks.check_norm_gradient(*arguments, factor_M=SCALE)


# With the compiler: the machine code.


@pytest.mark.nvcc
@pytest.mark.timeout(900)
@pytest.mark.parametrize("op", list(PLANS))
def test_machine_code_spills_nothing(op: str) -> None:
    """Each default variant is warp-group products and bulk copies, without spills or warnings."""
    name = PLANS[op].variant
    code = hopper_code.read(hopper_code.cutlass_library(name))
    rows, columns, depth = VARIANTS[name].tile
    assert code.opcodes["HGMMA"] >= (rows // 64) * (columns / 256) * (depth // 16)
    assert code.opcodes["UTMALDG"] >= {"up_scaled": 2, "norm_gradient": 4}.get(op, 3)
    assert code.opcodes["UTMASTG"] >= 1
    assert code.opcodes["USETMAXREG"] == 2
    assert code.opcodes["LDL"] == code.opcodes["STL"] == 0
    log = hopper_code.compiler_log(name)
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log) == [("0", "0")]
    assert "C75" not in log


# On a Hopper GPU.

SHAPES = [(1, 512, 1792), (127, 64, 192), (129, 72, 136), (1000, 512, 1792), (1000, 8, 264)]
"""M, D, F: one row, one row less and more than a tile, the record's widths, ragged widths."""
MANY_TILES = (20_001, 520, 1800)
"""Several tiles for every multiprocessor, all three sizes ragged."""


def _whole(g: torch.Generator, *shape: int, density: float = 1.0) -> Tensor:
    """-1, 0 or 1, and 0 but for a share of about `density`; bfloat16."""
    signs = torch.randint(-1, 2, shape, generator=g, device="cuda")
    kept = torch.rand(shape, generator=g, device="cuda") < density
    return (signs * kept).to(BF16)


def _powers(g: torch.Generator, m: int) -> Tensor:
    """A power of two from 1/4 to 4 for each row, float32."""
    return 2.0 ** torch.randint(-2, 3, (m,), generator=g, device="cuda").float()


def _tile_sums(terms: Tensor, name: str) -> Tensor:
    """Row sums over each tile's columns, [M, P], float32 from float64."""
    tiles = terms.split(VARIANTS[name].tile[1], dim=1)
    return torch.stack([tile.sum(1) for tile in tiles], dim=1).float()


def _same(got: Tensor, want: Tensor) -> None:
    """Equal to the bit, but for the sign of zero."""
    assert torch.equal(got, want.to(got.dtype))


def _up_scaled(x: Tensor, w_up: Tensor, scale: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return cutlass.run_up_scaled(x, w_up, scale, Plan(name))


@pytest.mark.hopper
@pytest.mark.parametrize("name", _names("linear_add"))
@pytest.mark.parametrize(("m", "d", "f"), SHAPES)
def test_linear_add_is_exact_on_whole_numbers(name: str, m: int, d: int, f: int) -> None:
    """Every element of the sum and every partial sum of squares, both widths of operands."""
    g = torch.Generator("cuda").manual_seed(m)
    for k, n in ((d, d), (f, d), (d, f)):
        x, w, residual = _whole(g, m, k), _whole(g, n, k), 4 * _whole(g, m, n)
        kept = residual.clone()
        out, squares = cutlass.run_linear_add(x, w, residual, Plan(name))
        exact, _ = reference.linear_add(x.double(), w.double(), residual.double())
        _same(out, exact)
        _same(squares, _tile_sums(exact.square(), name))
        assert torch.equal(residual, kept)


@pytest.mark.hopper
@pytest.mark.parametrize("name", _names("up_scaled"))
@pytest.mark.parametrize(("m", "d", "f"), SHAPES)
def test_up_scaled_is_exact_on_whole_numbers(name: str, m: int, d: int, f: int) -> None:
    """Every element of post; a third of them zero."""
    g = torch.Generator("cuda").manual_seed(m)
    x, w_up, scale = _whole(g, m, d, density=8 / d), _whole(g, f, d), _powers(g, m)
    post, _ = _up_scaled(x, w_up, scale, name)
    exact, _ = reference.up_scaled(x.double(), w_up.double(), scale.double())
    assert (exact == 0).any()
    _same(post, exact)


@pytest.mark.hopper
@pytest.mark.parametrize("name", _names("dpre_scaled"))
@pytest.mark.parametrize("stores", _names("up_scaled"))
@pytest.mark.parametrize(("m", "d", "f"), SHAPES)
def test_signs_come_back_where_they_belong(name: str, stores: str, m: int, d: int, f: int) -> None:
    """Every element of dpre has its sign, slope and size, and every partial sum is exact."""
    g = torch.Generator("cuda").manual_seed(m)
    x, w_up, scale = _whole(g, m, d, density=8 / d), _whole(g, f, d), _powers(g, m)
    go, w_down = _whole(g, m, d), _whole(g, d, f)
    post, signs = _up_scaled(x, w_up, scale, stores)
    dpre, along = cutlass.run_dpre_scaled(go, w_down, post, signs, scale, Plan(name), Plan(stores))
    positive = x.double() @ w_up.double().t() > 0
    exact, _ = reference.dpre_scaled(
        go.double(), w_down.double(), post.double(), positive, scale.double()
    )
    # The root is an approximation, good to 2 units of float32; the product is rounded once.
    allowed = 2 * unit_roundoff(BF16) * exact.abs()
    assert ((dpre.double() - exact).abs() <= allowed).all()
    terms = 2 * (go.double() @ w_down.double()) * post.double()
    _same(along, _tile_sums(terms, name))


@pytest.mark.hopper
@pytest.mark.parametrize("name", _names("norm_gradient"))
@pytest.mark.parametrize(("m", "d", "f"), SHAPES)
def test_norm_gradient_is_exact_on_whole_numbers(name: str, m: int, d: int, f: int) -> None:
    """Every element of dt."""
    g = torch.Generator("cuda").manual_seed(m)
    dpre, w_up, factor = _whole(g, m, f), _whole(g, f, d), _powers(g, m)
    go, t = 4 * _whole(g, m, d), 2 * _whole(g, m, d)
    dt = cutlass.run_norm_gradient(dpre, w_up, go, t, factor, Plan(name))
    exact = reference.norm_gradient(*(a.double() for a in (dpre, w_up, go, t, factor)))
    _same(dt, exact)


def _random_inputs(m: int, d: int, f: int) -> dict[str, tuple[Tensor, ...]]:
    """Arguments of each operator but for signs, random bfloat16 with float32 factors."""
    x, w_out, h, w_up, w_down, go = (t.to(BF16) for t in _half_inputs(m, d, f, "cuda"))
    g = torch.Generator("cuda").manual_seed(1)
    scale = torch.rand(m, generator=g, device="cuda") + 0.5
    post, signs = reference.up_scaled(x, w_up, scale)
    dpre, _ = reference.dpre_scaled(go, w_down, post, signs, scale)
    return {
        "linear_add": (x, w_out, h),
        "up_scaled": (x, w_up, scale),
        "dpre_scaled": (go, w_down, post, scale, x, w_up),
        "norm_gradient": (dpre, w_up, go, h, scale),
    }


def _run(plan: Plan, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The kernel's outputs; signs for `dpre_scaled` come from the default `up_scaled`."""
    op = VARIANTS[plan.variant].op
    if op == "linear_add":
        return cutlass.run_linear_add(*arguments, plan=plan)
    if op == "up_scaled":
        return cutlass.run_up_scaled(*arguments, plan=plan)
    if op == "norm_gradient":
        return (cutlass.run_norm_gradient(*arguments, plan=plan),)
    go, w_down, _, scale, x, w_up = arguments
    post, signs = cutlass.run_up_scaled(x, w_up, scale, UP_SCALED_PLAN)
    return cutlass.run_dpre_scaled(go, w_down, post, signs, scale, plan, UP_SCALED_PLAN)


def _meaning(name: str, arguments: tuple[Tensor, ...], kind: torch.dtype) -> tuple[Tensor, ...]:
    """Plain outputs in `kind`, sums along rows whole; the signs of `up_scaled` are left out."""
    op = VARIANTS[name].op
    arguments = tuple(a if a.dtype == torch.float32 else a.to(kind) for a in arguments)
    if op == "linear_add":
        return reference.linear_add(*arguments)
    if op == "up_scaled":
        return (reference.up_scaled(*arguments)[0],)
    if op == "norm_gradient":
        return (reference.norm_gradient(*arguments),)
    go, w_down, _, scale, x, w_up = arguments
    post, signs = reference.up_scaled(x, w_up, scale)
    return reference.dpre_scaled(go, w_down, post, signs, scale)


def _outputs(name: str, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The kernel's outputs as `_meaning` has them."""
    op = VARIANTS[name].op
    if op == "up_scaled":
        return outputs[:1]
    return (outputs[0], *(sums.sum(1, keepdim=True) for sums in outputs[1:]))


@pytest.mark.hopper
@pytest.mark.parametrize("name", ALL)
def test_many_tiles_meet_the_budget_in_any_order(name: str) -> None:
    """With many tiles a multiprocessor all is within budget; tile order changes no bit."""
    arguments = _random_inputs(*MANY_TILES)[VARIANTS[name].op]
    first = _run(Plan(name), arguments)
    outputs = _outputs(name, first)
    plain, exact = (_meaning(name, arguments, kind) for kind in (BF16, F64))
    for got, p, e in zip(outputs, plain, exact, strict=True):
        check(name, relative_error(got, e), kernel_budget(p, e, BF16))
        for rows in torch.arange(got.shape[0], device="cuda").split(1024):
            worst = relative_error(got[rows], e[rows])
            check(f"{name}, 1024 rows", worst, kernel_budget(p[rows], e[rows], BF16))
    if VARIANTS[name].op == "linear_add":  # of the float32 values, before they are rounded
        _, d, _ = MANY_TILES
        budget = rounding_budget(4 * d, torch.float32)
        check(f"{name}, squares", relative_error(outputs[1], exact[1]), budget)
    for along_m in (False, True):
        for swizzle in (1, 2, 8):
            other = _run(Plan(name, along_m, swizzle), arguments)
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.hopper
@pytest.mark.parametrize("name", ALL)
def test_nothing_outside_the_results_is_written(name: str) -> None:
    """Ragged tiles write their rows, columns, sums and signs alone."""
    m, d, f = 129, 72, 136
    op = VARIANTS[name].op
    arguments = _random_inputs(m, d, f)[op]
    want = _run(Plan(name), arguments)
    operands, sizes = arguments, (m, f, d)
    if op == "dpre_scaled":
        go, w_down, _, scale, x, w_up = arguments
        operands = (go, w_down, *cutlass.run_up_scaled(x, w_up, scale, UP_SCALED_PLAN), scale)
    elif op == "linear_add":
        sizes = (m, d, d)
    elif op == "norm_gradient":
        sizes = (m, d, f)
    buffers = [torch.full((3 * w.numel(),), 7, device="cuda", dtype=w.dtype) for w in want]
    pairs = zip(buffers, want, strict=True)
    results = [b[w.numel() : 2 * w.numel()].view(w.shape) for b, w in pairs]
    cutlass.launch(Plan(name), (*operands, *results), sizes)
    for buffer, result, w in zip(buffers, results, want, strict=True):
        assert torch.equal(result, w)
        assert (buffer[: w.numel()] == 7).all()
        assert (buffer[2 * w.numel() :] == 7).all()


@pytest.mark.hopper
def test_edges_of_the_activation() -> None:
    """Signed zeros, denormals and large numbers keep sign and slope from forward to backward."""
    edges = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3.0, -3.0, 1e18, -1e18], device="cuda")
    x = torch.zeros(4, 8, device="cuda", dtype=BF16)
    x[:, 0] = torch.tensor([1.0, -1.0, 2.0, 0.5])
    w_up = torch.zeros(8, 8, device="cuda", dtype=BF16)
    w_up[:, 0] = edges
    scale = torch.ones(4, device="cuda")
    pre = x[:, :1].double() * w_up[:, 0].double()
    want = torch.where(pre > 0, pre, 0.25 * pre) * pre
    ones = torch.zeros(8, 8, device="cuda", dtype=BF16)
    ones[0] = 1
    go = torch.zeros(4, 8, device="cuda", dtype=BF16)
    go[:, 0] = 1  # so that go @ ones is 1 everywhere
    for stores in _names("up_scaled"):
        post, signs = _up_scaled(x, w_up, scale, stores)
        assert torch.equal(post, want.float().to(BF16))
        for name in _names("dpre_scaled"):
            dpre, along = cutlass.run_dpre_scaled(
                go, ones, post, signs, scale, Plan(name), Plan(stores)
            )
            slope = torch.where(pre > 0, 2 * post.double().sqrt(), -post.double().sqrt())
            assert ((dpre.double() - slope).abs() <= 2 * unit_roundoff(BF16) * slope.abs()).all()
            budget = rounding_budget(16, torch.float32)
            check("along", relative_error(along.sum(1), 2 * post.double().sum(1)), budget)


@pytest.mark.hopper
@pytest.mark.parametrize(("m", "d", "f"), [(1, 64, 192), (1000, 512, 1792), (4099, 512, 1792)])
def test_half_a_block_against_float64_autograd(m: int, d: int, f: int) -> None:
    """By the operators: value and gradients within budget of float64, and the same every time."""
    inputs = tuple(t.to(BF16) for t in _half_inputs(m, d, f, "cuda"))
    plain, exact = _plain_half(*inputs), _plain_half(*(t.double() for t in inputs))
    got = _half(cutlass, *inputs)
    for name, a, p, e in zip(("y", "dt", "dw_up", "dw_down"), got, plain, exact, strict=True):
        check(f"half a block, {name}", relative_error(a, e), kernel_budget(p, e, BF16))
    again = _half(cutlass, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.hopper
def test_operators_run_on_the_current_stream() -> None:
    """On a side stream the kernels wait for that stream's earlier work."""
    inputs = tuple(t.to(BF16) for t in _half_inputs(300, 64, 128, "cuda"))
    want = _half(cutlass, *inputs)
    late = tuple(torch.zeros_like(t) for t in inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s, so that another stream would be first
        for target, source in zip(late, inputs, strict=True):
            target.copy_(source)
        got = _half(cutlass, *late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
