"""A stand-in for the package behind attention `flash4`, in plain PyTorch on any device.

Letters: B windows, T positions, L positions of whole tiles, H query heads, G key/value heads,
K head size.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kernels import reference


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, [B, T, H, K], in the type of the arguments throughout."""
    values = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhts,bshk->bthk", _scores(q, k).softmax(-1), values)


def logarithms(q: Tensor, k: Tensor) -> Tensor:
    """Natural logarithm of each row's sum, [B, H, T]."""
    return _scores(q, k).logsumexp(-1)


def replacements() -> dict[str, Any]:
    """What stands for which attribute of `kernels.flash4`, where its kernels cannot run."""
    package = SimpleNamespace(_flash_attn_fwd=_forward, _flash_attn_bwd=_backward)
    return {
        "interface": lambda: package,
        "check_heads": lambda **_: None,
        "check_sums": lambda *_, **__: None,
        "check_size": lambda _: None,
        "require_hopper": lambda _: None,
        "forward_kernel": _forward_kernel,
        "backward_kernel": _main_kernel,
    }


def sums_of(dq_BTHK: Tensor, length: int) -> Tensor:
    """The float32 sums [B, H, L K] that are `dq_BTHK` in flash4's order, with zeros elsewhere."""
    from kernels.heads_triton import sum_at

    B, T, H, K = dq_BTHK.shape
    b, t, h, d = (
        torch.arange(n, device=dq_BTHK.device).view([-1 if i == n_dim else 1 for i in range(4)])
        for n_dim, n in enumerate((B, T, H, K))
    )
    sums = torch.zeros(B, H, length * K, dtype=torch.float32, device=dq_BTHK.device)
    sums.view(-1)[sum_at.fn(b, t, h, d, H, length, K)] = dq_BTHK.float()
    return sums


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
    return plain_attention(q, k, v).contiguous(), logarithms(q, k), None, None, None


def _forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, rest: Tensor, lse2: Tensor, own: Tensor
) -> None:
    """Writes XSA's result and its rows' numbers; of those, the first positions alone."""
    found = reference.exclude_self_parts(plain_attention(q, k, v).contiguous(), v)
    rest.copy_(found[0])
    for to, rows in ((own, found[1]), (lse2, logarithms(q, k) / math.log(2))):
        to[..., : q.shape[1]] = rows


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor,
    *, causal: bool, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Writes dq, dk and dv."""
    assert causal
    row_sums = (grad * out).sum(-1).transpose(1, 2)
    for to, found in zip((dq, dk, dv), _gradients(q, k, v, grad, lse, row_sums), strict=True):
        to.copy_(found)


def _main_kernel(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse2: Tensor, row_sums: Tensor, sums: Tensor,
    dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Adds to the sums, writes dk and dv; rows past the last position must count for nothing."""
    length, size = q.shape[1], q.shape[3]
    assert (row_sums[..., length:] == 0).all()
    assert (lse2[..., length:] == math.inf).all()
    lse = lse2[..., :length] * math.log(2)
    found = _gradients(q, k, v, grad, lse, row_sums[..., :length])
    sums += sums_of(found[0] * math.sqrt(size), lse2.shape[2])
    for to, gradient in zip((dk, dv), found[1:], strict=True):
        to.copy_(gradient)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, row_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """At q, k and v by the formulas, without autograd; the rows' numbers are [B, H, T]."""
    members, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k_all, v_all = (t.repeat_interleave(members, dim=2) for t in (k, v))
    p = (_scores(q, k) - lse.unsqueeze(-1)).exp()
    dp = torch.einsum("bthk,bshk->bhts", grad, v_all)
    ds = scale * p * (dp - row_sums.unsqueeze(-1))
    dk, dv = (
        torch.einsum("bhts,bthk->bshk", weights, rows).unflatten(2, (-1, members)).sum(3)
        for weights, rows in ((ds, q), (p, grad))
    )
    return torch.einsum("bhts,bshk->bthk", ds, k_all), dk, dv
