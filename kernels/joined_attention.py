"""Joint projection, attention `flash4` and XSA as one differentiable function.

The projection's epilogue finishes the heads (kernels/heads_cutlass.py), and attention reads them
where they lie, side by side. Backward, XSA and attention are as in kernels/heads_flash4.py, and one
pass makes the joint gradient of the finished heads' own; the products of the projection's backward
pass are left to the compiler.

Letters: M rows (tokens), D model width, B windows, T positions, H query heads, G key/value heads,
K head size, W joint width (H + 2 G) K, P programs, L positions of whole tiles of flash4's, R = H/G.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import flash4, heads_cutlass, heads_flash4, joined_heads_triton, pass_ops
from kernels.checks import check_cuda_tensors, check_float32, check_shape
from kernels.tiles import HEADS_SUMMING_BLOCK


def attend(
    rows_BTD: Tensor,
    w_WD: Tensor,
    factor_BT: Tensor,
    value_embed: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Causal attention [B, T, H, K] of factor rows @ w^T, without its own values.

    Args:
        rows_BTD: bfloat16 on a Hopper GPU.
        w_WD: bfloat16; query, key and value heads.
        factor_BT: float32, of the rows' norm. It gets no gradient: that is the norm's business,
            which made it (see kernels/epilogue.py).
        value_embed: bfloat16 [B, T, G K], or None.
        gain_H: float32, one a query head.
        kv_heads: G.
        cos: float32 [T, `heads_cutlass.HALF`].
        sin: likewise.

    Raises:
        ValueError: an argument does not fit; the message names it, or says what to choose instead.
        RuntimeError: no Hopper GPU, the library or flash4's package is missing, or a launch failed.
    """
    if len(cos) != rows_BTD.shape[1]:
        raise ValueError(f"cos has {len(cos)} positions, windows {rows_BTD.shape[1]}")
    if value_embed is not None:
        value_embed = value_embed.flatten(0, 1).contiguous()
    windows = rows_BTD.shape[0]
    rows_MD, factor_M = (t.flatten(0, 1).contiguous() for t in (rows_BTD, factor_BT))
    return _Attend.apply(
        rows_MD, w_WD.contiguous(), factor_M, value_embed, gain_H, kv_heads, cos, sin, windows
    )


def views(heads_MW: Tensor, windows: int, kv_heads: int, query_heads: int) -> list[Tensor]:
    """Queries [B, T, H, K], keys and values [B, T, G, K] among joint heads, not copied."""
    heads = heads_MW.unflatten(0, (windows, -1))
    heads = heads.unflatten(2, (query_heads + 2 * kv_heads, -1))
    return list(heads.split([query_heads, kv_heads, kv_heads], dim=2))


class _Attend(torch.autograd.Function):
    """The operators, each way."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_MD: Tensor,
        w_WD: Tensor,
        factor_M: Tensor,
        value_embed_MV: Tensor | None,
        gain_H: Tensor,
        kv_heads: int,
        cos: Tensor,
        sin: Tensor,
        windows: int,
    ) -> Tensor:
        heads_MW, inverse = heads_cutlass.project_heads(
            rows_MD, w_WD, factor_M, value_embed_MV, gain_H, kv_heads, cos, sin
        )
        q, k, v = views(heads_MW, windows, kv_heads, len(gain_H))
        out, lse = flash4.flash_attention(q, k, v)
        ctx.save_for_backward(
            rows_MD, w_WD, heads_MW, inverse, factor_M, gain_H, cos, sin, out, lse
        )
        ctx.kv_heads, ctx.has_embed = kv_heads, value_embed_MV is not None
        return pass_ops.exclude_self(out, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_MD, w_WD, *saved, out, lse = ctx.saved_tensors
        q, k, v = views(saved[0], out.shape[0], ctx.kv_heads, out.shape[2])
        d_heads = heads_flash4.attention_backward(grads[0].contiguous(), q, k, v, out, lse)
        d_joint, sums_PH, *more = joined_heads_backward(*d_heads, *saved, ctx.has_embed)
        d_embed = more[0] if more else None
        d_rows, d_w = d_joint @ w_WD, d_joint.t() @ rows_MD
        return d_rows, d_w, None, d_embed, sums_PH.sum(dim=0), None, None, None, None


@torch.library.custom_op("fairway::joined_heads_backward", mutates_args=())
def joined_heads_backward(
    dq_sums_BHX: Tensor,
    dk_RBTGK: Tensor,
    dv_RBTGK: Tensor,
    dv_more_BTGK: Tensor,
    heads_MW: Tensor,
    inverse_NM: Tensor,
    factor_M: Tensor,
    gain_H: Tensor,
    cos: Tensor,
    sin: Tensor,
    embed: bool,
) -> list[Tensor]:
    """Gradients before norm, rotary and gain; see `kernels.joined_heads_triton`.

    Raises:
        ValueError: an argument is not on one CUDA device with the others or not contiguous, or its
            shape or type does not fit; the message names it.
    """
    check_cuda_tensors(
        dq_sums=dq_sums_BHX,
        dk=dk_RBTGK,
        dv=dv_RBTGK,
        dv_more=dv_more_BTGK,
        heads=heads_MW,
        inverse=inverse_NM,
        factor=factor_M,
        gain=gain_H,
        cos=cos,
        sin=sin,
    )
    _check_backward(
        dq_sums_BHX, dk_RBTGK, dv_RBTGK, dv_more_BTGK, heads_MW, inverse_NM, factor_M, gain_H
    )
    _, _, T, _, K = dk_RBTGK.shape
    check_float32("cos [T, half of the dims that turn]", cos, T, cos.shape[-1])
    check_float32("sin", sin, *cos.shape)
    if 2 * cos.shape[1] > K:
        raise ValueError(f"cos {tuple(cos.shape)} turns more dims than the {K} of a head")
    return joined_heads_triton.joined_heads_backward(
        dq_sums_BHX,
        dk_RBTGK,
        dv_RBTGK,
        dv_more_BTGK,
        heads_MW,
        inverse_NM,
        factor_M,
        gain_H,
        cos,
        sin,
        embed=embed,
    )


@joined_heads_backward.register_fake
def _(
    dq_sums_BHX: Tensor,
    dk_RBTGK: Tensor,
    dv_RBTGK: Tensor,
    dv_more_BTGK: Tensor,
    heads_MW: Tensor,
    inverse_NM: Tensor,
    factor_M: Tensor,
    gain_H: Tensor,
    cos: Tensor,
    sin: Tensor,
    embed: bool,
) -> list[Tensor]:
    M, (G, K) = heads_MW.shape[0], dk_RBTGK.shape[3:]
    sums_PH = gain_H.new_empty((HEADS_SUMMING_BLOCK.count(M), len(gain_H)))
    gradients = [torch.empty_like(heads_MW), sums_PH]
    return [*gradients, heads_MW.new_empty((M, G * K))] if embed else gradients


def _check_backward(
    dq_sums_BHX: Tensor,
    dk_RBTGK: Tensor,
    dv_RBTGK: Tensor,
    dv_more_BTGK: Tensor,
    heads_MW: Tensor,
    inverse_NM: Tensor,
    factor_M: Tensor,
    gain_H: Tensor,
) -> None:
    """Shapes and types of gradients and heads. Raises ValueError."""
    if dk_RBTGK.ndim != 5:
        raise ValueError(f"dk {tuple(dk_RBTGK.shape)} must have 5 dims, [R, B, T, G, K]")
    (_, B, T, G, K), H = dk_RBTGK.shape, gain_H.numel()
    check_shape("dv", dv_RBTGK, *dk_RBTGK.shape)
    check_shape("dv_more [B, T, G, K]", dv_more_BTGK, B, T, G, K)
    check_float32("gain [H]", gain_H, H)
    pass_ops.check_dq_sums(dq_sums_BHX, (B, T, H, K))
    check_shape("heads [M, W]", heads_MW, B * T, (H + 2 * G) * K)
    check_float32("inverse [H + G, M]", inverse_NM, H + G, B * T)
    check_float32("factor [M]", factor_M, B * T)
