"""Claims about attention `flash4`: what it computes on a GPU, and what it says where it cannot.

Letters: B windows, T positions, H query heads, G key/value heads, K head size.
"""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import flash4
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.layers import causal_attention
from trainer.record import RECORD
from trainer.run import preflight
from verify.models import random_model
from verify.tolerance import check, kernel_budget, relative_error, rounding_budget

BF16 = torch.bfloat16
NAMES = ("out", "dq", "dk", "dv")


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, in the type of the arguments throughout."""
    repeats, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (t.repeat_interleave(repeats, dim=2) for t in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[3])
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(future, -math.inf).softmax(-1), v)


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


@pytest.fixture
def _installed() -> None:
    try:
        flash4.require_flash4("cuda")
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.hopper
@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("length", [1, 127, 128, 500, 2048])
@pytest.mark.parametrize("heads", [(8, 4), (4, 4)])
def test_flash4_equals_the_definition(length: int, heads: tuple[int, int]) -> None:
    """Output and gradients lie within the budget of plain bfloat16 against float32."""
    inputs, grad = _inputs(2, length, heads, 64, "cuda")
    actual = _step(lambda q, k, v: causal_attention(q, k, v, "flash4"), inputs, grad)
    plain = _step(_plain, inputs, grad)
    exact = _step(_plain, tuple(t.float() for t in inputs), grad.float())
    for name, a, p, e in zip(NAMES, actual, plain, exact, strict=True):
        if length == 1 and name in ("dq", "dk"):
            # One position has nothing to choose from: each is a difference of two equal sums over
            # K, times a head's members and a key or query (normalised: at most sqrt(K) long).
            size = grad.float().norm(dim=-1).max() * inputs[2].float().norm(dim=-1).max()
            allowed = rounding_budget(4 * 64, torch.float32) * size.item() * heads[0]
            check(f"flash4 {name} of one position", a.abs().max().item(), allowed)
            continue
        check(f"flash4 {name}", relative_error(a, e), kernel_budget(p, e, BF16))


@pytest.mark.hopper
@pytest.mark.usefixtures("_installed")
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


def _stand_in() -> SimpleNamespace:
    """The two functions of the package, in plain PyTorch without autograd."""

    def scores_of(q: Tensor, k: Tensor) -> Tensor:
        future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        repeated = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = torch.einsum("bthk,bshk->bhts", q, repeated) / math.sqrt(q.shape[3])
        return scores.masked_fill(future, -math.inf)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, return_lse: bool
    ) -> tuple[Tensor | None, ...]:
        assert causal
        assert return_lse
        return _plain(q, k, v).contiguous(), scores_of(q, k).logsumexp(-1), None, None, None

    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor,
        *, causal: bool, dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        assert causal
        members, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
        k_all, v_all = (t.repeat_interleave(members, dim=2) for t in (k, v))
        p = (scores_of(q, k) - lse.unsqueeze(-1)).exp()
        dp = torch.einsum("bthk,bshk->bhts", grad, v_all)
        ds = scale * p * (dp - (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1))
        dq.copy_(torch.einsum("bhts,bshk->bthk", ds, k_all))
        for to, weights, rows in ((dk, ds, q), (dv, p, grad)):
            each = torch.einsum("bhts,bthk->bshk", weights, rows)
            to.copy_(each.unflatten(2, (-1, members)).sum(3))

    return SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)


@pytest.fixture
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = _stand_in()
    monkeypatch.setattr(flash4, "interface", lambda: stand_in)
    monkeypatch.setattr(flash4, "check_heads", lambda **_: None)
    monkeypatch.setattr(flash4, "require_hopper", lambda _: None)


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize("strided", [False, True])
def test_operators_keep_what_they_promise_the_compiler(strided: bool) -> None:
    """Shapes, strides, types and gradients told to the compiler are those that come out."""
    (q, k, v), _ = _inputs(2, 7, (4, 2), 8, "cpu")
    v = v if strided else v.contiguous()
    arguments = tuple(t.float().requires_grad_() for t in (q, k, v))
    torch.library.opcheck(flash4.flash_attention, arguments)


@pytest.mark.usefixtures("_on_a_cpu")
def test_gradients_reach_the_right_arguments() -> None:
    """Through the operators, out and the gradients at q, k and v are the definition's."""
    (q, k, v), grad = _inputs(2, 9, (4, 2), 8, "cpu")
    inputs, grad = tuple(t.float() for t in (q, k, v)), grad.float()
    actual = _step(lambda q, k, v: causal_attention(q, k, v, "flash4"), inputs, grad)
    for name, a, e in zip(NAMES, actual, _step(_plain, inputs, grad), strict=True):
        check(f"glue {name}", relative_error(a, e), rounding_budget(256, torch.float32))


# What is missing is named.


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, or with another version, the error gives the command to install it."""
    interface = flash4.interface.__wrapped__

    def missing(name: str) -> str:
        raise flash4.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flash4.metadata, "version", missing)
    with pytest.raises(RuntimeError, match=r'pip install "flash-attn-4\[cu13\]==4\.0\.0b36"'):
        interface()
    monkeypatch.setattr(flash4.metadata, "version", lambda _: "4.0.0b1")
    with pytest.raises(RuntimeError, match=r"4\.0\.0b1 is installed.*pip install"):
        interface()

    def broken(name: str) -> None:
        raise ImportError(f"libcuda is missing, says {name}")

    monkeypatch.setattr(flash4.metadata, "version", lambda _: flash4.VERSION)
    monkeypatch.setattr(flash4.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match=r"libcuda is missing.*pip install"):
        interface()


def test_a_run_without_the_package_stops_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--attention flash4` without its package or with float32 is a ConfigError, not a fallback."""

    def missing() -> None:
        raise RuntimeError("cannot import flash-attn-4")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash4, "interface", missing)
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
