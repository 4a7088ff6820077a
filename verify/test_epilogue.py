"""Claims about a block whose sums and norms live in its products' epilogues.

Letters: M rows, D model width.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import epilogue, reference
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.model import GPT
from trainer.record import RECORD
from trainer.run import preflight
from verify.interpreter import run_interpreted
from verify.models import TINY, random_model
from verify.tolerance import check, kernel_budget, relative_error, rounding_budget

BF16 = torch.bfloat16

ENTRY = """
import torch
from hypothesis import given, settings, strategies as st
from kernels import reference, residual_triton
from kernels.tiles import RowBlock
from verify.tolerance import check, relative_error, rounding_budget

def draw(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]

def single(t):
    return None if t is None else t.detach().float()

blocks = st.builds(RowBlock, st.sampled_from([1, 2, 4]), st.just(4), st.integers(1, 3))

@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 99), m=st.integers(1, 11), d=st.sampled_from([8, 16, 32]),
       skip=st.booleans(), kept=st.booleans(), block=blocks)
def entry(seed, m, d, skip, kept, block):
    x, s, x0 = draw(seed, *[(m, d)] * 3)
    w, mix = draw(seed + 1, (d,), (2, d))
    s, w = (s, w) if skip else (None, None)
    u, factor = reference.mix_factor(x, s, w, x0, mix, 0.7)
    du, dn, dx_kept = draw(seed + 2, *[(m, d)] * 3)
    n = factor.unsqueeze(-1) * u
    ((u * du).sum() + (n * dn).sum() + (x * dx_kept).sum() * kept).backward()
    inputs = [single(t) for t in (x, s, w, x0, mix)]
    got_u, got_factor = residual_triton.mix_factor(*inputs, 0.7, block)
    budget = rounding_budget(8 * d + 16, torch.float32)
    check("u", relative_error(got_u, u), budget)
    check("factor", relative_error(got_factor, factor), budget)
    through = got_factor.unsqueeze(-1) * single(dn)  # at u, with the factor held fixed
    dx, dx0, sums, *dskip = residual_triton.mix_norm_backward(
        single(du), through, single(dx_kept) if kept else None, inputs[0], inputs[3],
        inputs[1], inputs[2], inputs[4], None, block)
    sums = sums.sum(0)
    pairs = [("dx", dx, x.grad), ("dx0", dx0, x0.grad), ("dmix", sums[:2], mix.grad)]
    if skip:
        pairs += [("dskip", *dskip, s.grad), ("dw", sums[2], w.grad)]
    for name, a, b in pairs:
        check(name, relative_error(a, b), rounding_budget(32 * (d + m) + 64, torch.float32))

entry()
"""


def test_entry_of_a_block_equals_the_reference_in_the_interpreter() -> None:
    """u, its factors and every gradient, interpreted, equal float64 autograd of their meaning."""
    run_interpreted(ENTRY)


MODEL = """
import sys, torch
from dataclasses import replace
from kernels import cutlass, epilogue, flash4, joined_attention, mlp, pass_ops, reference
from trainer.model import GPT
from verify import flash4_stand_in
from verify.models import TINY, random_model
from verify.tolerance import check, relative_error, rounding_budget

for check_place in ("check_cuda_tensors", "check_rows"):
    setattr(pass_ops, check_place, lambda **tensors: None)  # the interpreter takes CPU tensors
joined_attention.check_cuda_tensors = pass_ops.check_cuda_tensors
for name, replacement in flash4_stand_in.replacements().items():
    setattr(flash4, name, replacement)
# No CUTLASS on a CPU: its products by their plain meaning.
epilogue.cutlass = epilogue.entry_cutlass = reference
joined_attention.cutlass = joined_attention.heads_cutlass = reference
joined_attention.exclude_self_cutlass = reference
plain_mlp = mlp.load_backend("reference")
mlp.load_backend = lambda name: plain_mlp
layers = int(sys.argv[2])
embedded = (1, layers - 1) if layers > 2 else (1,)
plain = random_model(replace(TINY, layers=layers, value_embed_layers=embedded)).requires_grad_()
halves = []

def joined_blocks(*arguments, **options):
    halves.clear()
    joined.hidden(*arguments, **options)
    return len(halves)

def counted(half):
    def call(*arguments, **options):
        halves.append(half)
        return half(*arguments, **options)
    return call

joined = GPT(plain.config, mlp="cutlass", passes="epilogue", attention=sys.argv[1])
joined.load_state_dict(plain.state_dict())
ids, targets = torch.randint(64, (2, 2, 24), generator=torch.Generator().manual_seed(0))
want = plain.loss(ids, targets)
want.backward()
got = torch.compile(joined.loss, fullgraph=True, backend="aot_eager")(ids, targets)
got.backward()
depth = 40 * plain.config.layers * plain.config.width
budget = rounding_budget(depth, torch.float32)
check("loss", relative_error(got, want), budget)
grads = dict(joined.named_parameters())
for name, p in plain.named_parameters():
    assert p.grad is not None and p.grad.any(), name
    check(name, relative_error(grads[name].grad, p.grad), budget)
scored = torch.compile(joined.hidden, fullgraph=True, backend="aot_eager", dynamic=False)
with torch.no_grad():
    whole = plain.hidden(ids)
    check("hidden", relative_error(joined.hidden(ids), whole), budget)
    check("last", relative_error(scored(ids, last=3), whole[:, -3:]), budget)
    seen, plainly = {}, {}
    joined.hidden(ids, observe=lambda names, x: seen.update({n: x for n in names}))
    plain.hidden(ids, observe=lambda names, x: plainly.update({n: x for n in names}))
    assert seen.keys() == plainly.keys() != set()
    for name, x in plainly.items():
        check(name, relative_error(seen[name], x), budget)
epilogue.mlp_half, epilogue.mlp_enter = counted(epilogue.mlp_half), counted(epilogue.mlp_enter)
assert joined_blocks(ids) == layers, "every block of whole windows is joined"
with torch.no_grad():
    assert joined_blocks(ids) == layers, "without gradients too"
    assert joined_blocks(ids, last=3) == layers - 1, "all but the one that is spared positions"
    assert joined_blocks(ids, observe=lambda names, x: None) == 0, "none that is observed"
    assert joined_blocks(ids, cache=joined.new_cache(2, 24)) == 0, "and none with a cache"
"""


@pytest.mark.parametrize(("attention", "layers"), [("sdpa", 5), ("flash4", 5), ("sdpa", 2)])
def test_the_model_with_joined_blocks_equals_the_plain_one(attention: str, layers: int) -> None:
    """Loss, gradients, scored states and what calibration observes equal the plain model's."""
    run_interpreted(MODEL, attention, str(layers))


def test_half_a_block_has_the_gradients_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """x W^T added to a stream, then t + mlp(damp norm(t)): values and gradients are autograd's."""
    monkeypatch.setattr(epilogue, "cutlass", reference)
    g = torch.Generator().manual_seed(0)
    shapes = [(7, 24), (16, 24), (7, 16), (40, 16), (16, 40), (7, 16)]
    x, w, u, w_up, w_down, go = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    leaves = [t.requires_grad_() for t in (x, w, u, w_up, w_down)]

    def plain() -> Tensor:
        t = u + x @ w.T
        return t + reference.mlp(reference.rms_norm(t) * 0.3, w_up, w_down)

    t, squares = epilogue.linear_add(x, w, u)
    got = epilogue.mlp_half(t, squares, w_up, w_down, 0.3)
    budget = rounding_budget(40 * 16, torch.float64)
    check("value", relative_error(got, plain()), budget)
    grads = torch.autograd.grad(got, leaves, go)
    for name, a, b in zip(
        ("x", "w", "u", "w_up", "w_down"), grads, torch.autograd.grad(plain(), leaves, go),
        strict=True,
    ):  # fmt: skip
        check(name, relative_error(a, b), 64 * budget)


def test_joined_blocks_need_cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another MLP is refused before any work, with the two ways out."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = replace(RECORD, mlp="triton", passes="epilogue", attention="cudnn")
    with pytest.raises(ConfigError, match="--mlp cutlass, or --passes triton"):
        preflight(config)
    with pytest.raises(ValueError, match="need mlp 'cutlass', not 'triton'"):
        GPT(TINY, mlp="triton", passes="epilogue")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_dtype": "float32"}, "--mlp cutlass computes in bfloat16"),
        (
            {"attention": "flash4", "passes": "triton", "model": ModelConfig(query_heads=4)},
            "takes heads of 64, not of 128: choose --attention cudnn, or --passes reference",
        ),
    ],
)
def test_what_the_kernels_cannot_take_ends_before_any_work(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A type or heads that no kernel takes are refused by option, not in the first step."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name in ("require_flash4", "require_backend"):
        monkeypatch.setattr(f"trainer.run.{name}", lambda *_: None)
    with pytest.raises(ConfigError, match=message):
        preflight(replace(RECORD, **changes))


@pytest.mark.hopper
@pytest.mark.parametrize("attention", ["cudnn", "flash4"])
def test_compiled_model_with_joined_blocks_on_the_gpu(attention: Any) -> None:
    """Loss and gradients of a compiled bfloat16 model stay within twice the plain model's error."""
    if attention == "flash4":
        pytest.importorskip("flash_attn.cute")
    config = ModelConfig(layers=5, seq_len=256, mlp_width=256, value_embed_layers=(1, 4))
    weights = random_model(config).state_dict()
    ids, targets = torch.randint(1024, (2, 4, 256), generator=torch.Generator().manual_seed(0))

    def run(dtype: torch.dtype, names: dict[str, Any], compiled: bool) -> dict[str, Tensor]:
        model = GPT(config, compute_dtype=dtype, **names).cuda()
        model.load_state_dict(weights)
        loss_of: Any = torch.compile(model.loss, fullgraph=True) if compiled else model.loss
        loss = loss_of(ids.cuda(), targets.cuda())
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        single = [name for name, grad in found.items() if grad.numel() == 1]
        # A single number is a sum that cancels: its relative error is chance, that of all is not.
        numbers = torch.cat([found.pop(name).flatten() for name in single])
        return {"loss": loss.detach(), "single numbers": numbers, **found}

    exact, plain = run(torch.float32, {}, False), run(BF16, {}, False)
    joined = run(BF16, {"mlp": "cutlass", "passes": "epilogue", "attention": attention}, True)
    assert joined.keys() == plain.keys() == exact.keys()
    for name, e in exact.items():
        check(name, relative_error(joined[name], e), kernel_budget(plain[name], e, BF16))
