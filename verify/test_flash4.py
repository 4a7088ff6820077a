"""Claims about attention `flash4`: what it computes on a GPU, and what it says where it cannot.

Letters: B windows, T positions, L positions of whole tiles, H query heads, G key/value heads,
K head size.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.flash4_variants import backward_chains, by_member
from kernels import flash4, flash4_package, heads_flash4, heads_triton, pass_ops, reference
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.layers import causal_attention, rotary_tables
from trainer.record import RECORD
from trainer.run import preflight
from verify import flash4_stand_in
from verify.flash4_stand_in import plain_attention
from verify.interpreter import run_interpreted
from verify.models import random_model
from verify.tolerance import check, kernel_budget, relative_error, rounding_budget

BF16 = torch.bfloat16
NAMES = ("out", "dq", "dk", "dv")


def _step(attend: Any, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients at q, k and v."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def _inputs(
    batch: int, length: int, heads: tuple[int, int], size: int, device: str
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Normalised bfloat16 queries and keys, values inside a wider tensor; and a gradient."""
    H, G = heads
    q = F.rms_norm(torch.randn(batch, length, H, size, device=device), (size,)).to(BF16)
    k = F.rms_norm(torch.randn(batch, length, G, size, device=device), (size,)).to(BF16)
    wide = torch.randn(batch, length, (H + 2 * G) * size, device=device).to(BF16)
    v = wide[..., -G * size :].unflatten(-1, (G, size))
    return (q, k, v), torch.randn(batch, length, H, size, device=device).to(BF16)


# On a GPU: the kernels.


@pytest.mark.hopper
@pytest.mark.flash4
@pytest.mark.parametrize("length", [1, 127, 128, 500, 2048])
@pytest.mark.parametrize("heads", [(8, 4), (4, 4)])
def test_flash4_equals_the_definition(length: int, heads: tuple[int, int]) -> None:
    """Output and gradients lie within the budget of plain bfloat16 against float32."""
    inputs, grad = _inputs(2, length, heads, 64, "cuda")
    actual = _step(lambda q, k, v: causal_attention(q, k, v, "flash4"), inputs, grad)
    plain = _step(plain_attention, inputs, grad)
    exact = _step(plain_attention, tuple(t.float() for t in inputs), grad.float())
    for name, a, p, e in zip(NAMES, actual, plain, exact, strict=True):
        if length == 1 and name in ("dq", "dk"):
            # One position has nothing to choose from: each is a difference of two equal sums over
            # K, times a head's members and a key or query (normalised: at most sqrt(K) long).
            size = grad.float().norm(dim=-1).max() * inputs[2].float().norm(dim=-1).max()
            allowed = rounding_budget(4 * 64, torch.float32) * size.item() * heads[0]
            check(f"flash4 {name} of one position", a.abs().max().item(), allowed)
            continue
        check(f"flash4 {name}", relative_error(a, e), kernel_budget(p, e, BF16))


def _heads_then_attention(
    qkv: Tensor, value_embed: Tensor, gain: Tensor, *rest: Any, embed: bool
) -> Tensor:
    """The definition of `heads_flash4.attend`, in the type of the arguments."""
    chosen = value_embed if embed else None
    q, k, v = reference.split_heads(qkv, chosen, gain, *rest)
    return reference.exclude_self(plain_attention(q, k, v), v)


@pytest.mark.hopper
@pytest.mark.flash4
@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize(
    ("length", "heads"),
    [(60, (8, 4)), (127, (8, 4)), (128, (8, 4)), (2048, (8, 4)), (500, (4, 4)), (500, (8, 2))],
)
def test_heads_and_flash4_equal_their_definition(
    length: int, heads: tuple[int, int], embed: bool
) -> None:
    """Output and gradients lie within the budget of plain bfloat16 against float64.

    The gradient at the joint projection is checked for queries, keys and values apart. That at the
    gains is a sum that nearly cancels, of which bfloat16 leaves little to compare: it is held to
    float32 in the interpreter, below.
    """
    (H, G), K, B = heads, 64, 2
    qkv = torch.randn(B, length, (H + 2 * G) * K, device="cuda").to(BF16)
    value_embed = torch.randn(B, length, G * K, device="cuda").to(BF16)
    gain = torch.rand(H, device="cuda") + 0.5
    grad = torch.randn(B, length, H, K, device="cuda").to(BF16)
    cos, sin = (t[:length].contiguous().cuda() for t in rotary_tables(ModelConfig()))

    def run(attend: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (qkv, value_embed)]
        output = attend(*leaves, gain.requires_grad_(), G, cos, sin)
        used = leaves if embed else leaves[:1]
        d_qkv, *more = torch.autograd.grad(output, used, grad.to(dtype))
        parts = d_qkv.split([H * K, G * K, G * K], dim=-1)
        return [output.detach(), *parts, *more]

    def fused(qkv: Tensor, value_embed: Tensor, *rest: Any) -> Tensor:
        return heads_flash4.attend(qkv, value_embed if embed else None, *rest)

    plain = partial(_heads_then_attention, embed=embed)
    names = ("out", "dq", "dk", "dv", *(["d_embed"] if embed else []))
    found = (run(fused, BF16), run(plain, BF16), run(plain, torch.float64))
    for name, a, p, e in zip(names, *found, strict=True):
        check(f"heads and flash4 {name}", relative_error(a, e), kernel_budget(p, e, BF16))


def _of_one_layer(length: int, heads: tuple[int, int]) -> tuple[Any, ...]:
    """A gradient after XSA, then q, k, v, attention's output and logarithms, on a GPU."""
    (q, k, v), grad = _inputs(2, length, heads, 64, "cuda")
    return grad, q, k, v, *flash4.flash_attention(q, k, v)


@pytest.mark.hopper
@pytest.mark.flash4
@pytest.mark.parametrize("length", [2, 100, 128, 500])
def test_the_rows_numbers_are_the_packages(length: int) -> None:
    """XSA's backward pass writes what the package's kernel before the main one writes.

    Logarithms to the bit; sums of K products within the roundings of both.
    """
    grad, _, _, v, out, lse = _of_one_layer(length, (8, 4))
    d_out, _, row_sums, lse2 = pass_ops.exclude_self_backward_numbers(
        grad, out, v, lse, flash4.padded(length)
    )
    package = flash4.interface()
    their_sums, their_lse2 = torch.full_like(row_sums, 7.0), torch.full_like(lse2, 7.0)
    package._bwd_preprocess(
        out, d_out, their_sums, lse, their_lse2, None, None, None, None,
        package.torch2cute_dtype_map[BF16], 64, 64, flash4.TILE, fake_mode=False,
    )  # fmt: skip
    assert torch.equal(lse2, their_lse2)
    assert row_sums[..., length:].eq(0).all()
    assert their_sums[..., length:].eq(0).all()
    sizes = (out.double() * d_out.double()).abs().sum(-1).transpose(1, 2)
    error = ((row_sums - their_sums)[..., :length].abs() / sizes).max().item()
    check("row sums", error, 2 * rounding_budget(64, torch.float32))


@pytest.mark.hopper
@pytest.mark.flash4
@pytest.mark.parametrize("length", [1, 100, 128, 500])
def test_the_sums_lie_where_the_package_reads_them(length: int) -> None:
    """The package's kernel after the main one makes of sums in our order what they stand for."""
    dq = torch.randn(2, length, 4, 64, device="cuda")
    sums = flash4_stand_in.sums_of(dq, flash4.padded(length))
    package, theirs = flash4.interface(), torch.empty_like(dq, dtype=BF16)
    package._bwd_postprocess_convert(
        sums, theirs, 0.125, None, None, 90, package.torch2cute_dtype_map[BF16], 64, flash4.TILE,
        256, 2, False, fake_mode=False,
    )  # fmt: skip
    assert torch.equal(theirs, (0.125 * dq).to(BF16))


@pytest.mark.hopper
@pytest.mark.flash4
@pytest.mark.parametrize("length", [1, 100, 500, 2048])
def test_the_main_kernel_alone_equals_the_package(length: int) -> None:
    """dK and dV, which no order of adding reaches, to the bit; dQ up to that order's rounding.

    Both read the same rows' numbers: the package's own.
    """
    grad, q, k, v, out, lse = _of_one_layer(length, (8, 4))
    L, package = flash4.padded(length), flash4.interface()
    row_sums, lse2 = (torch.empty(2, 8, L, device="cuda") for _ in range(2))
    package._bwd_preprocess(
        out, grad, row_sums, lse, lse2, None, None, None, None,
        package.torch2cute_dtype_map[BF16], 64, 64, flash4.TILE, fake_mode=False,
    )  # fmt: skip
    sums, dk, dv = flash4.flash_attention_backward_sums(grad, q, k, v, row_sums, lse2)
    their_dq, their_dk, their_dv = by_member(grad, q, k, v, out, lse)
    assert torch.equal(dk, their_dk)
    assert torch.equal(dv, their_dv)
    dq = torch.empty_like(q)
    package._bwd_postprocess_convert(
        sums, dq, 0.125, None, None, 90, package.torch2cute_dtype_map[BF16], 64, flash4.TILE,
        256, 2, False, fake_mode=False,
    )  # fmt: skip
    check("dq", relative_error(dq, their_dq), 2 * rounding_budget(1, BF16))


@pytest.mark.hopper
@pytest.mark.parametrize("length", [1, 100, 128, 2048])
def test_the_head_pass_reads_the_sums(length: int) -> None:
    """From flash4's sums the head pass makes what it makes of dq itself, to one rounding.

    The gains' gradients are compared with float64. Half of dq lies along the finished heads, for
    a sum that cancels would be within any bound.
    """
    B, H, G, K = 2, 8, 4, 64
    dk, dv, qkv = (
        torch.randn(shape, device="cuda").to(BF16)
        for shape in ((2, B, length, G, K), (2, B, length, G, K), (B, length, (H + 2 * G) * K))
    )
    tables = [t[:length].contiguous().cuda() for t in rotary_tables(ModelConfig())]
    heads = reference.rms_norm(qkv[..., : H * K].unflatten(-1, (H, K)).double())
    heads = reference.rotate(heads, *tables)
    dq = torch.randn(B, length, H, K, device="cuda") + heads.float()
    rest = (dk, dv, dv[0], qkv, torch.rand(H, device="cuda") + 0.5, *tables, None, False)
    wanted, wanted_gains = pass_ops.split_heads_backward(dq, *rest, None)
    sums = flash4_stand_in.sums_of(8 * dq, flash4.padded(length))
    found, gains = pass_ops.split_heads_backward(sums, *rest, 0.125)
    check("dqkv", relative_error(found, wanted), rounding_budget(1, BF16))
    exact = (dq.double() * heads).sum((0, 1, 3))
    # A turned dim is a sum of two products: with absolute terms at most sqrt(2) times as long.
    lengths = (t.square().sum((0, 1, 3)).sqrt() for t in (dq.double(), heads))
    sizes = math.sqrt(2) * math.prod(lengths)
    operations = B * length + 2 * K + 32  # sums over rows, of squares and along a head; the rest
    for name, lines in (("dgain of dq", wanted_gains), ("dgain of sums", gains)):
        error = ((lines.sum(0) - exact).abs() / sizes).max().item()
        check(name, error, rounding_budget(operations, torch.float32))


@pytest.mark.hopper
@pytest.mark.flash4
@pytest.mark.parametrize("length", [100, 500, 2048])
def test_handed_over_gradients_equal_those_through_the_package(length: int) -> None:
    """Against float64 the joint gradient errs at most as much as through the helper kernels.

    One rounding is allowed for; dQ has one fewer, and the order of adding differs.
    """
    (H, G), K = (8, 4), 64
    qkv = torch.randn(2, length, (H + 2 * G) * K, device="cuda").to(BF16)
    gain = torch.rand(H, device="cuda") + 0.5
    grad = torch.randn(2, length, H, K, device="cuda").to(BF16)
    cos, sin = (t[:length].contiguous().cuda() for t in rotary_tables(ModelConfig()))
    leaf = qkv.double().requires_grad_()
    q, k, v = reference.split_heads(leaf, None, gain, G, cos, sin)
    output = reference.exclude_self(plain_attention(q, k, v), v)
    (exact,) = torch.autograd.grad(output, leaf, grad.double())
    ways = backward_chains(qkv, gain, G, cos, sin, grad)
    old, new = ways["package"]()[0], ways["handed over"]()[0]
    assert old is not None
    assert new is not None
    parts = (t.split([H * K, G * K, G * K], dim=-1) for t in (old, new, exact))
    for name, o, n, e in zip(("dq", "dk", "dv"), *parts, strict=True):
        allowed = relative_error(o, e) + rounding_budget(1, BF16)
        check(f"handed over {name}", relative_error(n, e), allowed)


@pytest.mark.hopper
@pytest.mark.flash4
def test_the_package_reads_a_member_of_each_group_in_place() -> None:
    """It copies what it cannot read as it lies: not every second head, nor its row sums."""
    (q, _, _), _ = _inputs(2, 512, (8, 4), 64, "cuda")
    lse = torch.zeros(2, 8, 512, device="cuda")
    for r in range(2):
        for member in (q[:, :, r::2], lse[:, r::2]):
            assert flash4.interface().maybe_contiguous(member) is member


@pytest.mark.hopper
@pytest.mark.flash4
def test_flash4_is_opaque_to_the_compiler() -> None:
    """A compiled model without graph breaks has the loss and gradients of the eager one."""
    config = ModelConfig(layers=2, value_embed_layers=(1,), width=256, query_heads=4, kv_heads=2)
    model = random_model(config, dtype=BF16).requires_grad_().cuda()
    model.attention_backend, model.passes_backend = "flash4", "triton"
    ids = torch.randint(config.vocab_size, (2, config.seq_len), device="cuda")
    losses, grads = [], []
    for loss_of in (model.loss, torch.compile(model.loss, fullgraph=True)):
        model.zero_grad()
        loss = loss_of(ids, ids)
        loss.backward()
        losses.append(loss.detach())
        assert model.qo_bank.grad is not None
        grads.append(model.qo_bank.grad.clone())
    check("loss", relative_error(losses[1], losses[0]), rounding_budget(64, BF16))
    check("gradient", relative_error(grads[1], grads[0]), rounding_budget(64, BF16))


# Without one: the glue, over a stand-in for the package.


@pytest.fixture
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, replacement in flash4_stand_in.replacements().items():
        monkeypatch.setattr(flash4, name, replacement)


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize("strided", [False, True])
def test_operators_keep_what_they_promise_the_compiler(strided: bool) -> None:
    """Shapes, strides, types and gradients told to the compiler are those that come out."""
    (q, k, v), _ = _inputs(2, 7, (4, 2), 8, "cpu")
    v = v if strided else v.contiguous()
    arguments = tuple(t.float().requires_grad_() for t in (q, k, v))
    torch.library.opcheck(flash4.flash_attention, arguments)
    plain = tuple(t.detach() for t in arguments)
    out, lse = flash4.flash_attention(*plain)
    grad = torch.randn_like(out)
    backward = (grad, *plain, *_numbers(grad, out, lse))
    torch.library.opcheck(flash4.flash_attention_backward_sums, backward)


def _numbers(grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of output times gradient and logarithms to base 2 of every row, [B, H, L]."""
    more = (0, flash4.padded(lse.shape[2]) - lse.shape[2])
    row_sums = F.pad((grad * out).sum(-1).transpose(1, 2), more)
    return row_sums.contiguous(), F.pad(lse / math.log(2), more, value=math.inf)


@pytest.mark.usefixtures("_on_a_cpu")
def test_gradients_reach_the_right_arguments() -> None:
    """Through the operators, out and the gradients at q, k and v are the definition's."""
    (q, k, v), grad = _inputs(2, 9, (4, 2), 8, "cpu")
    inputs, grad = tuple(t.float() for t in (q, k, v)), grad.float()
    actual = _step(lambda q, k, v: causal_attention(q, k, v, "flash4"), inputs, grad)
    for name, a, e in zip(NAMES, actual, _step(plain_attention, inputs, grad), strict=True):
        check(f"glue {name}", relative_error(a, e), rounding_budget(256, torch.float32))


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)])
def test_members_of_a_group_add_up(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """dq is whole, dk and dv add up over the members; each call reads and writes in place."""
    (q, k, v), grad = _inputs(2, 9, heads, 8, "cpu")
    inputs, grad = tuple(t.float() for t in (q, k, v)), grad.float()
    numbers = _numbers(grad, *flash4.flash_attention(*inputs))
    places = {t.untyped_storage().data_ptr() for t in (*inputs, grad, *numbers)}
    kernel, results = flash4.backward_kernel, set()

    def backward(*arguments: Tensor) -> None:
        assert arguments[0].shape == arguments[1].shape, "as many query heads as keys'"
        assert {t.untyped_storage().data_ptr() for t in arguments[:6]} == places
        results.update(t.untyped_storage().data_ptr() for t in arguments[6:])
        kernel(*arguments)

    monkeypatch.setattr(flash4, "backward_kernel", backward)
    found = flash4.flash_attention_backward_sums(grad, *inputs, *numbers)
    assert {t.untyped_storage().data_ptr() for t in found} == results
    sums, dk, dv = found
    dq = sums.view(-1)[_places(q.shape, sums.shape[2] // 8)] * 8**-0.5
    wanted = _step(plain_attention, inputs, grad)[1:]
    for name, a, e in zip(NAMES[1:], (dq, dk.sum(0), dv.sum(0)), wanted, strict=True):
        check(f"by member {name}", relative_error(a, e), rounding_budget(256, torch.float32))


def _places(shape: torch.Size, length: int) -> Tensor:
    """Where the sums [B, H, L K] hold each element of dQ, whose shape [B, T, H, K] is given."""
    axes = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return heads_triton.sum_at.fn(*axes, shape[2], length, shape[3])


@pytest.mark.parametrize(("heads", "size"), [(1, 64), (3, 64), (2, 32), (1, 8)])
def test_every_sum_has_a_place_of_its_own(heads: int, size: int) -> None:
    """Sums fill whole tiles without gaps; 32 bytes hold 4 columns of two positions 8 apart."""
    places = _places(torch.Size((2, 256, heads, size)), 256)
    order = places.flatten().argsort()
    assert torch.equal(places.flatten()[order], torch.arange(places.numel()))
    axes = torch.meshgrid(*(torch.arange(n) for n in places.shape), indexing="ij")
    _, t, h, d = (axis.flatten()[order].view(-1, 8) for axis in axes)
    assert torch.equal(t - t[:, :1], torch.tensor([0, 0, 8, 8, 0, 0, 8, 8]).expand_as(t))
    assert torch.equal(d - d[:, :1], torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]).expand_as(d))
    assert h.eq(h[:, :1]).all()


@given(length=st.integers(1, 400))
def test_whole_tiles_hold_all_positions(length: int) -> None:
    """As few tiles as do."""
    assert flash4.padded(length) % flash4.TILE == 0
    assert length <= flash4.padded(length) < length + flash4.TILE


HEADS = """
import sys, torch
from kernels import flash4, heads_flash4, pass_ops, reference
from verify import flash4_stand_in
from verify.tolerance import check, relative_error, rounding_budget

for name, replacement in flash4_stand_in.replacements().items():
    setattr(flash4, name, replacement)
for place in ("check_cuda_tensors", "check_rows"):
    setattr(pass_ops, place, lambda **tensors: None)  # the interpreter takes CPU tensors
(h, g, embed), k, (b, t) = map(int, sys.argv[1:]), 8, (2, 19)
draw = torch.Generator().manual_seed(0)

def random(*shape):
    return torch.randn(shape, generator=draw)

leaves = [random(b, t, (h + 2 * g) * k), random(h), *([random(b, t, g * k)] if embed else [])]
angle, grad = random(t, 2), random(b, t, h, k)

def plain(*arguments):
    q, k, v = reference.split_heads(*arguments)
    return reference.exclude_self(flash4_stand_in.plain_attention(q, k, v), v)

def run(attend):
    inputs = [x.clone().requires_grad_() for x in leaves]
    qkv, gain, *more = inputs
    output = attend(qkv, more[0] if more else None, gain, g, angle.cos(), angle.sin())
    return output, *torch.autograd.grad(output, inputs, grad)

names = ("out", "dqkv", "dgain", "dembed")[:4 if embed else 3]
for name, a, e in zip(names, run(heads_flash4.attend), run(plain), strict=True):
    check(name, relative_error(a, e), rounding_budget(64 * k * (b * t + h), torch.float32))
"""


CHAINS = """
import torch
from bench.flash4_variants import backward_chains, forward_chains
from kernels import flash4, pass_ops
from verify import flash4_stand_in
from verify.tolerance import check, relative_error, rounding_budget

for name, replacement in flash4_stand_in.replacements().items():
    setattr(flash4, name, replacement)
for place in ("check_cuda_tensors", "check_rows"):
    setattr(pass_ops, place, lambda **tensors: None)  # the interpreter takes CPU tensors
(b, t), h, g, k = (2, 19), 4, 2, 8
draw = torch.Generator().manual_seed(0)
qkv, gain, angle, grad = (
    torch.randn(shape, generator=draw)
    for shape in ((b, t, (h + 2 * g) * k), (h,), (t, 2), (b, t, h, k)))
ways = backward_chains(qkv, gain, g, angle.cos(), angle.sin(), grad)
for name, a, e in zip(("dqkv", "dembed", "dgain"), *(way() for way in ways.values()), strict=True):
    assert (a is None) == (e is None) == (name == "dembed")
    if a is not None:
        check(name, relative_error(a, e), rounding_budget(64 * k * (b * t + h), torch.float32))
apart, taken_over = forward_chains(*qkv.unflatten(2, (-1, k)).split([h, g, g], dim=2)).values()
(rest, logarithms), (rest_too, _, logarithms_too) = apart(), taken_over()
for a, e in ((rest, rest_too), (logarithms, logarithms_too[..., :t])):
    check("forward", relative_error(a, e), rounding_budget(64 * k, torch.float32))
"""


def test_both_chains_of_the_bench_give_the_same() -> None:
    """Through the package's helper kernels or handed over, interpreted over the stand-in."""
    run_interpreted(CHAINS)


@pytest.mark.parametrize("heads", [("4", "2"), ("4", "4"), ("4", "1")])
@pytest.mark.parametrize("embed", ["0", "1"])
def test_heads_and_attention_join(heads: tuple[str, str], embed: str) -> None:
    """The joint function, interpreted over the stand-in, equals heads, attention, then XSA."""
    run_interpreted(HEADS, *heads, embed)


# What is missing is named.


def test_keys_and_values_must_have_the_same_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel would read values past the last."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    q, k, v = (torch.zeros(1, 3, heads, 64, dtype=BF16) for heads in (4, 2, 1))
    flash4.check_heads(q=q, k=k, v=k)
    with pytest.raises(ValueError, match="k and v must have the same heads"):
        flash4.check_heads(q=q, k=k, v=v)


def test_heads_and_rows_that_do_not_fit_are_named() -> None:
    """Between the fused passes heads have one size, and rows' numbers whole tiles."""
    with pytest.raises(ValueError, match="heads of 64, not 32"):
        flash4.check_sums(torch.zeros(1, 3, 2, 32))
    q = torch.zeros(1, 3, 2, 64)
    fits = torch.zeros(1, 2, 128)
    flash4.check_sums(q, lse2=fits)
    for wrong in (fits[..., :3], fits.double(), torch.zeros(1, 128, 2).transpose(1, 2)):
        with pytest.raises(ValueError, match=r"lse2 .*must be"):
            flash4.check_sums(q, lse2=wrong)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, or with another version, the error gives the command to install it."""
    interface = flash4_package.interface.__wrapped__

    def missing(name: str) -> str:
        raise flash4_package.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flash4_package.metadata, "version", missing)
    for ask in (interface, flash4_package.versions):
        with pytest.raises(RuntimeError, match=r'pip install "flash-attn-4\[cu13\]==4\.0\.0b36"'):
            ask()
    monkeypatch.setattr(flash4_package.metadata, "version", lambda _: "4.0.0b1")
    with pytest.raises(RuntimeError, match=r"4\.0\.0b1 is installed.*pip install"):
        flash4_package.versions()

    def broken(name: str) -> None:
        raise ImportError(f"libcuda is missing, says {name}")

    monkeypatch.setattr(flash4_package.metadata, "version", lambda _: flash4_package.VERSION)
    monkeypatch.setattr(flash4_package.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match=r"libcuda is missing.*pip install"):
        interface()


def test_a_run_without_the_package_stops_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--attention flash4` without its package or with float32 is a ConfigError, not a fallback."""

    def missing() -> None:
        raise RuntimeError("cannot import flash-attn-4")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash4, "versions", missing)
    config = replace(RECORD, attention="flash4")
    with pytest.raises(ConfigError, match="--attention flash4 cannot run here: cannot import"):
        preflight(config)
    with pytest.raises(ConfigError, match="bfloat16"):
        preflight(replace(config, compute_dtype="float32"))
    with pytest.raises(ValueError, match="choose 'sdpa'"):
        flash4.require_flash4("cpu")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda q, k, v: (q.float(), k, v), "q must be bfloat16"),
        (lambda q, k, v: (q, k, v), "q is on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed: Any, message: str) -> None:
    """The operator refuses a wrong type or place, naming the argument."""
    inputs, _ = _inputs(1, 3, (4, 2), 8, "cpu")
    with pytest.raises(ValueError, match=message):
        flash4.attention(*changed(*inputs))


@given(
    batch=st.integers(1, 3), length=st.integers(1, 5), heads=st.sampled_from([(4, 2), (2, 2)]),
    row=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=20)
def test_layouts_that_would_be_copied_are_refused(
    batch: int, length: int, heads: tuple[int, int], row: int
) -> None:
    """Heads at multiples of 16 bytes pass, others are refused by name; the model's own pass."""
    H, G = heads
    q = torch.zeros(batch, length, H, 8, dtype=BF16)
    wide = torch.zeros(batch, length, row + G * 8, dtype=BF16)
    v = wide[..., row:].unflatten(-1, (G, 8))
    fits = row % 8 == 0 or (batch * length == 1 and v.data_ptr() % 16 == 0)
    assert (flash4.misfit(v) is None) == fits
    assert flash4.misfit(q) is None
