# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (the type checker does not know what triton.jit makes of a function)
"""Passes over the attention heads in Triton: norm, rotary and gain before it, XSA after it.

The joint projection [M, (H + 2 G) K] is read once and leaves as queries, keys and values; the
backward pass writes one joint gradient, so that the projection's products stay single. A factor of
each row, left out of the projection's input, is made good on the way. Around flash4's attention
the backward passes take over what its kernels leave: the rows' numbers they read, and the float32
sums of dQ they add up. Arithmetic is float32 between one load and one store of every element. A
rotary partner lies 8 elements away in the same cache line; it is loaded a second time rather than
exchanged between threads.

Meaning: `kernels.reference.split_heads` and `exclude_self`.

Letters: M rows (tokens), B windows, T positions, H query heads, G key/value heads, K head size,
W joint width, P programs, L positions of whole tiles of flash4's.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import EPS, SMALLEST_NORM
from kernels.tiles import HEADS_SUMMING_BLOCK, ROW_BLOCK, RowBlock

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def sum_at(b, t, h, d, H, L, K):
    """Offset of dQ's element [b, t, h, d] in flash4's sums [B, H, L K].

    They lie as its threads held them: a chunk of 64 positions is the accumulator of one group of
    four warps, m64nK of `wgmma` in the PTX manual. Of every 8 columns, each of 128 threads stores
    four numbers: two neighbouring columns at each of two positions 8 apart.
    """
    chunk = ((b * H + h) * L + t // 64 * 64) * K
    thread = t % 64 // 16 * 32 + t % 8 * 4 + d % 8 // 2
    return chunk + d // 8 * 512 + thread * 4 + t // 8 % 2 * 2 + d % 2


@triton.jit
def dq_of_sums(dq, b, t, L, H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
                ROWS: tl.constexpr):  # fmt: skip
    """dQ [ROWS, H, K] of positions t, t+1, ... and as many from t+8 on, from flash4's sums.

    And the same at every dim's rotary partner, 0 where there is none. The sums of ROWS such
    positions are, 8 columns of a head, one run of memory, read as it lies and then put in order.
    """
    PAIRS: tl.constexpr = ROWS // 2
    h, block = tl.arange(0, H)[:, None, None], tl.arange(0, K // 8)[None, :, None]
    n = tl.arange(0, PAIRS * 16)[None, None, :]
    # sum_at(b, t, h, 8 * block, H, L, K), in words that show the compiler multiples of 16.
    run = ((b * H + h) * L + t // 64 * 64) * K + block * 512 + t % 64 // 16 * 128 + t % 8 * 16
    sums = tl.load(dq + run + n)
    position, d = t + n // 16 + n // 2 % 2 * 8, 8 * block + n % 16 // 4 * 2 + n % 2
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    other = tl.load(
        dq + sum_at(b, position, h, partner, H, L, K), mask=d < 2 * HALF, other=0.0
    )  # fmt: skip
    return _in_order(sums, H, K, PAIRS), _in_order(other, H, K, PAIRS)


@triton.jit
def _in_order(sums, H: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr):
    """[H, K/8, 16 PAIRS] as they lie to [2 PAIRS, H, K]."""
    split = tl.reshape(sums, (H, K // 8, PAIRS, 4, 2, 2))
    return tl.reshape(tl.permute(split, (4, 2, 0, 1, 3, 5)), (2 * PAIRS, H, K))


@triton.jit
def turn(cos, sin, row, T, HALF: tl.constexpr, K: tl.constexpr):
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
    c, s, partner = turn(cos, sin, row, T, HALF, K)
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
def added(grad, at, inside, apart, PARTS: tl.constexpr):
    """The sum of PARTS arrays at the same place, each `apart` elements behind the one before."""
    total = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(grad + part * apart + at, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _heads_gradient(source, turned, other, out, row, inside, factor, c, s, gain, eps,
                    W: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Gradient before factor, norm, rotary and gain, into columns of width W; the gain's, by row.

    `turned` is the gradient after them, `other` the same at every dim's partner.
    """
    h, d = tl.arange(0, HEADS)[None, :, None], tl.arange(0, K)[None, None, :]
    x = factor * tl.load(source + row * W + h * K + d, mask=inside, other=0.0).to(tl.float32)
    straight = turned * c - other * s  # turned back: the rotation's transpose
    inverse = tl.rsqrt(tl.sum(x * x, axis=2, keep_dims=True) / K + eps)
    normed = inverse * x
    along = tl.sum(straight * normed, axis=2, keep_dims=True)
    dx = factor * gain * inverse * (straight - normed * along / K)
    tl.store(out + row * W + h * K + d, dx.to(out.dtype.element_ty), mask=inside)
    return along


@triton.jit
def split_heads_backward_kernel(
    dq, dk, dv, dv_more, qkv, scale, gain, cos, sin, dqkv, d_embed, sums, B, T, L, dq_factor, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, SCALED: tl.constexpr, EMBED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Joint gradient of every P-th group of rows, and partial sums of the gains'.

    With EMBED, the gradient at the values before the rows' factors too. Windows are L rows apart
    here, of which the first T exist. With SUMS, dq is flash4's sums, and half a group of rows lies
    8 behind the other half: those share 32 bytes of sums.
    """
    W: tl.constexpr = (H + 2 * G) * K
    gains = tl.load(gain + tl.arange(0, H))[None, :, None]
    column = tl.arange(0, G * K)[None, None, :]
    q_head, k_head = tl.arange(0, H)[None, :, None], tl.arange(0, G)[None, :, None]
    d = tl.arange(0, K)[None, None, :]
    sum_gain = tl.zeros((ROWS, H, 1), dtype=tl.float32)
    n = tl.arange(0, ROWS)[:, None, None]
    for first in range(tl.program_id(0) * ROWS, B * L, tl.num_programs(0) * ROWS):
        if SUMS:
            b = first // L
            start = first % L // 16 * 16 + first % 16 // 2
            t = start + n % (ROWS // 2) + n // (ROWS // 2) * 8
        else:
            b, t = (first + n) // L, (first + n) % L
        row = b * T + t
        inside = (b < B) & (t < T)
        c, s, partner = turn(cos, sin, row, T, HALF, K)
        factor = _row_factor(scale, row, inside, SCALED)
        if SUMS:
            turned, other = dq_of_sums(dq, b, start, L, H, K, HALF, ROWS)
            turned, other = dq_factor * turned, dq_factor * other
        else:
            at = (row * H + q_head) * K
            turned = added(dq, at + d, inside, 0, 1)
            other = added(dq, at + partner, inside, 0, 1)
        sum_gain += _heads_gradient(
            qkv, turned, other, dqkv, row, inside, factor, c, s, gains, eps, W, H, K
        )
        at, apart = (row * G + k_head) * K, B * T * G * K
        turned = added(dk, at + d, inside, apart, PARTS)
        other = added(dk, at + partner, inside, apart, PARTS)
        _heads_gradient(
            qkv + H * K, turned, other, dqkv + H * K, row, inside, factor, c, s, 1.0, eps, W, G, K
        )
        values = added(dv, row * (G * K) + column, inside, apart, PARTS)
        values += added(dv_more, row * (G * K) + column, inside, 0, 1)
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
    grad, y, v, lse, dy, dv, row_sums, lse2, B, T, L, v_stride, smallest,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the gradients at attention's output and at the values.

    Windows are L rows apart here, of which the first T exist. With NUMBERS, what flash4's backward
    pass asks of every row is written too, for all L.
    """
    PER_GROUP: tl.constexpr = H // G
    place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    b, t = place // L, place % L
    row = b * T + t
    known = place < B * L
    inside = known & (t < T)
    g, d = tl.arange(0, G)[None, :, None], tl.arange(0, K)[None, None, :]
    unit, divisor, length = _unit(v, row * v_stride + g * K + d, inside, smallest)
    d_unit = tl.zeros((ROWS, G, K), dtype=tl.float32)
    for r in tl.static_range(PER_GROUP):
        at = (row * H + g * PER_GROUP + r) * K + d
        head = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        outer = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        of_head = tl.sum(head * unit, axis=2, keep_dims=True)
        of_outer = tl.sum(outer * unit, axis=2, keep_dims=True)
        rest = (outer - of_outer * unit).to(dy.dtype.element_ty)
        tl.store(dy + at, rest, mask=inside)
        if NUMBERS:
            line = b * H + g * PER_GROUP + r
            of_row = tl.sum(head * rest.to(tl.float32), axis=2, keep_dims=True)
            logarithm = tl.load(lse + line * T + t, mask=inside, other=float("inf"))
            tl.store(row_sums + line * L + t, of_row, mask=known)
            tl.store(lse2 + line * L + t, logarithm * LOG2_E, mask=known)
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
    dq_factor: float | None = None,
) -> list[Tensor]:
    """Gradient at qkv, [B, T, W], and partial sums [P, H] of that at the gains.

    With a `dq_factor`, `dq` is flash4's float32 sums [B, H, L K] (`sum_at`), to be multiplied by
    it.

    Gradients that more than one reader sends are added on the way: `dk` and `dv` are both
    [B, T, G, K] or both [parts, B, T, G, K], and `dv_more` is another at v. With `embed_apart`
    that at the value embedding, [B, T, G K], comes third; without a scale it is the last columns
    of the first.
    """
    B, T, _ = qkv.shape
    H, (G, K) = len(gain_H), dk.shape[-2:]
    assert dq_factor is None or block.rows in (2, 4, 8, 16), "pairs of rows 8 apart"
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
        B,
        T,
        T if dq_factor is None else dq.shape[2] // K,
        1.0 if dq_factor is None else dq_factor,
        EPS,
        H=H,
        G=G,
        K=K,
        HALF=cos.shape[1],
        ROWS=block.rows,
        PARTS=1 if dk.ndim == 4 else dk.shape[0],
        SCALED=scale_BT is not None,
        EMBED=embed_apart,
        SUMS=dq_factor is not None,
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
    """Gradients at y, [B, T, H, K], and v, [B, T, G, K].

    Args:
        grad_BTHK: gradient at the result of `exclude_self`, contiguous.
        y_BTHK, v_BTGK: its arguments.
    """
    dy, dv = torch.empty_like(y_BTHK), v_BTGK.new_empty(v_BTGK.shape)
    _launch_exclude_self_backward(grad_BTHK, y_BTHK, v_BTGK, None, dy, dv, None, None, block)
    return dy, dv


def exclude_self_backward_numbers(
    grad_BTHK: Tensor,
    y_BTHK: Tensor,
    v_BTGK: Tensor,
    lse_BHT: Tensor,
    padded: int,
    block: RowBlock = ROW_BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients at y and v, and what flash4's backward pass asks of every row, [B, H, L].

    Args:
        grad_BTHK, y_BTHK, v_BTGK: as `exclude_self_backward` takes them; y is flash4's output.
        lse_BHT: float32, natural logarithm of the rows' sums.
        padded: L, at least T.

    Returns:
        dy, dv, the sums over K of y dy (dy as rounded), 0 past T, and the base-2 logarithms of the
        rows' sums, infinite past T; both float32.
    """
    B, _, H, _ = y_BTHK.shape
    dy, dv = torch.empty_like(y_BTHK), v_BTGK.new_empty(v_BTGK.shape)
    row_sums, lse2 = (lse_BHT.new_empty((B, H, padded)) for _ in range(2))
    _launch_exclude_self_backward(grad_BTHK, y_BTHK, v_BTGK, lse_BHT, dy, dv, row_sums, lse2, block)
    return dy, dv, row_sums, lse2


def _launch_exclude_self_backward(
    grad: Tensor,
    y: Tensor,
    v: Tensor,
    lse: Tensor | None,
    dy: Tensor,
    dv: Tensor,
    row_sums: Tensor | None,
    lse2: Tensor | None,
    block: RowBlock,
) -> None:
    """The kernel, with or without the rows' numbers."""
    B, T, H, K = y.shape
    L = T if lse2 is None else lse2.shape[2]
    exclude_self_backward_kernel[(triton.cdiv(B * L, block.rows),)](
        grad,
        y,
        v,
        lse,
        dy,
        dv,
        row_sums,
        lse2,
        B,
        T,
        L,
        v.stride(1),
        SMALLEST_NORM,
        H=H,
        G=v.shape[2],
        K=K,
        ROWS=block.rows,
        NUMBERS=lse2 is not None,
        num_warps=block.warps,
    )
