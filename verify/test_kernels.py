"""Claims about the MLP kernels: every implementation computes the reference, gradients included."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import checks, cutlass, reference, triton_ops
from kernels.mlp import BACKENDS, load_backend, mlp
from kernels.variants import ACTIVATION_PLAN, DPRE_PLAN, UP_PLAN, VARIANTS, Plan
from verify.interpreter import run_interpreted
from verify.tolerance import check, kernel_budget, relative_error, rounding_budget

BF16 = torch.bfloat16
widths = st.integers(1, 20).map(lambda n: 8 * n)
rows = st.integers(1, 300)
magnitudes = st.sampled_from([1e-3, 1.0, 30.0])
EDGES = [0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 2.0**-133, 1.8e19, -1.8e19, 3e38, -3e38, math.inf]


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator)


# The identities.


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=50))
def test_post_follows_from_act_grad_for_both_signs(values: list[float]) -> None:
    """post = 0.5 act_grad pre equals LeakyReLU(0.5)(pre)^2 for every sign and size."""
    pre = torch.tensor(values, dtype=torch.float64)
    act_grad, post = reference.up_activation(pre[:, None], torch.ones(1, 1, dtype=torch.float64))
    branchy = [(v if v > 0 else v / 2) ** 2 for v in pre.tolist()]
    error = relative_error(post[:, 0], torch.tensor(branchy, dtype=torch.float64))
    check("post against the branchy square", error, rounding_budget(4, torch.float64))
    slope = torch.tensor([2 * v if v > 0 else v / 2 for v in pre.tolist()], dtype=torch.float64)
    assert torch.equal(act_grad[:, 0], slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_holds_at_the_edges(dtype: torch.dtype) -> None:
    """The identity holds at zeros, denormals and the largest numbers; infinity stays infinity."""
    pre = torch.tensor(EDGES, dtype=dtype)
    act_grad, post = reference.up_activation(pre[:, None], torch.ones(1, 1, dtype=dtype))
    leaky = torch.where(pre > 0, pre, 0.5 * pre)
    assert not act_grad.isnan().any()
    assert not post.isnan().any()
    exact = leaky.double() ** 2
    top = torch.finfo(dtype).max
    for got, want in zip(post[:, 0].double().tolist(), exact.tolist(), strict=True):
        if want > top:
            assert got == math.inf
        elif want >= torch.finfo(dtype).tiny:
            check("post at an edge", abs(got - want) / want, 8 * torch.finfo(dtype).eps)
        else:
            assert 0 <= got <= torch.finfo(dtype).tiny


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16])
@given(
    seed=st.integers(0, 1000), m=st.integers(1, 9), d=widths, f=widths,
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 30.0, 1e18]),
)  # fmt: skip
def test_activation_alone_is_post_to_the_bit(
    dtype: torch.dtype, seed: int, m: int, d: int, f: int, magnitude: float
) -> None:
    """`activation` is `up_activation`'s post without its act_grad, to the bit, in every type."""
    g = torch.Generator().manual_seed(seed)
    x, w_up = _normal(g, m, d, scale=magnitude).to(dtype), _normal(g, f, d).to(dtype)
    assert torch.equal(reference.activation(x, w_up), reference.up_activation(x, w_up)[1])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_activation_alone_is_post_at_the_edges(dtype: torch.dtype) -> None:
    """The same at zeros, denormals, the largest numbers, infinities and NaN."""
    pre = torch.tensor([*EDGES, -math.inf, math.nan], dtype=dtype)[:, None]
    one = torch.ones(1, 1, dtype=dtype)
    got, want = reference.activation(pre, one), reference.up_activation(pre, one)[1]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(got.signbit(), want.signbit())


@given(seed=st.integers(0, 1000), m=st.integers(1, 9), f=widths, magnitude=magnitudes)
def test_dpre_equals_the_derivative_of_the_activation(
    seed: int, m: int, f: int, magnitude: float
) -> None:
    """(go @ w_down) act_grad, without a branch, equals autograd through the branchy activation."""
    g = torch.Generator().manual_seed(seed)
    pre = (magnitude * torch.randn(m, f, generator=g, dtype=torch.float64)).requires_grad_()
    go = torch.randn(m, 8, generator=g, dtype=torch.float64)
    w_down = torch.randn(8, f, generator=g, dtype=torch.float64)
    (F.leaky_relu(pre, 0.5).square() @ w_down.T).backward(go)
    act_grad = torch.where(pre > 0, 2 * pre, 0.5 * pre).detach()
    assert pre.grad is not None
    error = relative_error(reference.dpre(go, w_down, act_grad), pre.grad)
    check("dpre against autograd", error, rounding_budget(16, torch.float64))


def test_reference_passes_gradcheck() -> None:
    """The differentiable MLP passes gradcheck in float64 for all three inputs."""
    g = torch.Generator().manual_seed(0)
    shapes = ((5, 8), (16, 8), (8, 16))
    inputs = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda x, u, d: mlp(x, u, d)[0], inputs)


# The glue, through the reference backend; the others come below.


def _variants_of(x: Tensor, kind: str) -> Tensor:
    """The same values in another memory layout."""
    if kind == "strided":
        return torch.stack((x, x), dim=-1)[..., 0]
    if kind == "transposed":
        return x.mT.contiguous().mT
    return x


@given(
    seed=st.integers(0, 1000), batch=st.integers(1, 3), m=st.integers(1, 20), d=widths, f=widths,
    layout=st.sampled_from(["plain", "strided", "transposed"]), magnitude=magnitudes,
    expanded=st.booleans(),
)  # fmt: skip
def test_glue_equals_plain_autograd(
    seed: int, batch: int, m: int, d: int, f: int, layout: str, magnitude: float, expanded: bool
) -> None:
    """Output and all gradients equal plain autograd's for any layout and expanded gradients."""
    g = torch.Generator().manual_seed(seed)
    x = _normal(g, batch, m, d, scale=magnitude).double()
    w_up, w_down = _normal(g, f, d).double(), _normal(g, d, f).double()
    go = _normal(g, 1, 1, d).double().expand(batch, m, d) if expanded else _normal(g, batch, m, d)
    results = []
    for function in (reference.mlp, lambda *a: mlp(*a)[0]):
        leaves = [_variants_of(t.clone(), layout).requires_grad_() for t in (x, w_up, w_down)]
        y = function(*leaves)
        y.backward(go.to(y.dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for name, a, b in zip(("y", "dx", "dw_up", "dw_down"), *results, strict=True):
        check(name, relative_error(b, a), rounding_budget(8 * (d + f + m), torch.float64))


def test_post_is_the_input_of_the_down_projection() -> None:
    """The returned post is the down-projection's input, detached."""
    g = torch.Generator().manual_seed(0)
    x, w_up, w_down = _normal(g, 4, 8).requires_grad_(), _normal(g, 16, 8), _normal(g, 8, 16)
    y, post = mlp(x, w_up, w_down)
    assert not post.requires_grad
    assert torch.equal(post @ w_down.T, y)


def test_gradients_accumulate() -> None:
    """Two backward passes add up."""
    g = torch.Generator().manual_seed(0)
    x, w_up, w_down = (_normal(g, *s).requires_grad_() for s in ((4, 8), (16, 8), (8, 16)))
    mlp(x, w_up, w_down)[0].sum().backward()
    assert w_up.grad is not None
    once = w_up.grad.clone()
    mlp(x, w_up, w_down)[0].sum().backward()
    assert torch.equal(w_up.grad, 2 * once)


def test_autocast_runs_in_its_dtype() -> None:
    """Under autocast the MLP runs in autocast's dtype and gradients come back in the masters'."""
    g = torch.Generator().manual_seed(0)
    x, w_up, w_down = (_normal(g, *s).requires_grad_() for s in ((4, 8), (16, 8), (8, 16)))
    with torch.autocast("cpu", dtype=BF16):
        y, _ = mlp(x, w_up, w_down)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert w_up.grad is not None
    assert w_up.grad.dtype == torch.float32


def test_only_act_grad_and_post_are_kept() -> None:
    """Between forward and backward the MLP keeps act_grad and post besides its inputs."""
    kept: list[Tensor] = []
    g = torch.Generator().manual_seed(0)
    x, w_up, w_down = (_normal(g, *s).requires_grad_() for s in ((4, 8), (16, 8), (8, 16)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(x, w_up, w_down)
    inputs = {t.data_ptr() for t in (x, w_up, w_down)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in inputs] == [(4, 16), (4, 16)]


def test_fullgraph_compile() -> None:
    """The MLP compiles with fullgraph=True and gives the eager result."""
    g = torch.Generator().manual_seed(0)
    x, w_up, w_down = (_normal(g, *s).requires_grad_() for s in ((4, 8), (16, 8), (8, 16)))
    compiled = torch.compile(lambda x, u, d: mlp(x, u, d)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w_up, w_down), mlp(x, w_up, w_down)[0])


@given(
    seed=st.integers(0, 1000), batch=st.integers(1, 3), m=st.integers(1, 20), d=widths, f=widths,
    layout=st.sampled_from(["plain", "strided", "transposed"]),
)  # fmt: skip
def test_no_gradient_gives_the_same_bits(
    seed: int, batch: int, m: int, d: int, f: int, layout: str
) -> None:
    """With gradients off, output and post are to the bit what training computes."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, m, d), (f, d), (d, f))
    x, w_up, w_down = (
        _variants_of(_normal(g, *s).to(BF16), layout).requires_grad_() for s in shapes
    )
    trained = mlp(x, w_up, w_down)
    with torch.no_grad():
        scored = mlp(x, w_up, w_down)
    for got, want in zip(scored, trained, strict=True):
        assert not got.requires_grad
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["triton", "cutlass"])
@pytest.mark.parametrize("grad", [False, True])
def test_compiler_sees_the_operator_that_is_needed(backend: str, grad: bool) -> None:
    """The full graph has `activation` where gradients are off and `up_activation` where on.

    Recompiled when the mode changes; a stand-in for the code generator only lists operators.
    """
    seen: list[str] = []

    def list_operators(graph: torch.fx.GraphModule, _: object) -> object:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                seen.extend(str(node.target) for node in module.graph.nodes)
        return lambda *inputs: (inputs[0], inputs[0])

    x, w_up, w_down = (torch.zeros(s, dtype=BF16) for s in ((4, 8), (16, 8), (8, 16)))
    compiled = torch.compile(
        lambda x, u, d: mlp(x, u, d, backend=backend), fullgraph=True, backend=list_operators
    )
    for mode in (not grad, grad):
        seen.clear()
        with torch.set_grad_enabled(mode):
            compiled(x, w_up, w_down)
    operator = "up_activation" if grad else "activation"
    assert [name for name in seen if "fairway" in name] == [f"fairway.{operator}_{backend}.default"]


def test_fullgraph_compile_without_gradients() -> None:
    """With gradients off too the MLP compiles with fullgraph=True and gives the eager result."""
    g = torch.Generator().manual_seed(0)
    x, w_up, w_down = (_normal(g, *s) for s in ((4, 8), (16, 8), (8, 16)))
    compiled = torch.compile(lambda x, u, d: mlp(x, u, d), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for got, want in zip(compiled(x, w_up, w_down), mlp(x, w_up, w_down), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, u, d: (x[:, :4], u, d), "fit together"),
        (lambda x, u, d: (x, u[None], d), "two"),
        (lambda x, u, d: (x, u, d.double()), "dtype"),
        (lambda x, u, d: (x, u.T, d), "fit together"),
    ],
)
def test_misfit_arguments_are_named(change: object, words: str) -> None:
    """Arguments of the MLP that do not fit give a ValueError that says which."""
    g = torch.Generator().manual_seed(0)
    arguments = change(_normal(g, 4, 8), _normal(g, 16, 8), _normal(g, 8, 16))  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match=words):
        mlp(*arguments)


def test_unknown_backend_is_refused() -> None:
    """An unknown backend is refused with the list of known ones."""
    with pytest.raises(ValueError, match="reference, triton, cutlass"):
        load_backend("cublas")


@pytest.mark.parametrize(
    "op",
    [
        triton_ops.up_activation, cutlass.up_activation,
        triton_ops.activation, cutlass.activation,
    ],
)  # fmt: skip
def test_cpu_tensors_are_refused_by_fused_forwards(op: object) -> None:
    """A fused forward given CPU tensors raises ValueError naming the argument; no crash."""
    x, w = torch.zeros(4, 8, dtype=BF16), torch.zeros(16, 8, dtype=BF16)
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        op(x, w)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="x must be bfloat16"):
        op(x.float(), w)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("op", [triton_ops.dpre, cutlass.dpre])
def test_cpu_tensors_are_refused_by_fused_backwards(op: object) -> None:
    """A fused backward given CPU tensors raises ValueError naming the argument; no crash."""
    go, w, a = (torch.zeros(s, dtype=BF16) for s in ((4, 8), (8, 16), (4, 16)))
    with pytest.raises(ValueError, match="go must be on a CUDA device"):
        op(go, w, a)  # pyright: ignore[reportCallIssue]


class _OnGpu:
    """Stand-in for a CUDA tensor, so that argument checks run without a GPU."""

    def __init__(self, *shape: int, **changes: object) -> None:
        self.shape, self.dtype, self.is_cuda = torch.Size(shape), BF16, True
        self.ndim, self.device, self.pointer, self.contiguous = len(shape), "cuda:0", 64, True
        vars(self).update(changes)

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_contiguous(self) -> bool:
        return self.contiguous

    def data_ptr(self) -> int:
        return self.pointer


@pytest.mark.parametrize(
    ("x", "w", "words"),
    [
        (_OnGpu(4, 8, 1), _OnGpu(16, 8), "x must have 2 dims"),
        (_OnGpu(4, 12), _OnGpu(16, 12), "x: its width 12 must be a multiple of 8"),
        (_OnGpu(0, 8), _OnGpu(16, 8), "empty"),
        (_OnGpu(4, 8), _OnGpu(16, 16), r"w_up \[F, D\].*does not fit"),
        (_OnGpu(4, 8, contiguous=False), _OnGpu(16, 8), "x must be contiguous"),
        (_OnGpu(4, 8), _OnGpu(16, 8, pointer=8), "w_up must start at a multiple of 16"),
        (_OnGpu(4, 8), _OnGpu(16, 8, device="cuda:1"), "w_up is on cuda:1"),
    ],
)
def test_bad_forward_arguments_are_named(x: _OnGpu, w: _OnGpu, words: str) -> None:
    """Rank, width, emptiness, shape, layout, alignment and device are checked, each by name."""
    with pytest.raises(ValueError, match=words):
        checks.check_up_activation(x, w)  # pyright: ignore[reportArgumentType]


def test_bad_backward_arguments_are_named() -> None:
    """Shapes of the backward that do not fit are named."""
    go, w, a = _OnGpu(4, 8), _OnGpu(8, 16), _OnGpu(4, 16)
    checks.check_dpre(go, w, a)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="w_down"):
        checks.check_dpre(go, _OnGpu(16, 16), a)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="act_grad"):
        checks.check_dpre(go, w, _OnGpu(5, 16))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("backend", ["triton", "cutlass"])
@pytest.mark.parametrize("op", ["up_activation", "activation", "dpre"])
def test_operators_have_true_shapes_for_the_compiler(op: str, backend: str) -> None:
    """Each operator's fake gives the shapes and type the compiler may rely on."""
    operator = getattr(torch.ops.fairway, f"{op}_{backend}")
    with torch.device("meta"):
        if op == "dpre":
            go, w, a = (torch.empty(s, dtype=BF16) for s in ((5, 8), (8, 24), (5, 24)))
            outputs = (operator(go, w, a),)
        else:
            x, w = torch.empty(5, 8, dtype=BF16), torch.empty(24, 8, dtype=BF16)
            outputs = operator(x, w) if op == "up_activation" else (operator(x, w),)
    assert [tuple(o.shape) for o in outputs] == [(5, 24)] * (2 if op == "up_activation" else 1)
    assert {o.dtype for o in outputs} == {BF16}


# Triton's interpreter: the kernels themselves, on a CPU.

INTERPRETED = """
import sys, torch
from hypothesis import given, settings, strategies as st
from kernels import backward_triton, forward_triton, reference
from kernels.tiles import Tile
from verify.tolerance import check, relative_error, rounding_budget

widths = st.integers(1, 12).map(lambda n: 8 * n)
tiles = st.builds(
    Tile, st.sampled_from([16, 32]), st.sampled_from([32, 64]), st.sampled_from([16, 32]),
    st.just(4), st.just(2), st.just(1), st.sampled_from([1, 2, 3]), st.booleans(),
)

@settings(max_examples=int(sys.argv[1]), deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 99), m=st.integers(1, 90), d=widths, f=widths, tile=tiles)
def run(seed, m, d, f, tile):
    g = torch.Generator().manual_seed(seed)
    x, go = torch.randn(2, m, d, generator=g)
    w_up, w_down = torch.randn(f, d, generator=g), torch.randn(d, f, generator=g)
    got = forward_triton.up_activation(x, w_up, tile)
    want = reference.up_activation(x.double(), w_up.double())
    for name, a, b in zip(("act_grad", "post"), got, want, strict=True):
        check(name, relative_error(a, b), rounding_budget(4 * d + 8, torch.float32))
    assert torch.equal(forward_triton.activation(x, w_up, tile), got[1]), "post without act_grad"
    got = backward_triton.dpre(go, w_down, got[0], tile)
    want = reference.dpre(go.double(), w_down.double(), want[0])
    check("dpre", relative_error(got, want), rounding_budget(4 * d + 8, torch.float32))

run()
"""


def test_triton_kernels_equal_the_reference_in_the_interpreter() -> None:
    """The Triton kernels, interpreted, equal float64 for ragged shapes and any tile order.

    The forward gives the same post with act_grad and without.
    """
    run_interpreted(INTERPRETED, "25")


# On a Hopper GPU.


def _gpu_inputs(
    seed: int, m: int, d: int, f: int, magnitude: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, go, w_up, w_down, act_grad in bfloat16 on the GPU."""
    g = torch.Generator().manual_seed(seed)
    x, go = _normal(g, m, d, scale=magnitude), _normal(g, m, d)
    w_up, w_down = _normal(g, f, d, scale=d**-0.5), _normal(g, d, f, scale=f**-0.5)
    x, go, w_up, w_down = (t.cuda().to(BF16) for t in (x, go, w_up, w_down))
    act_grad, _ = reference.up_activation(x, w_up)
    return x, go, w_up, w_down, act_grad


def _within_budget(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    check(name, relative_error(got, exact), kernel_budget(plain, exact, BF16))


FORWARDS = {
    "triton": lambda x, w: triton_ops.up_activation(x, w),
    **{
        name: lambda x, w, n=name: cutlass.run_up_activation(x, w, Plan(n))
        for name, v in VARIANTS.items()
        if v.op == "up"
    },
}
ACTIVATIONS = {
    "reference": (reference.activation, reference.up_activation),
    "triton": (triton_ops.activation, triton_ops.up_activation),
    **{
        name: (lambda x, w, n=name: cutlass.run_activation(x, w, Plan(n)), cutlass.up_activation)
        for name, v in VARIANTS.items()
        if v.op == "activation"
    },
}
"""Forwards without act_grad, and those with it whose post they must repeat."""
BACKWARDS = {
    "triton": lambda go, w, a: triton_ops.dpre(go, w, a),
    **{
        name: lambda go, w, a, n=name: cutlass.run_dpre(go, w, a, Plan(n))
        for name, v in VARIANTS.items()
        if v.op == "dpre"
    },
}


@pytest.mark.hopper
@pytest.mark.parametrize("name", list(FORWARDS))
@given(seed=st.integers(0, 999), m=rows, d=widths, f=widths, magnitude=magnitudes)
def test_fused_forward_on_hopper(
    name: str, seed: int, m: int, d: int, f: int, magnitude: float
) -> None:
    """Every fused forward errs at most twice as much as plain bfloat16, for any shape and size."""
    x, _, w_up, _, _ = _gpu_inputs(seed, m, d, f, magnitude)
    exact = reference.up_activation(x.float(), w_up.float())
    plain = reference.up_activation(x, w_up)
    got = FORWARDS[name](x, w_up)
    for what, g, p, e in zip(("act_grad", "post"), got, plain, exact, strict=True):
        _within_budget(what, g, p, e)


@pytest.mark.hopper
@pytest.mark.parametrize("name", list(ACTIVATIONS))
@given(seed=st.integers(0, 999), m=rows, d=widths, f=widths, magnitude=magnitudes)
def test_activation_alone_on_hopper(
    name: str, seed: int, m: int, d: int, f: int, magnitude: float
) -> None:
    """Every forward without act_grad gives its backend's post to the bit, for any shape."""
    x, _, w_up, _, _ = _gpu_inputs(seed, m, d, f, magnitude)
    alone, both = ACTIVATIONS[name]
    assert torch.equal(alone(x, w_up), both(x, w_up)[1])


@pytest.mark.hopper
@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 99), m=rows, d=widths, f=widths)
def test_no_gradient_gives_the_same_bits_on_hopper(
    backend: str, seed: int, m: int, d: int, f: int
) -> None:
    """With gradients off, output and post of the fused MLP are to the bit those of training."""
    x, _, w_up, w_down, _ = _gpu_inputs(seed, m, d, f, 1.0)
    trained = mlp(*(t.detach().requires_grad_() for t in (x, w_up, w_down)), backend=backend)
    with torch.no_grad():
        scored = mlp(x, w_up, w_down, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(scored, trained, strict=True))


@pytest.mark.hopper
@pytest.mark.parametrize("name", list(BACKWARDS))
@given(seed=st.integers(0, 999), m=rows, d=widths, f=widths, magnitude=magnitudes)
def test_fused_backward_on_hopper(
    name: str, seed: int, m: int, d: int, f: int, magnitude: float
) -> None:
    """Every fused backward errs at most twice as much as plain bfloat16, for any shape and size."""
    _, go, _, w_down, act_grad = _gpu_inputs(seed, m, d, f, magnitude)
    exact = reference.dpre(go.float(), w_down.float(), act_grad.float())
    plain = reference.dpre(go, w_down, act_grad)
    _within_budget("dpre", BACKWARDS[name](go, w_down, act_grad), plain, exact)


@pytest.mark.hopper
@pytest.mark.parametrize("backend", ["triton", "cutlass"])
@given(seed=st.integers(0, 99), m=rows, d=widths, f=widths, expanded=st.booleans())
def test_fused_mlp_on_hopper(
    backend: str, seed: int, m: int, d: int, f: int, expanded: bool
) -> None:
    """Output and all gradients of the fused MLP stay in the budget, for expanded gradients too."""
    x, go, w_up, w_down, _ = _gpu_inputs(seed, m, d, f, 1.0)
    go = go[:1].expand_as(go) if expanded else go

    def run(function: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, w_up, w_down)]
        y = function(*leaves)  # pyright: ignore[reportCallIssue]
        return [y.detach(), *torch.autograd.grad(y, leaves, go.to(dtype))]

    exact, plain = run(reference.mlp, torch.float32), run(reference.mlp, BF16)
    got = run(lambda *a: mlp(*a, backend=backend)[0], BF16)
    for what, g, p, e in zip(("y", "dx", "dw_up", "dw_down"), got, plain, exact, strict=True):
        _within_budget(what, g, p, e)


@pytest.mark.hopper
@pytest.mark.parametrize("backend", ["triton", "cutlass"])
def test_fused_mlp_repeats_to_the_bit(backend: str) -> None:
    """The same inputs give the same bits, run after run."""
    x, go, w_up, w_down, _ = _gpu_inputs(0, 513, 128, 264, 1.0)
    runs = []
    for _ in range(3):
        leaves = [t.detach().requires_grad_() for t in (x, w_up, w_down)]
        y, _ = mlp(leaves[0], leaves[1], leaves[2], backend=backend)
        runs.append([y.detach(), *torch.autograd.grad(y, leaves, go)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.hopper
@pytest.mark.parametrize("backend", ["triton", "cutlass"])
@pytest.mark.parametrize("grad", [False, True])
def test_fused_mlp_in_a_cuda_graph(backend: str, grad: bool) -> None:
    """Captured in a CUDA graph and replayed on new inputs, the fused MLP gives the eager result."""
    with torch.set_grad_enabled(grad):
        _capture_and_replay(backend)


def _capture_and_replay(backend: str) -> None:
    x, _, w_up, w_down, _ = _gpu_inputs(0, 300, 64, 128, 1.0)
    other = _gpu_inputs(1, 300, 64, 128, 1.0)[0]
    expected = mlp(other, w_up, w_down, backend=backend)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        mlp(x, w_up, w_down, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = mlp(x, w_up, w_down, backend=backend)
    x.copy_(other)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.hopper
@pytest.mark.parametrize("backend", ["triton", "cutlass"])
def test_fused_mlp_compiles_on_hopper(backend: str) -> None:
    """The fused MLP compiles with fullgraph=True; gradients stay in the budget."""
    x, _, w_up, w_down, _ = _gpu_inputs(0, 512, 128, 256, 1.0)
    compiled = torch.compile(lambda x, u, d: mlp(x, u, d, backend=backend)[0], fullgraph=True)
    leaves = [t.detach().requires_grad_() for t in (x, w_up, w_down)]
    eager = mlp(leaves[0], leaves[1], leaves[2], backend=backend)[0]
    exact = reference.mlp(*(t.float() for t in (x, w_up, w_down)))
    got = compiled(leaves[0], leaves[1], leaves[2])
    _within_budget("compiled y", got, eager, exact)


@pytest.mark.hopper
@pytest.mark.parametrize("backend", ["triton", "cutlass"])
def test_fused_mlp_compiles_without_gradients_on_hopper(backend: str) -> None:
    """With gradients off the fused MLP compiles with fullgraph=True; post is the eager one."""
    x, _, w_up, w_down, _ = _gpu_inputs(0, 512, 128, 256, 1.0)
    compiled = torch.compile(lambda x, u, d: mlp(x, u, d, backend=backend), fullgraph=True)
    with torch.no_grad():
        y, post = compiled(x, w_up, w_down)
        eager_y, eager_post = mlp(x, w_up, w_down, backend=backend)
    assert torch.equal(post, eager_post)
    exact = reference.mlp(*(t.float() for t in (x, w_up, w_down)))
    _within_budget("compiled y", y, eager_y, exact)


@pytest.mark.hopper
def test_plans_in_use_are_built() -> None:
    """The plans chosen by measurement name variants that are in the library."""
    assert VARIANTS[DPRE_PLAN.variant].op == "dpre"
    assert VARIANTS[UP_PLAN.variant].op == "up"
    assert VARIANTS[ACTIVATION_PLAN.variant].op == "activation"
    assert cutlass.library() is not None
