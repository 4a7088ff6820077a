"""Head passes and FlashAttention for Hopper as one differentiable function.

The R query heads of a group each send their key/value head a gradient. Attention's backward pass
leaves the R apart, which spares it float32 sums in memory, and the head pass adds them as it reads
them. Between two functions autograd would add them in a pass of its own.

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
    scale_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention [B, T, H, K] between the heads of `qkv`, and the values [B, T, G, K].

    `kernels.passes.split_heads` followed by `kernels.flash4.attention`, gradients too; arguments,
    bfloat16 on a Hopper GPU, and errors are theirs.
    """
    value_embed = None if value_embed is None else value_embed.contiguous()
    return _Attend.apply(qkv_BTW.contiguous(), value_embed, gain_H, kv_heads, cos, sin, scale_BT)


class _Attend(torch.autograd.Function):
    """Both operators, each way."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        value_embed: Tensor | None,
        gain_H: Tensor,
        kv_heads: int,
        cos: Tensor,
        sin: Tensor,
        scale_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = fused_heads(qkv, value_embed, gain_H, kv_heads, cos, sin, scale_BT)
        out, lse = flash4.flash_attention(q, k, v)
        ctx.save_for_backward(qkv, gain_H, cos, sin, scale_BT, q, k, v, out, lse)
        ctx.has_embed = value_embed is not None
        return out, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_heads, attended = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        d_out, dv_more = (g.contiguous() for g in grads)
        dq, dk, dv = flash4.flash_attention_backward_by_member(d_out, *attended)
        return fused_heads_backward((dq, dk, dv, dv_more), of_heads, ctx.has_embed)
