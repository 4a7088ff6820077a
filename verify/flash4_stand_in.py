"""A stand-in for the package behind attention `flash4`, in plain PyTorch on any device.

Letters: B windows, T positions, H query heads, G key/value heads, K head size.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, [B, T, H, K], in the type of the arguments throughout."""
    values = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhts,bshk->bthk", _scores(q, k).softmax(-1), values)


def replacements() -> dict[str, Any]:
    """What stands for which attribute of `kernels.flash4`, where its kernels cannot run."""
    package = SimpleNamespace(_flash_attn_fwd=_forward, _flash_attn_bwd=_backward)
    return {
        "interface": lambda: package,
        "check_heads": lambda **_: None,
        "require_hopper": lambda _: None,
    }


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled products [B, H, T, T], -inf at later positions."""
    length = q.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    repeated = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bthk,bshk->bhts", q, repeated) / math.sqrt(q.shape[3])
    return scores.masked_fill(future, -math.inf)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, return_lse: bool
) -> tuple[Tensor | None, ...]:
    assert causal
    assert return_lse
    lse = _scores(q, k).logsumexp(-1)
    return plain_attention(q, k, v).contiguous(), lse, None, None, None


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor,
    *, causal: bool, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Writes dq, dk and dv by the formulas, without autograd."""
    assert causal
    members, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k_all, v_all = (t.repeat_interleave(members, dim=2) for t in (k, v))
    p = (_scores(q, k) - lse.unsqueeze(-1)).exp()
    dp = torch.einsum("bthk,bshk->bhts", grad, v_all)
    ds = scale * p * (dp - (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1))
    dq.copy_(torch.einsum("bhts,bshk->bthk", ds, k_all))
    for to, weights, rows in ((dk, ds, q), (dv, p, grad)):
        each = torch.einsum("bhts,bthk->bshk", weights, rows)
        to.copy_(each.unflatten(2, (-1, members)).sum(3))
