"""Claims about the projection that finishes its heads, its backward pass, and both around flash4.

Letters: M rows (tokens), D model width, B windows, T positions, H query heads, G key/value heads,
K head size, W joint width, V width of the values, P heads with a norm.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cutlass, flash4, heads_cutlass, reference
from kernels.variants import HEADS_PLAN, VARIANTS, Plan
from trainer import layers, run
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.record import RECORD
from verify import hopper_code
from verify.flash4_stand_in import plain_attention
from verify.interpreter import run_interpreted
from verify.tolerance import check, kernel_budget, relative_error, rounding_budget

BF16, F64 = torch.bfloat16, torch.float64
K, HALF = heads_cutlass.HEAD_SIZE, heads_cutlass.HALF
NAMES = [name for name, variant in VARIANTS.items() if variant.op == "heads"]
F32_ROTARY = 16
"""Roundings of float32 that `reference.rotate` keeps, whatever the type of its input."""

Arguments = tuple[Any, ...]
"""Those of `project_heads`."""


def _inputs(
    m: int, d: int, length: int, heads: tuple[int, int], embed: bool, device: str, size: int = K
) -> Arguments:
    """Random arguments; matrices hold bfloat16 values in float64."""
    g = torch.Generator(device).manual_seed(m + d)
    H, G = heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    rows = 3 * normal(m, d)
    factor = torch.rsqrt(rows.square().mean(1)) * 0.7
    matrices = [rows, normal((H + 2 * G) * size, d) * d**-0.5, normal(m, G * size)]
    rows, w, value_embed = (t.to(BF16).to(F64) for t in matrices)
    angle = normal(length, HALF if size == K else size // 4)
    gain = torch.linspace(0.5, 2, H, device=device)
    return rows, w, factor, value_embed if embed else None, gain, G, angle.cos(), angle.sin()


def _typed(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same with matrices in `dtype`; factors, gains and tables stay float32."""
    rows, w, factor, value_embed, *rest = arguments
    embed = None if value_embed is None else value_embed.to(dtype)
    return rows.to(dtype), w.to(dtype), factor, embed, *rest


# The meaning.


@pytest.mark.parametrize("embed", [False, True])
def test_finished_heads_are_those_of_the_pass_apart(embed: bool) -> None:
    """Side by side they are `split_heads`' queries, keys and values of the projection."""
    B, T, H, G, size = 2, 5, 4, 2, 8
    rows, w, factor, value_embed, gain, _, *tables = _inputs(
        B * T, 16, T, (H, G), embed, "cpu", size
    )
    heads, inverse = reference.project_heads(rows, w, factor, value_embed, gain, G, *tables)
    qkv = (rows @ w.t()).view(B, T, -1)
    added = None if value_embed is None else value_embed.view(B, T, -1)
    apart = reference.split_heads(qkv, added, gain, G, *tables, scale_BT=factor.view(B, T))
    joined = torch.cat(apart, dim=2).flatten(0, 1).flatten(1)
    check("heads", relative_error(heads, joined), rounding_budget(F32_ROTARY, torch.float32))
    normed = (factor[:, None] * qkv.flatten(0, 1)).unflatten(1, (-1, size))[:, : H + G]
    rms = (normed.square().mean(-1) + reference.EPS).sqrt()
    check("inverse", relative_error(inverse, 1 / rms.t()), rounding_budget(8 * size, F64))


def _backward_inputs(zero_gain: bool) -> tuple[Arguments, Tensor]:
    """Arguments of which the projection is the identity, so that its rows are the product."""
    B, T, H, G, size = 2, 5, 4, 2, 8
    width = (H + 2 * G) * size
    _, _, factor, value_embed, gain, _, *tables = _inputs(B * T, 16, T, (H, G), True, "cpu", size)
    if zero_gain:
        gain[1] = 0
    g = torch.Generator().manual_seed(1)
    product, grad = (torch.randn(B * T, width, generator=g, dtype=F64) for _ in range(2))
    eye = torch.eye(width, dtype=F64)
    return (product, eye, factor, value_embed, gain, G, *tables), grad


@pytest.mark.parametrize("zero_gain", [False, True])
def test_backward_formula_is_the_derivative(zero_gain: bool) -> None:
    """From finished heads, the gradients at product and gains are autograd's.

    A gain of 0 keeps its own gradient 0, for the stored head has lost what it would be.
    """
    (product, eye, factor, value_embed, gain, G, *tables), grad = _backward_inputs(zero_gain)
    leaves = (product.requires_grad_(), gain.requires_grad_())
    heads, inverse = reference.project_heads(product, eye, factor, value_embed, gain, G, *tables)
    d_product, d_gain = torch.autograd.grad(heads, leaves, grad)
    got = reference.project_heads_backward(
        grad, heads.detach(), inverse.detach(), factor, gain.detach(), *tables
    )
    budget = rounding_budget(64 * F32_ROTARY, torch.float32)
    check("product", relative_error(got[0], d_product), budget)
    kept = gain.detach() != 0
    check("gain", relative_error(got[1][kept], d_gain[kept]), budget)
    assert (got[1][~kept] == 0).all()


BACKWARD = """
import sys, torch
from hypothesis import Phase, given, settings, strategies as st
from kernels import joined_heads_triton, reference
from kernels.tiles import RowBlock
from verify.flash4_stand_in import sums_of
from verify.tolerance import check, relative_error, rounding_budget

# A smaller counterexample would take the interpreter minutes.
@settings(max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(seed=st.integers(0, 99), b=st.integers(1, 2), t=st.sampled_from([1, 5, 16, 37]),
       heads=st.sampled_from([(4, 2), (2, 2), (4, 1)]), half=st.sampled_from([1, 2, 4]),
       embed=st.booleans(), zero=st.booleans(), rows=st.sampled_from([2, 4, 8]),
       programs=st.integers(1, 3))
def backward(seed, b, t, heads, half, embed, zero, rows, programs):
    draw = torch.Generator().manual_seed(seed)
    (h, g), k, m = heads, 8, b * t

    def random(*shape):
        return torch.randn(shape, generator=draw)

    gain = torch.rand(h, generator=draw) + 0.5
    if zero:
        gain[0] = 0
    factor, angle = torch.rand(m, generator=draw) + 0.5, random(t, half)
    tables = (angle.cos(), angle.sin())
    width = (h + 2 * g) * k
    finished, inverse = reference.project_heads(
        random(m, width), torch.eye(width), factor, None, gain, g, *tables)
    dq, more = random(b, t, h, k), random(b, t, g, k)
    dk, dv = (random(h // g, b, t, g, k) for _ in range(2))
    d_values = dv.sum(0) + more
    grad = torch.cat((dq, dk.sum(0), d_values), dim=2).view(m, width)
    want, d_gain = reference.project_heads_backward(
        *(x.double() for x in (grad, finished, inverse, factor, gain)), *tables)
    joint, sums, *embeds = joined_heads_triton.joined_heads_backward(
        sums_of(dq * k**0.5, 64), dk, dv, more, finished, inverse, factor, gain, *tables,
        RowBlock(rows, 4, programs), embed=embed)
    budget = rounding_budget(64 * k, torch.float32)
    parts = (x.split([h * k, g * k, g * k], 1) for x in (joint, want))
    for name, got, wanted in zip("qkv", *parts):
        check(name, relative_error(got, wanted), budget)
    check("gain", relative_error(sums.sum(0), d_gain), rounding_budget(64 * k * m, torch.float32))
    assert (sums.sum(0)[gain == 0] == 0).all()
    assert len(embeds) == embed
    for got in embeds:
        check("embed", relative_error(got, d_values.view(m, -1)), budget)

backward()
"""


def test_backward_pass_equals_its_formula_in_the_interpreter() -> None:
    """Every part of the joint gradient, the gains' and the embedding's, in any grouping of rows."""
    run_interpreted(BACKWARD)


WHOLE = """
import sys, torch
from kernels import flash4, joined_attention, pass_ops, reference
from verify import flash4_stand_in
from verify.tolerance import check, relative_error, rounding_budget

for name, replacement in flash4_stand_in.replacements().items():
    setattr(flash4, name, replacement)
for module in (pass_ops, joined_attention):
    module.check_cuda_tensors = lambda **tensors: None  # the interpreter takes CPU tensors
pass_ops.check_rows = lambda **tensors: None
for product in ("cutlass", "heads_cutlass", "exclude_self_cutlass"):
    setattr(joined_attention, product, reference)  # no CUTLASS on a CPU
(h, g, embed), k, (b, t), d = map(int, sys.argv[1:]), 8, (2, 5), 16
draw = torch.Generator().manual_seed(0)

def random(*shape):
    return torch.randn(shape, generator=draw)

leaves = [random(b, t, d), random((h + 2 * g) * k, d) / 4, random(h).abs() + 0.5]
leaves += [random(d, h * k), random(b, t, d)]
leaves += [random(b, t, g * k)] if embed else []
factor, angle, grad = random(b, t).abs() + 0.5, random(t, 2), random(b, t, d)
tables = (angle.cos(), angle.sin())

def plain(rows, w, factor, value_embed, gain, w_out, residual):
    qkv = torch.nn.functional.linear(rows, w)
    q, k, v = reference.split_heads(qkv, value_embed, gain, g, *tables, factor)
    attended = reference.exclude_self(flash4_stand_in.plain_attention(q, k, v), v)
    return residual + attended.flatten(2) @ w_out.t()

def joined(rows, w, factor, value_embed, gain, w_out, residual):
    out, squares = joined_attention.attention_half(
        rows, w, factor, value_embed, gain, g, *tables, w_out, residual)
    assert torch.allclose(squares.sum(1), out.flatten(0, 1).square().sum(1))
    return out

def run(half):
    inputs = [x.clone().requires_grad_() for x in leaves]
    rows, w, gain, w_out, residual, *more = inputs
    out = half(rows, w, factor, more[0] if more else None, gain, w_out, residual)
    return out, *torch.autograd.grad(out, inputs, grad)

names = ("out", "rows", "w", "gain", "w_out", "residual", "embed")
for name, a, e in zip(names, run(joined), run(plain)):
    check(name, relative_error(a, e), rounding_budget(64 * k * (b * t + h), torch.float32))
try:
    joined_attention.attention_half(
        *leaves[:2], factor, None, leaves[2], g, *(x[1:] for x in tables), *leaves[3:5])
except ValueError as error:
    assert "cos has 4 positions, windows 5" in str(error)
else:
    raise AssertionError("a table of other windows was taken")
"""


@pytest.mark.parametrize("heads", [("4", "2"), ("4", "4"), ("4", "1")])
@pytest.mark.parametrize("embed", ["0", "1"])
def test_projection_heads_and_attention_join(heads: tuple[str, str], embed: str) -> None:
    """The whole function, interpreted over stand-ins, has the value and gradients of its parts."""
    run_interpreted(WHOLE, *heads, embed)


# What the operator says of itself, and what it refuses.


def test_default_plan_names_a_variant() -> None:
    """There is a default, and others to compare it with; a piece of each is one head wide."""
    assert HEADS_PLAN.variant in NAMES
    assert len(NAMES) >= 2
    for name in NAMES:
        variant = VARIANTS[name]
        assert variant.epilogue[1] == K
        assert variant.epilogue[0] * K == 32 * variant.threads


@pytest.mark.parametrize(("m", "d", "heads"), [(5, 8, (1, 1)), (1000, 512, (8, 4))])
def test_operator_has_true_shapes_for_the_compiler(m: int, d: int, heads: tuple[int, int]) -> None:
    """Its fake gives shapes, types and layout."""
    arguments = _typed(_inputs(m, d, 16, heads, True, "cpu"), BF16)
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    found, inverse = heads_cutlass.project_heads(*meta)
    wanted = reference.project_heads(*arguments)
    for got, want in zip((found, inverse), wanted, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def _changed(**changes: Any) -> list[Any]:
    """Fitting arguments, but for their place, with some of them changed."""
    names = ("rows", "w", "factor", "value_embed", "gain", "kv_heads", "cos", "sin")
    fitting = dict(zip(names, _typed(_inputs(4, 8, 4, (2, 1), True, "cpu"), BF16), strict=True))
    return list((fitting | changes).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w": torch.zeros(256, 16, dtype=BF16)}, r"w \[W, D\].*does not fit rows"),
        ({"factor": torch.zeros(5)}, "factor must be float32"),
        ({"gain": torch.zeros(2, dtype=BF16)}, "gain must be float32 with 1 dims"),
        ({"cos": torch.zeros(4, 8).t()}, "cos must be contiguous"),
        ({"sin": torch.zeros(5, 8)}, "must be of one shape"),
        ({"gain": torch.zeros(3)}, "does not hold 3 query heads and 1 key and value heads"),
        ({"kv_heads": 0}, "does not hold"),
        ({"w": torch.zeros(512, 8, dtype=BF16)}, "takes heads of 64.*not 128 and 16.*triton"),
        (
            {"cos": torch.zeros(4, 16), "sin": torch.zeros(4, 16)},
            "of which 16 dims turn, not 64 and 32.*--passes triton",
        ),
        ({"value_embed": torch.zeros(4, 128, dtype=BF16)}, r"value_embed.*must be \[M, G 64\]"),
    ],
)
def test_bad_arguments_are_named(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Type, shape, layout and head shape of each argument are checked by name."""
    with pytest.raises(ValueError, match="rows must be on a CUDA device"):
        heads_cutlass.check_project_heads(*_changed())
    monkeypatch.setattr(heads_cutlass.checks, "check_matrices", lambda **_: None)
    heads_cutlass.check_project_heads(*_changed())
    with pytest.raises(ValueError, match=words):
        heads_cutlass.check_project_heads(*_changed(**changes))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("dq_sums", torch.zeros(1, 2, 64), r"dq as sums .* must be float32 \(1, 2, 1024\)"),
        ("dq_sums", torch.zeros(1, 2, 1024, dtype=BF16), "dq as sums .* must be float32"),
        ("dk", torch.zeros(1, 3, 1, 8), "dk .* must have 5 dims"),
        ("dv", torch.zeros(1, 1, 3, 1, 8), "dv .* must be"),
        ("dv_more", torch.zeros(1, 2, 1, 8), "dv_more .* must be"),
        ("heads", torch.zeros(3, 24), r"heads \[M, W\] .* must be \(3, 32\)"),
        ("inverse", torch.zeros(2, 3), r"inverse .* must be float32 \(3, 3\)"),
        ("inverse", torch.zeros(3, 3, dtype=BF16), "inverse .* must be float32"),
        ("factor", torch.zeros(2), r"factor .* must be float32 \(3,\)"),
        ("gain", torch.ones(2, dtype=BF16), "gain .* must be float32"),
        ("cos", torch.zeros(2, 2), "cos .* must be float32"),
        ("sin", torch.zeros(3, 1), r"sin must be float32 \(3, 2\)"),
    ],
)
def test_bad_arguments_of_the_backward_pass_are_named(
    name: str, value: Tensor, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape or type with which the pass would read past an end, or misread, is refused."""
    from kernels import joined_attention

    shapes = {
        "dq_sums": (1, 2, 8 * flash4.padded(3)), "dk": (2, 1, 3, 1, 8), "dv": (2, 1, 3, 1, 8),
        "dv_more": (1, 3, 1, 8), "heads": (3, 32), "inverse": (3, 3), "factor": (3,),
        "gain": (2,), "cos": (3, 2), "sin": (3, 2),
    }  # fmt: skip
    fitting = {n: torch.zeros(s) for n, s in shapes.items()}
    with pytest.raises(ValueError, match="dq_sums is on cpu"):
        joined_attention.joined_heads_backward(*fitting.values(), False)
    monkeypatch.setattr(joined_attention, "check_cuda_tensors", lambda **_: None)
    with pytest.raises(ValueError, match=words):
        joined_attention.joined_heads_backward(*(fitting | {name: value}).values(), False)


def test_a_run_with_other_heads_stops_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """With flash4, joined blocks take one shape of heads; without it, the passes take any."""
    monkeypatch.setattr(run, "require_backend", lambda *_: None)
    monkeypatch.setattr(run, "require_flash4", lambda *_: None)
    config = replace(RECORD, mlp="cutlass", passes="epilogue", attention="flash4")
    run.check_implementations(config)
    others = replace(config, model=replace(config.model, rotary_dims=32))
    with pytest.raises(ConfigError, match=r"of which 16 dims turn, not 64 and 32.*--passes triton"):
        run.check_implementations(others)
    run.check_implementations(replace(others, attention="cudnn"))


def test_plan_of_another_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan must name a variant of this operator."""
    monkeypatch.setattr(heads_cutlass, "check_project_heads", lambda *_: None)
    other = next(name for name, variant in VARIANTS.items() if variant.op == "up")
    with pytest.raises(ValueError, match=rf"{other}.*is not one of {NAMES[0]}"):
        heads_cutlass.run_project_heads(*_changed(), plan=Plan(other))


# With the compiler: the machine code.


@pytest.mark.nvcc
@pytest.mark.timeout(900)
def test_machine_code_spills_nothing() -> None:
    """The default variant is warp-group products and bulk copies, without spills or warnings."""
    name = HEADS_PLAN.variant
    code = hopper_code.read(hopper_code.cutlass_library(name))
    rows, columns, depth = VARIANTS[name].tile
    assert code.opcodes["HGMMA"] >= (rows // 64) * (columns / 256) * (depth // 16)
    assert code.opcodes["UTMALDG"] >= 2
    assert code.opcodes["UTMASTG"] >= 1
    assert code.opcodes["LDL"] == code.opcodes["STL"] == 0
    log = hopper_code.compiler_log(name)
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log) == [("0", "0")]


# On a Hopper GPU.

SHAPES = [
    (1, 512, 1, (8, 4)),
    (127, 64, 127, (8, 4)),
    (129, 72, 43, (4, 4)),
    (1000, 512, 200, (8, 4)),
    (333, 8, 5, (3, 1)),  # five heads: half of the last tile's columns are missing
    (20_001, 520, 2048, (8, 4)),
]
"""M, D, T and heads: ragged tiles along every side, windows of few and of many positions."""


@pytest.mark.hopper
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize(("m", "d", "length", "heads"), SHAPES)
def test_finished_heads_meet_the_budget(
    name: str, embed: bool, m: int, d: int, length: int, heads: tuple[int, int]
) -> None:
    """Every head, and every 1024 rows, lies within budget of float64; so do the norms' factors."""
    arguments = _inputs(m, d, length, heads, embed, "cuda")
    exact, exact_inverse = reference.project_heads(*arguments)
    plain, _ = reference.project_heads(*_typed(arguments, BF16))
    got, inverse = heads_cutlass.run_project_heads(*_typed(arguments, BF16), plan=Plan(name))
    columns = zip(*(t.split(K, dim=1) for t in (got, plain, exact)), strict=True)
    for n, (a, p, e) in enumerate(columns):
        check(f"head {n}", relative_error(a, e), kernel_budget(p, e, BF16))
    for a, p, e in zip(*(t.split(1024) for t in (got, plain, exact)), strict=True):
        check("1024 rows", relative_error(a, e), kernel_budget(p, e, BF16))
    for n, (a, e) in enumerate(zip(inverse, exact_inverse, strict=True)):
        check(f"inverse {n}", relative_error(a, e), rounding_budget(4 * (d + K), torch.float32))


@pytest.mark.hopper
@pytest.mark.parametrize("name", NAMES)
def test_order_of_tiles_changes_no_bit(name: str) -> None:
    """Along M or N, in bands of any width, the result is the same."""
    arguments = _typed(_inputs(20_001, 520, 2048, (8, 4), True, "cuda"), BF16)
    first = heads_cutlass.run_project_heads(*arguments, plan=Plan(name))
    for along_m in (False, True):
        for swizzle in (1, 2, 8):
            other = heads_cutlass.run_project_heads(*arguments, plan=Plan(name, along_m, swizzle))
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.hopper
@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_the_results_is_written(name: str) -> None:
    """Ragged tiles write their rows, columns and norms' factors alone."""
    m, d, length, (H, G) = 333, 8, 5, (3, 1)
    rows, w, factor, embed, gain, _, *tables = _typed(
        _inputs(m, d, length, (H, G), True, "cuda"), BF16
    )
    assert embed is not None
    want = heads_cutlass.run_project_heads(
        rows, w, factor, embed, gain, G, *tables, plan=Plan(name)
    )
    buffers = [torch.full((3 * t.numel(),), 7, device="cuda", dtype=t.dtype) for t in want]
    pairs = zip(buffers, want, strict=True)
    results = [b[t.numel() : 2 * t.numel()].view(t.shape) for b, t in pairs]
    tensors = (rows, w, factor, embed, gain, *tables, *results)
    cutlass.launch(Plan(name), tensors, (m, d, length, H, G))
    for buffer, result, t in zip(buffers, results, want, strict=True):
        assert torch.equal(result, t)
        assert (buffer[: t.numel()] == 7).all()
        assert (buffer[2 * t.numel() :] == 7).all()


@pytest.mark.hopper
def test_operator_runs_on_the_current_stream() -> None:
    """On a side stream the kernel waits for that stream's earlier work."""
    arguments = _typed(_inputs(300, 64, 100, (8, 4), True, "cuda"), BF16)
    want = heads_cutlass.project_heads(*arguments)
    rows, *rest = arguments
    late = torch.zeros_like(rows)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s, so that another stream would be first
        late.copy_(rows)
        got = heads_cutlass.project_heads(late, *rest)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.hopper
@pytest.mark.flash4
@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize(
    ("length", "heads"), [(127, (8, 4)), (128, (8, 4)), (2048, (8, 4)), (500, (4, 4))]
)
def test_the_whole_function_meets_the_budget(
    length: int, heads: tuple[int, int], embed: bool
) -> None:
    """Output and gradients at rows, weights and embedding lie within budget of float64 autograd.

    The gradient at a gain is a sum that nearly cancels, of which bfloat16 leaves little to compare:
    it is held to its formula in the interpreter, above.
    """
    from kernels import joined_attention

    B, D, (H, G) = 2, 512, heads
    rows, w, factor, embeds, gain, _, _, _ = _inputs(B * length, D, length, heads, embed, "cuda")
    cos, sin = (t[:length].contiguous().cuda() for t in layers.rotary_tables(ModelConfig()))
    draw = torch.Generator("cuda").manual_seed(1)
    grad, residual, w_out = (
        torch.randn(*shape, device="cuda", generator=draw).to(BF16)
        for shape in ((B, length, D), (B, length, D), (D, H * K))
    )

    def plain(
        rows: Tensor, w: Tensor, w_out: Tensor, residual: Tensor, embed: Tensor | None = None
    ) -> Tensor:
        qkv = torch.nn.functional.linear(rows, w)
        scale = factor.view(B, length)
        q, k, v = reference.split_heads(qkv, embed, gain, G, cos, sin, scale)
        attended = reference.exclude_self(plain_attention(q, k, v), v)
        return residual + torch.nn.functional.linear(attended.flatten(2), w_out)

    def joined(
        rows: Tensor, w: Tensor, w_out: Tensor, residual: Tensor, embed: Tensor | None = None
    ) -> Tensor:
        scale = factor.view(B, length)
        return joined_attention.attention_half(
            rows, w, scale, embed, gain, G, cos, sin, w_out, residual
        )[0]

    def step(half: Any, dtype: torch.dtype) -> list[Tensor]:
        given = [rows.view(B, length, D), w, w_out * (H * K) ** -0.5, residual]
        given += [] if embeds is None else [embeds.view(B, length, -1)]
        leaves = [t.to(dtype).requires_grad_() for t in given]
        out = half(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    found = (step(joined, BF16), step(plain, BF16), step(plain, F64))
    names = ("out", "rows", "w", "w_out", "residual", "embed")
    for name, a, p, e in zip(names, *found, strict=False):
        check(f"joined {name}", relative_error(a, e), kernel_budget(p, e, BF16))
