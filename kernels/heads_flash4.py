"""Head passes, FlashAttention for Hopper and XSA as one differentiable function.

The backward passes hand each other what the package's helper kernels would make in passes of their
own. XSA's leaves the two numbers of every row that attention's asks for. Attention's leaves dQ as
float32 sums in its own order, and the gradients that the R query heads of a group each send their
key/value head apart; the head pass reads both as they lie.

Letters: B windows, T positions, H query heads, G key/value heads, K head size, W joint width,
R = H/G.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import flash4
from kernels.passes import fused_heads, fused_heads_backward


def attend(
    qkv_BTW: Tensor,
    value_embed: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Causal attention [B, T, H, K] between the heads of `qkv`, without its own values.

    `split_heads` of kernels/passes.py, `kernels.flash4.attention`, then `exclude_self`, gradients
    too; arguments, bfloat16 on a Hopper GPU with heads of `flash4.HEAD_SIZE`, and errors are
    theirs.
    """
    value_embed = None if value_embed is None else value_embed.contiguous()
    return _Attend.apply(qkv_BTW.contiguous(), value_embed, gain_H, kv_heads, cos, sin)


class _Attend(torch.autograd.Function):
    """The operators, each way."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        value_embed: Tensor | None,
        gain_H: Tensor,
        kv_heads: int,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        from kernels import pass_ops

        q, k, v = fused_heads(qkv, value_embed, gain_H, kv_heads, cos, sin, None)
        out, lse = flash4.flash_attention(q, k, v)
        ctx.save_for_backward(qkv, gain_H, cos, sin, q, k, v, out, lse)
        ctx.has_embed = value_embed is not None
        return pass_ops.exclude_self(out, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return attend_backward(grads[0].contiguous(), ctx.saved_tensors, ctx.has_embed)


def attend_backward(
    grad_BTHK: Tensor, saved: tuple[Any, ...], has_embed: bool
) -> tuple[Tensor | None, ...]:
    """Gradients at the arguments of `attend`.

    Args:
        grad_BTHK: gradient at its result.
        saved: qkv, gain_H, cos, sin; q, k, v, attention's output and the logarithms of its rows'
            sums.
        has_embed: whether there was an embedding of the values.
    """
    grads = attention_backward(grad_BTHK, *saved[4:])
    scale = grad_BTHK.shape[3] ** -0.5
    return fused_heads_backward(grads, (*saved[:4], None), has_embed, scale)[:-1]


def attention_backward(
    grad_BTHK: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward pass of XSA after attention, up to the heads.

    Args:
        grad_BTHK: gradient at XSA's result, contiguous.
        q, k, v: the heads, [B, T, H, K] and [B, T, G, K].
        out, lse: attention's results.

    Returns:
        dQ as flash4's float32 sums, without the softmax's scale; dK and dV apart, [R, B, T, G, K];
        and XSA's own gradient at v.
    """
    from kernels import pass_ops

    d_out, dv_own, row_sums, lse2 = pass_ops.exclude_self_backward_numbers(
        grad_BTHK, out, v, lse, flash4.padded(q.shape[1])
    )
    return *flash4.flash_attention_backward_sums(d_out, q, k, v, row_sums, lse2), dv_own
