"""Other ways to call the flash4 kernels, to be measured beside those that the model uses.

Letters: B windows, T positions, H query heads, G key/value heads, K head size, R = H/G.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import flash4, heads_flash4, pass_ops
from kernels.passes import fused_heads, fused_heads_backward

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, T, H, K], k and v [B, T, G, K] to the output [B, T, H, K]; differentiable."""


def variants() -> dict[str, Attend]:
    """By name: what differs from `kernels.flash4.attention`."""
    return {
        "flash4, heads apart forward": _attend({"pack_gqa": False}, _together),
        "flash4, tiles 128x128 forward": _attend({"tile_mn": (128, 128)}, _together),
        "flash4, backward by member": _attend({}, _by_member),
        "flash4, deterministic": _attend({}, _in_fixed_order),
    }


def _attend(forward: dict[str, Any], backward: Callable[..., tuple[Tensor, ...]]) -> Attend:
    return lambda q, k, v: _Attention.apply(q, k, v, forward, backward)


class _Attention(torch.autograd.Function):
    """Attention with options of the package's forward pass, and a backward pass of choice."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        options: dict[str, Any],
        backward: Callable[..., tuple[Tensor, ...]],
    ) -> Tensor:
        out, lse, *_ = flash4.interface()._flash_attn_fwd(
            q_BTHK, k_BTGK, v_BTGK, causal=True, return_lse=True, **options
        )
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGK, out, lse)
        ctx.chosen = backward
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.chosen(grads[0].contiguous(), *ctx.saved_tensors), None, None


def _together(grad: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    """As `kernels.flash4.attention`."""
    return flash4.flash_attention_backward(grad, *saved)


def _in_fixed_order(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """Sums in one order, so that gradients repeat to the bit."""
    return flash4.interface()._flash_attn_bwd(
        q, k, v, out, grad, lse, causal=True, deterministic=True
    )


def _by_member(grad: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the R calls are added here; in the model the head pass does so."""
    dq, dk, dv = by_member(grad, *saved)
    return dq, dk.sum(0), dv.sum(0)


def by_member(
    grad_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    out_BTHK: Tensor,
    lse_BHT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One call of the package for the r-th query head of every group, helper kernels included.

    Returns:
        dq [B, T, H, K]; dk and dv [R, B, T, G, K], to be summed over R.
    """
    R = q_BTHK.shape[2] // k_BTGK.shape[2]
    dq = q_BTHK.new_empty(q_BTHK.shape)
    dk_RBTGK, dv_RBTGK = (t.new_empty((R, *t.shape)) for t in (k_BTGK, v_BTGK))
    for r in range(R):
        q, grad, out, member = (t[:, :, r::R] for t in (q_BTHK, grad_BTHK, out_BTHK, dq))
        flash4.interface()._flash_attn_bwd(
            q, k_BTGK, v_BTGK, out, grad, lse_BHT[:, r::R], causal=True,
            dq=member, dk=dk_RBTGK[r], dv=dv_RBTGK[r],
        )  # fmt: skip
    return dq, dk_RBTGK, dv_RBTGK


def backward_chains(
    qkv_BTW: Tensor, gain_H: Tensor, kv_heads: int, cos: Tensor, sin: Tensor, grad_BTHK: Tensor
) -> dict[str, Callable[[], tuple[Tensor | None, ...]]]:
    """XSA's, attention's and the heads' backward pass of one layer, by name.

    `package` lets the package's helper kernels run between them; `handed over` is the model's way.
    Each gives the gradients at qkv, the value embedding (None) and the gains.
    """
    of_heads = (qkv_BTW, gain_H, cos, sin)
    q, k, v = fused_heads(qkv_BTW, None, gain_H, kv_heads, cos, sin, None)
    out, lse = flash4.flash_attention(q, k, v)

    def through_the_package() -> tuple[Tensor | None, ...]:
        d_out, dv_own = pass_ops.exclude_self_backward(grad_BTHK, out, v)
        dq, dk, dv = by_member(d_out, q, k, v, out, lse)
        grads = (dq, dk, dv, dv_own)
        return fused_heads_backward(grads, (*of_heads, None), has_embed=False)[:3]

    def handed_over() -> tuple[Tensor | None, ...]:
        saved = (*of_heads, q, k, v, out, lse)
        return heads_flash4.attend_backward(grad_BTHK, saved, has_embed=False)[:3]

    return {"package": through_the_package, "handed over": handed_over}


def forward_chains(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """XSA of attention, and logarithms to base 2: in passes of their own, or as in the model."""

    def apart() -> object:
        out, lse = flash4.flash_attention(q, k, v)
        return pass_ops.exclude_self(out, v), lse * math.log2(math.e)

    return {
        "apart": apart,
        "in the epilogue": lambda: flash4.flash_attention_exclude_self(q, k, v),
    }
