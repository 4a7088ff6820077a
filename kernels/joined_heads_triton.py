# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (the type checker does not know what triton.jit makes of a function)
"""Backward pass of the projection that finishes its heads (kernels/heads_cutlass.py), in Triton.

The heads as stored are normed, turned and scaled; with the factor of each one's norm they say all
that the gradient needs, so the projection is neither kept nor made again. Gradients are read as
flash4's backward kernel leaves them; one joint gradient is written, so that the projection's
products stay single.

Meaning: `kernels.reference.project_heads_backward`.

Letters: M rows (tokens), B windows, T positions, H query heads, G key/value heads, K head size,
W joint width (H + 2 G) K, P programs, L positions of whole tiles of flash4's, R parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.heads_triton import added, dq_of_sums, turn
from kernels.tiles import HEADS_SUMMING_BLOCK, RowBlock


@triton.jit
def _gradient(
    heads, inverse, turned, other, out, row, inside, factor, c, s, partner, gain, per_gain, M,
    W: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Gradient before factor, norm, rotary and gain, into columns of width W; the gain's, by row.

    `turned` is the gradient after them, `other` the same at the partner of every dim that turns;
    `per_gain` is 1 / gain, or 0 where there is none. Gradient and head are both turned back first,
    each against partners from memory: what then stays in registers is as little as can be.
    """
    h, d = tl.arange(0, HEADS)[None, :, None], tl.arange(0, K)[None, None, :]
    at = row * W + h * K
    turns = inside & (d < 2 * HALF)
    straight = turned * c - other * s  # turned back: the rotation's transpose
    y = tl.load(heads + at + d, mask=inside, other=0.0).to(tl.float32)
    y_other = tl.load(heads + at + partner, mask=turns, other=0.0).to(tl.float32)
    normed = per_gain * (y * c - y_other * s)
    along = tl.sum(straight * normed, axis=2, keep_dims=True)
    scale = factor * gain * tl.load(inverse + h * M + row, mask=inside, other=0.0)
    dx = scale * (straight - normed * (along / K))
    tl.store(out + at + d, dx.to(out.dtype.element_ty), mask=inside)
    return along


@triton.jit
def joined_heads_backward_kernel(
    dq_sums, dk, dv, dv_more, heads, inverse, factors, gain, cos, sin, d_joint, d_embed, sums,
    B, T, L, dq_factor,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, EMBED: tl.constexpr,
):  # fmt: skip
    """Joint gradient of every P-th group of rows, and partial sums of the gains'.

    With EMBED, the gradient at the value embedding too. Windows are L rows apart here, of which the
    first T exist; half a group of rows lies 8 behind the other half, as flash4's sums do.
    """
    W: tl.constexpr = (H + 2 * G) * K
    gains = tl.load(gain + tl.arange(0, H))[None, :, None]
    per_gains = tl.where(gains == 0.0, 0.0, 1.0 / gains)
    column = tl.arange(0, G * K)[None, None, :]
    k_head, d = tl.arange(0, G)[None, :, None], tl.arange(0, K)[None, None, :]
    sum_gain = tl.zeros((ROWS, H, 1), dtype=tl.float32)
    n = tl.arange(0, ROWS)[:, None, None]
    M = B * T
    apart = M * G * K
    for first in range(tl.program_id(0) * ROWS, B * L, tl.num_programs(0) * ROWS):
        b = first // L
        start = first % L // 16 * 16 + first % 16 // 2
        t = start + n % (ROWS // 2) + n // (ROWS // 2) * 8
        row, inside = b * T + t, t < T
        turns = inside & (d < 2 * HALF)
        c, s, partner = turn(cos, sin, row, T, HALF, K)
        factor = tl.load(factors + row, mask=inside, other=0.0)
        turned, other = dq_of_sums(dq_sums, b, start, L, H, K, HALF, ROWS)
        sum_gain += _gradient(
            heads, inverse, dq_factor * turned, dq_factor * other, d_joint, row, inside, factor, c,
            s, partner, gains, per_gains, M, W, H, K, HALF,
        )  # fmt: skip
        at = (row * G + k_head) * K
        turned = added(dk, at + d, inside, apart, PARTS)
        other = added(dk, at + partner, turns, apart, PARTS)
        _gradient(
            heads + H * K, inverse + H * M, turned, other, d_joint + H * K, row, inside, factor, c,
            s, partner, 1.0, 1.0, M, W, G, K, HALF,
        )  # fmt: skip
        values = added(dv, row * (G * K) + column, inside, apart, PARTS)
        values += added(dv_more, row * (G * K) + column, inside, 0, 1)
        if EMBED:
            to = d_embed + row * (G * K) + column
            tl.store(to, values.to(d_embed.dtype.element_ty), mask=inside)
        values = (factor * values).to(d_joint.dtype.element_ty)
        tl.store(d_joint + (H + G) * K + row * W + column, values, mask=inside)
    at = tl.program_id(0) * H + tl.arange(0, H)
    tl.store(sums + at[:, None], tl.sum(sum_gain, axis=0))


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
    block: RowBlock = HEADS_SUMMING_BLOCK,
    *,
    embed: bool = False,
) -> list[Tensor]:
    """Gradient at the projection's product, [M, W], and partial sums [P, H] of that at the gains.

    Where a gain is exactly 0 the stored query has lost its direction: 0/0 counts as 0, so that the
    gain's gradient is 0 there, and the query's is 0 as it should be.

    Args:
        dq_sums_BHX: flash4's float32 sums, X = L K, which times 1/sqrt(K) are the gradient at q;
            `kernels.heads_triton.sum_at` says where which lies.
        dk_RBTGK, dv_RBTGK: gradients at k and v, to be added up over R.
        dv_more_BTGK: another at v.
        heads_MW, inverse_NM: `project_heads`' results, N = H + G.
        factor_M, gain_H, cos, sin: its arguments, float32.
        block: rows, from 2 to 16, and programs.
        embed: the gradient at the value embedding, [M, G K], comes third.
    """
    parts, B, T, G, K = dk_RBTGK.shape
    H = len(gain_H)
    assert block.rows in (2, 4, 8, 16), "pairs of rows 8 apart"
    programs = block.count(B * T)
    d_joint = torch.empty_like(heads_MW)
    d_embed = heads_MW.new_empty((B * T, G * K)) if embed else d_joint
    sums = gain_H.new_empty((programs, H))
    joined_heads_backward_kernel[(programs,)](
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
        d_joint,
        d_embed,
        sums,
        B,
        T,
        dq_sums_BHX.shape[2] // K,
        K**-0.5,
        H=H,
        G=G,
        K=K,
        HALF=cos.shape[1],
        ROWS=block.rows,
        PARTS=parts,
        EMBED=embed,
        num_warps=block.warps,
    )
    return [d_joint, sums, d_embed] if embed else [d_joint, sums]
