"""Other ways to call the flash4 kernels, to be measured beside one call for all heads.

Letters: B windows, T positions, H query heads, G key/value heads, K head size, R = H/G.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import flash4

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
    """One call for the r-th query head of every group, as the model calls it.

    The gradients of the R calls are added here; in the model the head pass does so as it reads.
    """
    dq, dk, dv = flash4.flash_attention_backward_by_member(grad, *saved)
    return dq, dk.sum(0), dv.sum(0)
