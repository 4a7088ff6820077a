"""Claims about the fused passes: each computes its plain meaning, gradients included."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import pass_ops, passes, reference
from kernels.checks import check_cuda_tensors, check_power_of_two, check_rows
from trainer.config import ModelConfig
from trainer.model import GPT
from verify.interpreter import run_interpreted
from verify.models import random_model
from verify.tolerance import check, kernel_budget, relative_error, rounding_budget

BF16 = torch.bfloat16

INTERPRETED = """
import sys, torch
from hypothesis import given, settings, strategies as st
from kernels import heads_triton, reference, residual_triton
from verify.flash4_stand_in import sums_of
from kernels.tiles import RowBlock
from verify.tolerance import check, relative_error, rounding_budget

blocks = st.builds(RowBlock, st.sampled_from([1, 2, 4]), st.just(4), st.integers(1, 3))
powers = st.sampled_from([8, 16, 32])
many = settings(max_examples=int(sys.argv[1]), deadline=None, derandomize=True, database=None)

def draw(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]

def single(t):
    return None if t is None else t.detach().float()

def compare(names, got, want, operations):
    for name, a, b in zip(names, got, want, strict=True):
        check(name, relative_error(a, b), rounding_budget(operations, torch.float32))

@many
@given(seed=st.integers(0, 99), m=st.integers(1, 11), d=powers, branch=st.booleans(),
       skip=st.booleans(), more=st.booleans(), block=blocks)
def mix_norm(seed, m, d, branch, skip, more, block):
    more = more and (branch or skip)
    x, b, s, x0 = draw(seed, *[(m, d)] * 4)
    w, mix = draw(seed + 1, (d,), (2, d))
    b, s, w = (b if branch else None), (s if skip else None), (w if skip else None)
    u, n, t = reference.mix_norm(x, b, s, w, x0, mix, 0.7)
    du, dn, dt = draw(seed + 2, *[(m, d)] * 3)
    ((u * du).sum() + (n * dn).sum() + (t * dt).sum() * more).backward()
    outputs = residual_triton.mix_norm(
        *(single(a) for a in (x, b, s, w, x0, mix)), 0.7, block)
    compare(("u", "n", "t"), outputs, (u, n, t), 8 * d + 16) if branch or skip else compare(
        ("u", "n"), outputs, (u, n), 8 * d + 16)
    total = outputs[2] if len(outputs) == 3 else single(x)
    dx, dx0, sums, *dskip = residual_triton.mix_norm_backward(
        single(du), single(dn), single(dt) if more else None, total, single(x0), single(s),
        single(w), single(mix), 0.7, block)
    sums = sums.sum(0)
    budget = 32 * (d + m) + 64
    compare(("dx", "dx0", "dmix"), (dx, dx0, sums[:2]), (x.grad, x0.grad, mix.grad), budget)
    if skip:
        compare(("dskip", "dw"), (*dskip, sums[2]), (s.grad, w.grad), budget)

@many
@given(seed=st.integers(0, 99), m=st.integers(1, 11), d=powers, more=st.booleans(), block=blocks)
def add_norm(seed, m, d, more, block):
    x, b, dt, dn = draw(seed, *[(m, d)] * 4)
    t, n = reference.add_norm(x, b, 0.3)
    ((t * dt).sum() * more + (n * dn).sum()).backward()
    got = residual_triton.add_norm(single(x), single(b), 0.3, block)
    compare(("t", "n"), got, (t, n), 8 * d + 16)
    dx = residual_triton.add_norm_backward(
        single(dt) if more else None, single(dn), got[0], 0.3, block)
    compare(("dx",), (dx,), (x.grad,), 32 * d + 64)

@many
@given(seed=st.integers(0, 99), b=st.integers(1, 2), t=st.integers(1, 6),
       heads=st.sampled_from([(4, 2), (2, 2), (4, 1)]), half=st.integers(1, 4),
       embed=st.booleans(), scaled=st.booleans(), parts=st.integers(0, 3), block=blocks)
def heads(seed, b, t, heads, half, embed, scaled, parts, block):
    (h, g), k = heads, 8
    qkv, value_embed = draw(seed, (b, t, (h + 2 * g) * k), (b, t, g * k))
    scale = (draw(seed + 5, (b, t))[0].detach().exp().float() if scaled else None)
    gain, angle = draw(seed + 1, (h,), (t, half))
    cos, sin = angle.detach().cos().float(), angle.detach().sin().float()
    value_embed = value_embed if embed else None
    want = reference.split_heads(qkv, value_embed, gain, g, cos, sin, scale)
    grads = draw(seed + 2, *[w.shape for w in want])
    dq, dk, dv = grads
    more, = draw(seed + 3, dv.shape)
    ((want[0] * dq).sum() + (want[1] * dk).sum() + (want[2] * (dv + more)).sum()).backward()
    dk, dv = (single(x) for x in (dk, dv))
    if parts:  # gradients that come in parts are drawn apart; the last part makes up the sum
        (dk, dv), apart = (dk[None], dv[None]), draw(seed + 4, *[(parts - 1, *dk.shape)] * 2)
        dk, dv = (
            torch.cat((single(x), whole - single(x).sum(0, keepdim=True)))
            for x, whole in zip(apart, (dk, dv), strict=True))
    got = heads_triton.split_heads(
        single(qkv), single(value_embed), single(gain), g, cos, sin, block, scale_BT=scale)
    assert len(got) == (3 if embed or scaled else 2)
    compare("qkv"[:len(got)], got, want[:len(got)], 16 * k)
    dqkv, sums, *d_embed = heads_triton.split_heads_backward(
        single(dq), dk, dv, single(more), single(qkv), single(gain), cos, sin, block,
        scale_BT=scale, embed_apart=embed and scaled)
    if embed and scaled:
        compare(("dembed",), d_embed, (value_embed.grad,), 64 * k)
    compare(("dqkv", "dgain"), (dqkv, sums.sum(0)), (qkv.grad, gain.grad), 64 * k * (b * t + h))
    # The same from float32 sums of four times dq, in flash4's order.
    again, sums, *_ = heads_triton.split_heads_backward(
        sums_of(4 * single(dq), 64), dk, dv, single(more), single(qkv), single(gain), cos, sin,
        RowBlock(2 * block.rows, 4, block.programs), scale_BT=scale, dq_factor=0.25)
    assert torch.equal(again, dqkv)
    compare(("dgain",), (sums.sum(0),), (gain.grad,), 64 * k * (b * t + h))

@many
@given(seed=st.integers(0, 99), b=st.integers(1, 2), t=st.integers(1, 6),
       heads=st.sampled_from([(4, 2), (2, 2), (4, 1)]), zero=st.booleans(),
       more=st.integers(0, 3), block=blocks)
def exclude_self(seed, b, t, heads, zero, more, block):
    (h, g), k = heads, 8
    y, v, grad = draw(seed, (b, t, h, k), (b, t, g, k), (b, t, h, k))
    if zero:
        v.data[0, 0, 0] = 0
    want = reference.exclude_self(y, v)
    want.backward(grad)
    wide = torch.full((b, t, 5 + g * k), 7.0)  # values are columns of a joint projection
    wide[..., 5:] = single(v).flatten(2)
    columns = wide.as_strided((b, t, g, k), (t * (5 + g * k), 5 + g * k, k, 1), 5)
    got = heads_triton.exclude_self(single(y), columns, block)
    dy, dv = heads_triton.exclude_self_backward(single(grad), single(y), columns, block)
    compare(("y", "dy"), (got, dy), (want, y.grad), 16 * k)
    assert not dv.isnan().any()
    there = v.norm(dim=-1) > 0
    # Short values magnify every rounding.
    worst = max([0.0, *(1 / v.norm(dim=-1)[there]).tolist()])
    check("dv", relative_error(dv[there], v.grad[there]),
          rounding_budget(64 * k, torch.float32) * max(1.0, worst))
    # With what flash4 asks of every row: sums of y dy and logarithms to base 2, past the end too.
    lse = single(draw(seed + 1, (b, h, t))[0])
    *gradients, row_sums, lse2 = heads_triton.exclude_self_backward_numbers(
        single(grad), single(y), columns, lse, t + more, block)
    assert torch.equal(gradients[0], dy) and torch.equal(gradients[1], dv)
    products = single(y).double() * dy.double()
    sizes = products.abs().sum(-1).transpose(1, 2)
    error = (row_sums[..., :t] - products.sum(-1).transpose(1, 2)).abs() / sizes
    check("row sums", error.max().item(), rounding_budget(k, torch.float32))
    exact = lse.double() / torch.tensor(2.0, dtype=torch.float64).log()
    check("lse2", relative_error(lse2[..., :t], exact), rounding_budget(2, torch.float32))
    assert row_sums[..., t:].eq(0).all() and lse2[..., t:].eq(float("inf")).all()

globals()[sys.argv[2]]()
"""


@pytest.mark.parametrize("name", ["mix_norm", "add_norm", "heads", "exclude_self"])
def test_passes_equal_the_reference_in_the_interpreter(name: str) -> None:
    """Every fused pass and its backward, interpreted, equals float64 autograd of its meaning."""
    run_interpreted(INTERPRETED, "8", name)


MODEL = """
import sys, torch
from kernels import flash4, pass_ops
from trainer.model import GPT
from verify import flash4_stand_in
from verify.models import random_model
from verify.tolerance import check, relative_error, rounding_budget

for check_place in ("check_cuda_tensors", "check_rows"):
    setattr(pass_ops, check_place, lambda **tensors: None)  # the interpreter takes CPU tensors
for name, replacement in flash4_stand_in.replacements().items():
    setattr(flash4, name, replacement)
plain = random_model().requires_grad_()
fused = GPT(plain.config, passes="triton", attention=sys.argv[1])
fused.load_state_dict(plain.state_dict())
ids, targets = torch.randint(64, (2, 2, 24), generator=torch.Generator().manual_seed(0))
want = plain.loss(ids, targets)
want.backward()
compiled = torch.compile(fused.loss, fullgraph=True, backend="aot_eager")
got = compiled(ids, targets)
got.backward()
depth = 40 * plain.config.layers * plain.config.width
check("loss", relative_error(got, want), rounding_budget(depth, torch.float32))
grads = dict(fused.named_parameters())
for name, p in plain.named_parameters():
    assert p.grad is not None and p.grad.any(), name
    error = relative_error(grads[name].grad, p.grad)
    check(name, error, rounding_budget(depth, torch.float32))
with torch.no_grad():
    last = fused.hidden(ids, last=3)
    check("last", relative_error(last, plain.hidden(ids)[:, -3:]),
          rounding_budget(depth, torch.float32))
"""


@pytest.mark.parametrize("attention", ["sdpa", "flash4"])
def test_the_model_with_fused_passes_equals_the_plain_one(attention: str) -> None:
    """Loss and every gradient through the compiler's whole graph equal the plain model's."""
    run_interpreted(MODEL, attention)


def test_gradients_in_parts_are_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys' gradient in two parts with the values' in one is refused, and told why."""
    monkeypatch.setattr(pass_ops, "check_cuda_tensors", lambda **_: None)
    one, table = torch.zeros(1, 2, 2, 8), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="must be of one shape"):
        pass_ops.split_heads_backward(
            one, torch.stack((one, one)), one, one, torch.zeros(1, 2, 48), torch.ones(2),
            table, table, None, False, None,
        )  # fmt: skip


@pytest.mark.parametrize("scale", [torch.ones(1, 3), torch.ones(1, 2, dtype=BF16)])
def test_a_scale_that_does_not_fit_is_refused(
    scale: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factor of every row is float32 and there is one a row."""
    monkeypatch.setattr(pass_ops, "check_cuda_tensors", lambda **_: None)
    table = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"scale .* must be float32"):
        pass_ops.split_heads(torch.zeros(1, 2, 48), None, torch.ones(2), 2, table, table, scale)


INTERFACE = """
import sys, torch
from kernels import pass_ops, passes
from verify.tolerance import check, relative_error, rounding_budget

pass_ops.check_cuda_tensors = lambda **tensors: None  # the interpreter takes CPU tensors
g = torch.Generator().manual_seed(3)
b, t, h, kv, k = 2, 5, 4, 2, 8
shapes = [(b, t, (h + 2 * kv) * k), (h,), *([(b, t, kv * k)] if sys.argv[1] == "1" else [])]
drawn = [torch.randn(s, generator=g) for s in shapes]
scale, angle = torch.rand(b, t, generator=g) + 0.5, torch.randn(t, 2, generator=g)
grads = [torch.randn(b, t, n, k, generator=g) for n in (h, kv, kv, kv)]

def run(backend):
    leaves = [x.clone().requires_grad_() for x in drawn]
    factor = scale.clone().requires_grad_()
    qkv, gain, *embed = leaves
    outputs = passes.split_heads(qkv, embed[0] if embed else None, gain, kv,
                                 angle.cos(), angle.sin(), factor, backend=backend)
    found = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    assert torch.autograd.grad(outputs, factor, grads, allow_unused=True) == (None,)
    return *outputs, *found

for n, (a, e) in enumerate(zip(run("triton"), run("reference"), strict=True)):
    check(str(n), relative_error(a, e), rounding_budget(64 * k * (b * t + h), torch.float32))
arguments = (drawn[0], drawn[2] if len(drawn) == 3 else None, drawn[1], kv,
             angle.cos(), angle.sin(), scale)
torch.library.opcheck(pass_ops.split_heads, arguments)
pass_ops.check_rows = pass_ops.check_cuda_tensors
y, v, grad = (torch.randn(b, t, n, k, generator=g) for n in (h, kv, h))
torch.library.opcheck(pass_ops.exclude_self_backward_numbers,
                      (grad, y, v, torch.randn(b, h, t, generator=g), 8))
dq, dk, dv, more = grads
torch.library.opcheck(pass_ops.split_heads_backward, (
    dq, dk, dv, more, drawn[0], drawn[1], angle.cos(), angle.sin(), scale, len(drawn) == 3, None))
"""


@pytest.mark.parametrize("embed", ["0", "1"])
def test_heads_of_rows_that_lack_their_factor(embed: str) -> None:
    """Both backends agree on outputs and gradients, and neither sends the factor one."""
    run_interpreted(INTERFACE, embed)


def test_rotary_tables_cover_every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of another length are refused: the kernels would read past their end."""
    monkeypatch.setattr(pass_ops, "check_cuda_tensors", lambda **_: None)
    qkv, heads = torch.zeros(1, 3, 32), torch.zeros(1, 3, 2, 8)
    kv, table = torch.zeros(1, 3, 1, 8), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="must have a row for each of 3 positions"):
        pass_ops.split_heads(qkv, None, torch.ones(2), 1, table, table, None)
    with pytest.raises(ValueError, match="must have a row for each of 3 positions"):
        pass_ops.split_heads_backward(
            heads, kv, kv, kv, qkv, torch.ones(2), table, table, None, False, None
        )


# What is refused.


@pytest.fixture
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are let through, so that what else is asked of them is reached."""
    for place in ("check_cuda_tensors", "check_rows"):
        monkeypatch.setattr(pass_ops, place, lambda **_: None)


def _entry(**changes: Any) -> dict[str, Any]:
    """Fitting arguments of the entry of a block, but for their place, some of them changed."""
    names = ("x", "branch", "skip", "x0", "t", "du", "dn", "dt")
    fitting = {name: torch.zeros(4, 8, dtype=BF16) for name in names}
    weights = {"skip_weight_D": torch.zeros(8), "mix_2D": torch.zeros(2, 8), "damp": 0.5}
    return fitting | weights | changes


ENTRIES = {
    pass_ops.mix_norm: ("x", "branch", "skip", "skip_weight_D", "x0", "mix_2D", "damp"),
    pass_ops.mix_factor: ("x", "skip", "skip_weight_D", "x0", "mix_2D", "damp"),
    pass_ops.mix_norm_backward: (
        "du", "dn", "dt", "t", "x0", "skip", "skip_weight_D", "mix_2D", "damp",
    ),
    pass_ops.add_norm: ("x", "branch", "damp"),
    pass_ops.add_norm_backward: ("dt", "dn", "t", "damp"),
}  # fmt: skip
"""Operators over the residual stream, and their arguments by name."""


@pytest.mark.usefixtures("_anywhere")
@pytest.mark.parametrize("operator", ENTRIES, ids=str)
def test_rows_of_another_shape_are_refused(operator: Any) -> None:
    """A tensor shorter or narrower than the stream is named: a kernel would read past its end."""
    names = [name for name in ENTRIES[operator] if name not in ("skip_weight_D", "mix_2D", "damp")]
    for name in names:
        for shape in ((3, 8), (4, 4), (4, 8, 1)):
            given = _entry(**{name: torch.zeros(shape, dtype=BF16)})
            # Where the first is the odd one, it is another that does not fit.
            with pytest.raises(ValueError, match=rf"\b{name}\b"):
                operator(*(given[n] for n in ENTRIES[operator]))


@pytest.mark.usefixtures("_anywhere")
@pytest.mark.parametrize(
    "operator", [pass_ops.mix_norm, pass_ops.mix_factor, pass_ops.mix_norm_backward], ids=str
)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"skip_weight_D": None}, "skip_weight is missing"),
        ({"skip": None}, "skip is missing"),
        ({"skip_weight_D": torch.zeros(4)}, r"skip_weight \[D\] must be float32 \(8,\)"),
        ({"skip_weight_D": torch.zeros(8, dtype=BF16)}, r"skip_weight \[D\] must be float32"),
        ({"mix_2D": torch.zeros(8)}, r"mix \[2, D\] must be float32 \(2, 8\)"),
        ({"mix_2D": torch.zeros(2, 8, dtype=BF16)}, r"mix \[2, D\] must be float32"),
    ],
)
def test_weights_of_an_entry_that_do_not_fit_are_refused(
    operator: Any, changes: dict[str, Any], words: str
) -> None:
    """A skip comes with its weight and the reverse; weights are float32, one a channel."""
    given = _entry(**changes)
    with pytest.raises(ValueError, match=words):
        operator(*(given[name] for name in ENTRIES[operator]))


def test_place_and_layout_of_the_weights_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mix and skip weight are asked for the stream's device and for contiguity, like the stream."""
    seen: dict[str, Tensor | None] = {}
    monkeypatch.setattr(pass_ops, "check_cuda_tensors", lambda **tensors: seen.update(tensors))
    given = _entry(mix_2D=torch.zeros(2, 4))
    for operator in (pass_ops.mix_norm, pass_ops.mix_factor, pass_ops.mix_norm_backward):
        seen.clear()
        with pytest.raises(ValueError, match="mix"):
            operator(*(given[name] for name in ENTRIES[operator]))
        assert {"x0", "mix", "skip_weight"} <= seen.keys()


@pytest.mark.usefixtures("_anywhere")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"padded": 2}, "padded 2 must be at least the 3 positions"),
        ({"lse": torch.zeros(2, 4, 2)}, r"lse \[B, H, T\] must be float32 \(2, 4, 3\)"),
        ({"lse": torch.zeros(2, 4, 3).double()}, r"lse .* must be float32"),
        ({"grad": torch.zeros(2, 3, 2, 8)}, "grad .* must be"),
        ({"v": torch.zeros(2, 2, 2, 8)}, "v .* must be"),
        ({"v": torch.zeros(2, 3, 8, 8)}, "v has 8 heads, more than the 4"),
        ({"v": torch.zeros(2, 3, 3, 8)}, "kv_heads 3 must be a power of two"),
    ],
)
def test_rows_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    """Rows past the last position are written too, but never fewer rows than positions."""
    heads = {name: torch.zeros(2, 3, 4, 8) for name in ("grad", "y")}
    others = {"v": torch.zeros(2, 3, 2, 8), "lse": torch.zeros(2, 4, 3), "padded": 4}
    given = heads | others | changes
    with pytest.raises(ValueError, match=words):
        pass_ops.exclude_self_backward_numbers(*given.values())
    if not {"padded", "lse"} & changes.keys():
        with pytest.raises(ValueError, match=words):
            pass_ops.exclude_self_backward(given["grad"], given["y"], given["v"])


@pytest.mark.usefixtures("_anywhere")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dq": torch.zeros(1, 2, 1, 8)}, r"dq \[B, T, H, K\]"),
        ({"dq_factor": 0.5}, r"dq as sums .* must be float32 \(1, 2, 1024\)"),
        ({"dk": torch.zeros(3, 1, 1, 2, 8), "dv": torch.zeros(3, 1, 1, 2, 8)}, r"dk \[\.\.\."),
        ({"dv_more": torch.zeros(1, 1, 2, 8)}, "dv_more"),
        ({"qkv": torch.zeros(1, 2, 40)}, "qkv"),
    ],
)
def test_gradients_at_heads_that_do_not_fit_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    """Every gradient has a row for each position; flash4's sums fill whole tiles."""
    given = {name: torch.zeros(1, 2, 2, 8) for name in ("dq", "dk", "dv", "dv_more")}
    given |= {"qkv": torch.zeros(1, 2, 48), "gain": torch.ones(2)}
    tables = {"cos": torch.zeros(2, 2), "sin": torch.zeros(2, 2)}
    rest = {"scale": None, "embed_apart": False, "dq_factor": None}
    with pytest.raises(ValueError, match=words):
        pass_ops.split_heads_backward(*(given | tables | rest | changes).values())


@pytest.mark.usefixtures("_anywhere")
def test_a_joint_projection_that_does_not_fit_is_refused() -> None:
    """Its width holds whole heads, and there is a value embedding for each of its rows."""
    heads = (torch.ones(2), 1, torch.zeros(3, 2), torch.zeros(3, 2), None)
    with pytest.raises(ValueError, match=r"width 34 does not hold 2 \+ 2 \* 1 heads"):
        pass_ops.split_heads(torch.zeros(1, 3, 34), None, *heads)
    with pytest.raises(ValueError, match=r"value_embed .* must be \(1, 3, 8\)"):
        pass_ops.split_heads(torch.zeros(1, 3, 32), torch.zeros(1, 2, 8), *heads)


def test_an_unknown_backend_is_no_fused_one() -> None:
    """Each pass refuses a name that it does not know before it looks at a tensor."""
    x, heads, one = torch.zeros(2, 8), torch.zeros(1, 2, 1, 8), torch.ones(1)
    calls = (
        lambda: passes.mix_norm(x, x, torch.zeros(2, 8), 1.0, backend="tritn"),
        lambda: passes.add_norm(x, x, 1.0, backend="tritn"),
        lambda: passes.split_heads(x, None, one, 1, x, x, backend="tritn"),
        lambda: passes.exclude_self(heads, heads, backend="tritn"),
    )
    for call in calls:
        with pytest.raises(ValueError, match="unknown backend 'tritn'; choose one of reference"):
            call()


@given(st.integers(1, 4096))
def test_only_powers_of_two_are_taken(size: int) -> None:
    """Sizes that Triton cannot block are named, with the way out."""
    if size in [2**n for n in range(13)]:
        check_power_of_two(width=size)
    else:
        with pytest.raises(ValueError, match=f"width {size} .*'reference'"):
            check_power_of_two(width=size)


def test_tensors_elsewhere_are_refused() -> None:
    """A tensor on the CPU is named."""
    with pytest.raises(ValueError, match="skip is on cpu"):
        check_cuda_tensors(branch=None, skip=torch.zeros(1))
    with pytest.raises(ValueError, match="v is on cpu"):
        check_rows(v=torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(("name", "device"), [("triton", "cpu"), ("fast", "cuda")])
def test_passes_that_cannot_run_are_refused(name: str, device: str) -> None:
    """A backend that cannot run on the device is refused before any work."""
    with pytest.raises(ValueError, match=name):
        passes.require_passes(name, device)


def test_sizes_that_fused_passes_cannot_take_are_refused() -> None:
    """Before any work `triton` refuses a width that is no power of two; plain passes take it."""
    passes.require_passes("triton", "cuda", width=512, kv_heads=4)
    passes.require_passes("reference", "cuda", width=768)
    with pytest.raises(ValueError, match="width 768"):
        passes.require_passes("triton", "cuda", width=768, kv_heads=4)


# On a GPU: bfloat16, the record's widths.


def _bf16(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).cuda().to(BF16) for s in shapes]


def _gradients(function: Any, inputs: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """Outputs and input gradients of `function`, for output gradients drawn from a fixed seed."""
    leaves = [t.detach().to(d).requires_grad_() for t, d in zip(inputs, dtypes, strict=True)]
    outputs = [t for t in function(*leaves) if t is not None]
    g = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=g).cuda().to(BF16).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(outputs, leaves, grads)
    return [*(o.detach() for o in outputs), *found]


def _within_budget(what: str, function: Any, inputs: list[Tensor], float32: set[int]) -> None:
    """Fused against float32, allowed twice the error of plain bfloat16 and one rounding."""
    dtypes = [torch.float32 if n in float32 else BF16 for n in range(len(inputs))]
    fused = _gradients(lambda *a: function("triton", *a), inputs, dtypes)
    plain = _gradients(lambda *a: function("reference", *a), inputs, dtypes)
    exact = _gradients(lambda *a: function("reference", *a), inputs, [torch.float32] * len(inputs))
    for n, (f, p, e) in enumerate(zip(fused, plain, exact, strict=True)):
        check(f"{what} {n}", relative_error(f, e), kernel_budget(p, e, BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 777, 8192])
@pytest.mark.parametrize("skip", [False, True])
def test_mix_norm_on_the_gpu(rows: int, skip: bool) -> None:
    """The entry of a block within budget, all outputs and gradients."""
    stream = [(rows, 512)] * (4 if skip else 3)
    inputs = [*_bf16(rows, *stream), *_bf16(1, (2, 512), (512,))]

    def run(backend: str, x: Tensor, branch: Tensor, x0: Tensor, *rest: Tensor) -> Any:
        *skips, mix, w = rest
        return passes.mix_norm(
            x, x0, mix + 0 * w.sum(), 0.5, branch=branch, skip=skips[0] if skips else None,
            skip_weight_D=w if skips else None, keep_sum=True, backend=backend,
        )  # fmt: skip

    _within_budget("mix_norm", run, inputs, {len(inputs) - 1, len(inputs) - 2})


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 777, 8192])
def test_add_norm_on_the_gpu(rows: int) -> None:
    """The pass between attention and MLP within budget."""
    inputs = _bf16(rows, (rows, 512), (rows, 512))

    def run(backend: str, x: Tensor, branch: Tensor) -> Any:
        return passes.add_norm(x, branch, 0.5, backend=backend)

    _within_budget("add_norm", run, inputs, set())


@pytest.mark.gpu
@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_head_passes_on_the_gpu(embed: bool, scaled: bool) -> None:
    """Norm, rotary, gain and XSA within budget."""
    cos, sin = (t.cuda()[:65].contiguous() for t in _tables())
    inputs = _bf16(3, (3, 65, 1024), (8,), (3, 65, 256))
    scale = torch.linspace(0.25, 4, 3 * 65, device="cuda").view(3, 65) if scaled else None

    def run(backend: str, qkv: Tensor, gain: Tensor, value_embed: Tensor) -> Any:
        chosen = value_embed if embed else None
        q, k, *v = passes.split_heads(qkv, chosen, gain, 4, cos, sin, scale, backend=backend)
        return q + 0 * value_embed.sum(), k, *v

    _within_budget("split_heads", run, inputs, {1})
    y_v = _bf16(4, (3, 65, 8, 64), (3, 65, 4, 64))
    _within_budget(
        "exclude_self", lambda b, y, v: (passes.exclude_self(y, v, backend=b),), y_v, set()
    )


def _tables() -> tuple[Tensor, Tensor]:
    from trainer.layers import rotary_tables

    return rotary_tables(ModelConfig())


@pytest.mark.gpu
def test_compiled_model_with_fused_passes_on_the_gpu() -> None:
    """Loss and gradients of a compiled bfloat16 model stay within twice the plain model's error."""
    config = ModelConfig(layers=5, seq_len=256, mlp_width=256, value_embed_layers=(1, 4))
    weights = random_model(config).state_dict()
    ids, targets = torch.randint(1024, (2, 4, 256), generator=torch.Generator().manual_seed(0))

    def run(dtype: torch.dtype, backend: Any, compiled: bool) -> list[Tensor]:
        model = GPT(config, compute_dtype=dtype, passes=backend).cuda()
        model.load_state_dict(weights)
        loss_of: Any = torch.compile(model.loss, fullgraph=True) if compiled else model.loss
        loss = loss_of(ids.cuda(), targets.cuda())
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    exact = run(torch.float32, "reference", False)
    plain, fused = run(BF16, "reference", False), run(BF16, "triton", True)
    for n, (f, p, e) in enumerate(zip(fused, plain, exact, strict=True)):
        check(f"tensor {n}", relative_error(f, e), kernel_budget(p, e, BF16))


def test_reference_mix_norm_reads_as_its_formula() -> None:
    """u = a (x + branch + w skip) + b x0, and n is u over its root mean square, damped."""
    x, b, s, x0 = torch.randn(4, 3, 8, dtype=torch.float64)
    w, mix = torch.randn(8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    u, n, t = reference.mix_norm(x, b, s, w, x0, mix, 0.5)
    budget = rounding_budget(16, torch.float64)
    check("t", relative_error(t, x + b + w * s), budget)
    check("u", relative_error(u, mix[0] * (x + b + w * s) + mix[1] * x0), budget)
    root = (u.square().mean(-1, keepdim=True) + reference.EPS).sqrt()
    check("n", relative_error(n, 0.5 * u / root), budget)
