# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (the type checker does not know what triton.jit makes of a function)
"""Passes over the attention heads in Triton: norm, rotary and gain before it, XSA after it.

The joint projection [M, (H + 2 G) K] is read once and leaves as queries, keys and values; the
backward pass writes one joint gradient, so that the projection's products stay single. A factor of
each row, left out of the projection's input, is made good on the way. Arithmetic
is float32 between one load and one store of every element. A rotary partner lies 8 elements away
in the same cache line; it is loaded a second time rather than exchanged between threads.

Meaning: `kernels.reference.split_heads` and `exclude_self`.

Letters: M rows (tokens), T positions, H query heads, G key/value heads, K head size, W joint
width, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import EPS, SMALLEST_NORM
from kernels.tiles import HEADS_SUMMING_BLOCK, ROW_BLOCK, RowBlock


@triton.jit
def _turn(cos, sin, row, T, HALF: tl.constexpr, K: tl.constexpr):
    """Cosine and signed sine [ROWS, 1, K] of every dim, and the dim each is turned against.

    The sine is positive for the first half, negative for the second, zero beyond.
    """
    d = tl.arange(0, K)
    turned = (d < 2 * HALF)[None, None, :]
    at = (row % T) * HALF + (d % HALF)[None, None, :]
    c = tl.load(cos + at, mask=turned, other=1.0)
    s = tl.load(sin + at, mask=turned, other=0.0)
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    return c, tl.where((d < HALF)[None, None, :], s, -s), partner[None, None, :]


@triton.jit
def _row_factor(scale, row, inside, SCALED: tl.constexpr):
    """The factor of each row, [ROWS, 1, 1], or 1."""
    return tl.load(scale + row, mask=inside, other=0.0) if SCALED else 1.0


@triton.jit
def _normed_and_turned(source, out, row, inside, factor, c, s, partner, gain, eps, W: tl.constexpr,
                       HEADS: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """norm, rotary and gain of HEADS heads, from columns of width W to a tensor of their own."""
    h, d = tl.arange(0, HEADS)[None, :, None], tl.arange(0, K)[None, None, :]
    x = factor * tl.load(source + row * W + h * K + d, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + row * W + h * K + partner, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=2, keep_dims=True) / K + eps)
    y = gain * inverse * (x * c + factor * other * s)
    tl.store(out + (row * HEADS + h) * K + d, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def split_heads_kernel(
    qkv, value_embed, scale, gain, cos, sin, q, k, v, M, T, eps,
    EMBED: tl.constexpr, SCALED: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of q, k and, with EMBED or SCALED, v."""
    W: tl.constexpr = (H + 2 * G) * K
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    inside = row < M
    c, s, partner = _turn(cos, sin, row, T, HALF, K)
    gains = tl.load(gain + tl.arange(0, H))[None, :, None]
    factor = _row_factor(scale, row, inside, SCALED)
    _normed_and_turned(qkv, q, row, inside, factor, c, s, partner, gains, eps, W, H, K)
    _normed_and_turned(qkv + H * K, k, row, inside, factor, c, s, partner, 1.0, eps, W, G, K)
    if EMBED or SCALED:
        column = tl.arange(0, G * K)[None, None, :]
        values = tl.load(qkv + (H + G) * K + row * W + column, mask=inside, other=0.0)
        values = factor * values.to(tl.float32)
        if EMBED:
            more = tl.load(value_embed + row * (G * K) + column, mask=inside, other=0.0)
            values += more.to(tl.float32)
        tl.store(v + row * (G * K) + column, values.to(v.dtype.element_ty), mask=inside)


@triton.jit
def _heads_gradient(source, grad, out, row, inside, factor, c, s, partner, gain, eps, M,
                    W: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr,
                    PARTS: tl.constexpr):  # fmt: skip
    """Gradient before factor, norm, rotary and gain, into columns of width W; the gain's, by row.

    The gradient after them is the sum of PARTS arrays of M rows, one behind the other.
    """
    h, d = tl.arange(0, HEADS)[None, :, None], tl.arange(0, K)[None, None, :]
    x = factor * tl.load(source + row * W + h * K + d, mask=inside, other=0.0).to(tl.float32)
    to = (row * HEADS + h) * K
    turned = tl.load(grad + to + d, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(grad + to + partner, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        more = grad + part * (M * HEADS * K) + to
        turned += tl.load(more + d, mask=inside, other=0.0).to(tl.float32)
        other += tl.load(more + partner, mask=inside, other=0.0).to(tl.float32)
    straight = turned * c - other * s  # turned back: the rotation's transpose
    inverse = tl.rsqrt(tl.sum(x * x, axis=2, keep_dims=True) / K + eps)
    normed = inverse * x
    along = tl.sum(straight * normed, axis=2, keep_dims=True)
    dx = factor * gain * inverse * (straight - normed * along / K)
    tl.store(out + row * W + h * K + d, dx.to(out.dtype.element_ty), mask=inside)
    return along


@triton.jit
def split_heads_backward_kernel(
    dq, dk, dv, dv_more, qkv, scale, gain, cos, sin, dqkv, d_embed, sums, M, T, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, SCALED: tl.constexpr, EMBED: tl.constexpr,
):  # fmt: skip
    """Joint gradient of every P-th group of rows, and partial sums of the gains'.

    With EMBED, the gradient at the values before the rows' factors too.
    """
    W: tl.constexpr = (H + 2 * G) * K
    gains = tl.load(gain + tl.arange(0, H))[None, :, None]
    column = tl.arange(0, G * K)[None, None, :]
    sum_gain = tl.zeros((ROWS, H, 1), dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None, None]
        inside = row < M
        c, s, partner = _turn(cos, sin, row, T, HALF, K)
        factor = _row_factor(scale, row, inside, SCALED)
        sum_gain += _heads_gradient(
            qkv, dq, dqkv, row, inside, factor, c, s, partner, gains, eps, M, W, H, K, 1
        )
        _heads_gradient(
            qkv + H * K, dk, dqkv + H * K, row, inside, factor, c, s, partner, 1.0, eps, M,
            W, G, K, PARTS
        )  # fmt: skip
        values = tl.load(dv + row * (G * K) + column, mask=inside, other=0.0).to(tl.float32)
        values += tl.load(dv_more + row * (G * K) + column, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            more = dv + part * (M * G * K) + row * (G * K) + column
            values += tl.load(more, mask=inside, other=0.0).to(tl.float32)
        if EMBED:
            to = d_embed + row * (G * K) + column
            tl.store(to, values.to(d_embed.dtype.element_ty), mask=inside)
        values = (factor * values).to(dqkv.dtype.element_ty)
        tl.store(dqkv + (H + G) * K + row * W + column, values, mask=inside)
    at = tl.program_id(0) * H + tl.arange(0, H)
    tl.store(sums + at[:, None], tl.sum(sum_gain, axis=0))


@triton.jit
def _unit(v, at, inside, smallest):
    """Unit vectors of the values at `at`, and the lengths they were divided by."""
    values = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(values * values, axis=2, keep_dims=True))
    divisor = tl.maximum(length, smallest)
    return values / divisor, divisor, length


@triton.jit
def exclude_self_kernel(
    y, v, out, M, v_stride, smallest,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of each head's output without its part along its own value."""
    PER_GROUP: tl.constexpr = H // G
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    inside = row < M
    g, d = tl.arange(0, G)[None, :, None], tl.arange(0, K)[None, None, :]
    unit, _, _ = _unit(v, row * v_stride + g * K + d, inside, smallest)
    for r in tl.static_range(PER_GROUP):
        at = (row * H + g * PER_GROUP + r) * K + d
        head = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        rest = head - tl.sum(head * unit, axis=2, keep_dims=True) * unit
        tl.store(out + at, rest.to(out.dtype.element_ty), mask=inside)


@triton.jit
def exclude_self_backward_kernel(
    grad, y, v, dy, dv, M, v_stride, smallest,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the gradients at attention's output and at the values."""
    PER_GROUP: tl.constexpr = H // G
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    inside = row < M
    g, d = tl.arange(0, G)[None, :, None], tl.arange(0, K)[None, None, :]
    unit, divisor, length = _unit(v, row * v_stride + g * K + d, inside, smallest)
    d_unit = tl.zeros((ROWS, G, K), dtype=tl.float32)
    for r in tl.static_range(PER_GROUP):
        at = (row * H + g * PER_GROUP + r) * K + d
        head = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        outer = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        of_head = tl.sum(head * unit, axis=2, keep_dims=True)
        of_outer = tl.sum(outer * unit, axis=2, keep_dims=True)
        rest = outer - of_outer * unit
        tl.store(dy + at, rest.to(dy.dtype.element_ty), mask=inside)
        d_unit -= of_head * outer + of_outer * head
    along = tl.where(length > smallest, tl.sum(d_unit * unit, axis=2, keep_dims=True), 0.0)
    d_values = (d_unit - along * unit) / divisor
    tl.store(dv + (row * G + g) * K + d, d_values.to(dv.dtype.element_ty), mask=inside)


def split_heads(
    qkv: Tensor,
    value_embed: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    block: RowBlock = ROW_BLOCK,
    *,
    scale_BT: Tensor | None = None,
) -> list[Tensor]:
    """q [B, T, H, K], k and, with a value embedding or a scale, v [B, T, G, K].

    Without either, v is the last columns of `qkv` as they are, and is not copied. Meaning:
    `kernels.reference.split_heads`.
    """
    B, T, W = qkv.shape
    H, G = len(gain_H), kv_heads
    K = W // (H + 2 * G)
    q = qkv.new_empty((B, T, H, K))
    k = qkv.new_empty((B, T, G, K))
    written = value_embed is not None or scale_BT is not None
    v = torch.empty_like(k) if written else k
    split_heads_kernel[(triton.cdiv(B * T, block.rows),)](
        qkv,
        qkv if value_embed is None else value_embed,
        gain_H if scale_BT is None else scale_BT,
        gain_H,
        cos,
        sin,
        q,
        k,
        v,
        B * T,
        T,
        EPS,
        EMBED=value_embed is not None,
        SCALED=scale_BT is not None,
        H=H,
        G=G,
        K=K,
        HALF=cos.shape[1],
        ROWS=block.rows,
        num_warps=block.warps,
    )
    return [q, k, v] if written else [q, k]


def split_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dv_more: Tensor,
    qkv: Tensor,
    gain_H: Tensor,
    cos: Tensor,
    sin: Tensor,
    block: RowBlock = HEADS_SUMMING_BLOCK,
    *,
    scale_BT: Tensor | None = None,
    embed_apart: bool = False,
) -> list[Tensor]:
    """Gradient at qkv, [B, T, W], and partial sums [P, H] of that at the gains.

    Gradients that more than one reader sends are added on the way: `dk` and `dv` are both
    [B, T, G, K] or both [parts, B, T, G, K], and `dv_more` is another at v. With `embed_apart`
    that at the value embedding, [B, T, G K], comes third; without a scale it is the last columns
    of the first.
    """
    B, T, _ = qkv.shape
    (H, K), G = dq.shape[2:], dk.shape[-2]
    programs = block.count(B * T)
    dqkv = torch.empty_like(qkv)
    d_embed = qkv.new_empty((B, T, G * K)) if embed_apart else dqkv
    sums = torch.empty((programs, H), dtype=torch.float32, device=qkv.device)
    split_heads_backward_kernel[(programs,)](
        dq,
        dk,
        dv,
        dv_more,
        qkv,
        gain_H if scale_BT is None else scale_BT,
        gain_H,
        cos,
        sin,
        dqkv,
        d_embed,
        sums,
        B * T,
        T,
        EPS,
        H=H,
        G=G,
        K=K,
        HALF=cos.shape[1],
        ROWS=block.rows,
        PARTS=1 if dk.ndim == 4 else dk.shape[0],
        SCALED=scale_BT is not None,
        EMBED=embed_apart,
        num_warps=block.warps,
    )
    return [dqkv, sums, d_embed] if embed_apart else [dqkv, sums]


def exclude_self(y_BTHK: Tensor, v_BTGK: Tensor, block: RowBlock = ROW_BLOCK) -> Tensor:
    """Attention's output without its own values; meaning: `kernels.reference.exclude_self`.

    `v_BTGK` may be columns of a wider tensor: rows at any distance, each contiguous.
    """
    B, T, H, K = y_BTHK.shape
    out = torch.empty_like(y_BTHK)
    exclude_self_kernel[(triton.cdiv(B * T, block.rows),)](
        y_BTHK,
        v_BTGK,
        out,
        B * T,
        v_BTGK.stride(1),
        SMALLEST_NORM,
        H=H,
        G=v_BTGK.shape[2],
        K=K,
        ROWS=block.rows,
        num_warps=block.warps,
    )
    return out


def exclude_self_backward(
    grad_BTHK: Tensor, y_BTHK: Tensor, v_BTGK: Tensor, block: RowBlock = ROW_BLOCK
) -> tuple[Tensor, Tensor]:
    """Gradients at y and v."""
    B, T, H, K = y_BTHK.shape
    dy, dv = torch.empty_like(y_BTHK), v_BTGK.new_empty(v_BTGK.shape)
    exclude_self_backward_kernel[(triton.cdiv(B * T, block.rows),)](
        grad_BTHK,
        y_BTHK,
        v_BTGK,
        dy,
        dv,
        B * T,
        v_BTGK.stride(1),
        SMALLEST_NORM,
        H=H,
        G=v_BTGK.shape[2],
        K=K,
        ROWS=block.rows,
        num_warps=block.warps,
    )
    return dy, dv
