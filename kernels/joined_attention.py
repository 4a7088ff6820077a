"""The first half of a block, attention `flash4` and XSA included, as one differentiable function.

The projection's epilogue finishes the heads (kernels/heads_cutlass.py), and attention reads them
where they lie, side by side; the out-projection adds the stream. Where a key/value head serves two
query heads, XSA is in the epilogue of attention's kernel (kernels/flash4_epilogue.py), and its
backward pass in that of the out-projection's product (kernels/exclude_self_cutlass.py); else both
are as in kernels/heads_flash4.py. One pass makes the joint gradient of the finished heads' own.
Products whose epilogue is empty are left to the compiler.

Letters: M rows (tokens), D model width, B windows, T positions, H query heads, G key/value heads,
K head size, N = H K, W joint width (H + 2 G) K, P programs or partial sums, L positions of whole
tiles of flash4's, R = H/G.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import (
    cutlass,
    exclude_self_cutlass,
    flash4,
    heads_cutlass,
    heads_flash4,
    joined_heads_triton,
    pass_ops,
)
from kernels.checks import check_cuda_tensors, check_float32, check_shape
from kernels.exclude_self_cutlass import MEMBERS
from kernels.tiles import HEADS_SUMMING_BLOCK


def attention_half(
    rows_BTD: Tensor,
    w_WD: Tensor,
    factor_BT: Tensor,
    value_embed: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    w_out_DN: Tensor,
    residual_BTD: Tensor,
) -> tuple[Tensor, Tensor]:
    """residual + attention(factor rows @ w^T) @ w_out^T, without each head's own value.

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
        w_out_DN: bfloat16.
        residual_BTD: bfloat16, the stream that the half joins.

    Returns:
        The stream [B, T, D], and partial sums [M, P] of the squares of its rows.

    Raises:
        ValueError: an argument does not fit; the message names it, or says what to choose instead.
        RuntimeError: no Hopper GPU, the library or flash4's package is missing, or a launch failed.
    """
    if len(cos) != rows_BTD.shape[1]:
        raise ValueError(f"cos has {len(cos)} positions, windows {rows_BTD.shape[1]}")
    if value_embed is not None:
        value_embed = value_embed.flatten(0, 1).contiguous()
    rows_MD, factor_M, residual_MD = (
        t.flatten(0, 1).contiguous() for t in (rows_BTD, factor_BT, residual_BTD)
    )
    t_MD, squares_MP = _AttentionHalf.apply(
        rows_MD,
        w_WD.contiguous(),
        factor_M,
        value_embed,
        gain_H,
        kv_heads,
        cos,
        sin,
        w_out_DN.contiguous(),
        residual_MD,
    )
    return t_MD.view_as(residual_BTD), squares_MP


def views(heads_MW: Tensor, windows: int, kv_heads: int, query_heads: int) -> list[Tensor]:
    """Queries [B, T, H, K], keys and values [B, T, G, K] among joint heads, not copied."""
    heads = heads_MW.unflatten(0, (windows, -1))
    heads = heads.unflatten(2, (query_heads + 2 * kv_heads, -1))
    return list(heads.split([query_heads, kv_heads, kv_heads], dim=2))


class _AttentionHalf(torch.autograd.Function):
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
        w_out_DN: Tensor,
        residual_MD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        heads_MW, inverse = heads_cutlass.project_heads(
            rows_MD, w_WD, factor_M, value_embed_MV, gain_H, kv_heads, cos, sin
        )
        q, k, v = views(heads_MW, len(rows_MD) // len(cos), kv_heads, len(gain_H))
        rest, *numbers = _attend(q, k, v)
        attended_MN = rest.flatten(0, 1).flatten(1)
        t_MD, squares_MP = cutlass.linear_add(attended_MN, w_out_DN, residual_MD)
        ctx.save_for_backward(
            rows_MD, w_WD, w_out_DN, rest, *numbers,
            heads_MW, inverse, factor_M, gain_H, cos, sin,
        )  # fmt: skip
        ctx.kv_heads, ctx.has_embed = kv_heads, value_embed_MV is not None
        ctx.mark_non_differentiable(squares_MP)
        return t_MD, squares_MP

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_MD, w_WD, w_out_DN, rest, first, second, *of_heads = ctx.saved_tensors
        go_MD, kv_heads = grads[0].contiguous(), ctx.kv_heads
        d_heads = _heads_backward(go_MD, w_out_DN, rest, first, second, of_heads[0], kv_heads)
        d_joint, sums_PH, *more = joined_heads_backward(*d_heads, *of_heads, ctx.has_embed)
        d_embed = more[0] if more else None
        d_rows, d_w = d_joint @ w_WD, d_joint.t() @ rows_MD
        d_w_out = go_MD.t() @ rest.flatten(0, 1).flatten(1)
        d_gain = sums_PH.sum(dim=0)
        return d_rows, d_w, None, d_embed, d_gain, None, None, None, d_w_out, go_MD


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """XSA of attention [B, T, H, K], and the two tensors that `_heads_backward` asks for beside it.

    For groups of two: each row's own and base-2 logarithm, [B, H, L]. Else attention's results,
    the output [B, T, H, K] and logarithms [B, H, T].
    """
    if q.shape[2] == MEMBERS * k.shape[2]:
        return flash4.flash_attention_exclude_self(q, k, v)
    out, lse = flash4.flash_attention(q, k, v)
    return pass_ops.exclude_self(out, v), out, lse


def _heads_backward(
    go_MD: Tensor,
    w_out_DN: Tensor,
    rest: Tensor,
    first: Tensor,
    second: Tensor,
    heads_MW: Tensor,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient at the half's result to those `joined_heads_backward` takes.

    Args:
        go_MD, w_out_DN: gradient, and the out-projection.
        rest, first, second: what `_attend` gave.
        heads_MW: the finished heads.
        kv_heads: G.
    """
    windows, _, query_heads, _ = rest.shape
    q, k, v = views(heads_MW, windows, kv_heads, query_heads)
    if query_heads != MEMBERS * kv_heads:
        grad = (go_MD @ w_out_DN).view_as(rest)
        return heads_flash4.attention_backward(grad, q, k, v, first, second)
    d_out_MN, dv_own_MV, row_sums = exclude_self_cutlass.exclude_self_gradient(
        go_MD, w_out_DN, rest.flatten(0, 1).flatten(1), first, heads_MW
    )
    d_heads = flash4.flash_attention_backward_sums(
        d_out_MN.view_as(rest), q, k, v, row_sums, second
    )
    return *d_heads, dv_own_MV.view(v.shape)


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
