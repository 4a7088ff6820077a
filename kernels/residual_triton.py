# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (the type checker does not know what triton.jit makes of a function)
"""Passes over the residual stream in Triton: sums, mixing and RMS norm, each tensor touched once.

Memory decides here: a pass over [98304, 512] bfloat16 takes 0.033 ms on an H100, so a kernel reads
every input and writes every output once, with the arithmetic between in float32. Gradients of the
per-channel weights are sums over all rows: every program adds up its own rows in registers and
stores one line of partial sums, which the caller adds up.

The entry of a block gives the norm in one of two forms: as rows n, or as u and a factor of each row
for the product that reads them to apply (FACTOR). The second form writes neither n nor the sum t,
which the backward pass makes again from what it reads anyway.

The operators of kernels/pass_ops.py check the arguments; the functions here trust that all of
[M, D] are contiguous and of one shape, and that a skip comes with its weight.

Meaning: `kernels.reference.mix_norm`, `mix_factor` and `add_norm`.

Letters: M rows (tokens), D model width, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import EPS
from kernels.tiles import ROW_BLOCK, SKIP_SUMMING_BLOCK, SUMMING_BLOCK, RowBlock


@triton.jit
def _inverse_rms(x, D: tl.constexpr, eps):
    return tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)


@triton.jit
def _norm_gradient(x, grad, D: tl.constexpr, eps):
    """Gradient at x of norm(x), given that at norm(x)."""
    inverse = _inverse_rms(x, D, eps)
    along = tl.sum(grad * x, axis=1) / D
    return inverse[:, None] * grad - (inverse * inverse * inverse * along)[:, None] * x


@triton.jit
def _factor_gradient(x, grad, D: tl.constexpr, eps):
    """Gradient at x of F(x, factor of x), given that at x with the factor held fixed.

    F depends on factor x alone, so that the factor's gradient is the other's part along x.
    """
    square = tl.sum(x * x, axis=1) / D + eps
    along = tl.sum(grad * x, axis=1) / D
    return grad - (along / square)[:, None] * x


@triton.jit
def mix_norm_kernel(
    x, branch, skip, skip_weight, x0, mix, u_out, n_out, t_out, M, damp, eps,
    BRANCH: tl.constexpr, SKIP: tl.constexpr, FACTOR: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of u, n and, unless it is x itself, t; FACTOR: of u and, in place of n, factors."""
    c = tl.arange(0, D)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    at, inside = row * D + c[None, :], row < M
    t = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        t += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    if SKIP:
        weight = tl.load(skip_weight + c)[None, :]
        t += weight * tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
    if (BRANCH or SKIP) and not FACTOR:
        tl.store(t_out + at, t.to(t_out.dtype.element_ty), mask=inside)
    start = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(mix + c)[None, :] * t + tl.load(mix + D + c)[None, :] * start
    tl.store(u_out + at, u.to(u_out.dtype.element_ty), mask=inside)
    factor = damp * _inverse_rms(u, D, eps)[:, None]
    if FACTOR:
        tl.store(n_out + row, factor, mask=inside)
    else:
        tl.store(n_out + at, (factor * u).to(n_out.dtype.element_ty), mask=inside)


@triton.jit
def mix_norm_backward_kernel(
    du, dn, dt, t, x0, skip, skip_weight, mix, dx, dx0, dskip, sums, M, damp, eps,
    MORE: tl.constexpr, SKIP: tl.constexpr, FACTOR: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All gradients of every P-th group of rows; MORE: t has a gradient `dt` of its own.

    FACTOR: `dn` is the gradient at u with the factor held fixed; `t` is x, and `dt` one of x's.
    """
    c = tl.arange(0, D)
    a, b = tl.load(mix + c)[None, :], tl.load(mix + D + c)[None, :]
    weight = a
    if SKIP:
        weight = tl.load(skip_weight + c)[None, :]
    sum_a = tl.zeros((ROWS, D), dtype=tl.float32)
    sum_b = tl.zeros((ROWS, D), dtype=tl.float32)
    sum_w = tl.zeros((ROWS, D), dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        at, inside = row * D + c[None, :], row < M
        stream = tl.load(t + at, mask=inside, other=0.0).to(tl.float32)
        start = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(du + at, mask=inside, other=0.0).to(tl.float32)
        if SKIP:
            joined = tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
            if FACTOR:
                stream += weight * joined
        if FACTOR:
            total += _factor_gradient(a * stream + b * start, grad, D, eps)
        else:
            total += _norm_gradient(a * stream + b * start, damp * grad, D, eps)
        sum_a += total * stream
        sum_b += total * start
        tl.store(dx0 + at, (b * total).to(dx0.dtype.element_ty), mask=inside)
        total = a * total
        if MORE and not FACTOR:
            total += tl.load(dt + at, mask=inside, other=0.0).to(tl.float32)
        if SKIP:
            sum_w += total * joined
            tl.store(dskip + at, (weight * total).to(dskip.dtype.element_ty), mask=inside)
        if MORE and FACTOR:
            total += tl.load(dt + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)
    line = sums + tl.program_id(0) * 3 * D + c
    tl.store(line, tl.sum(sum_a, axis=0))
    tl.store(line + D, tl.sum(sum_b, axis=0))
    tl.store(line + 2 * D, tl.sum(sum_w, axis=0))


@triton.jit
def add_norm_kernel(x, branch, t_out, n_out, M, damp, eps, D: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of t = x + branch and n = damp norm(t)."""
    c = tl.arange(0, D)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    at, inside = row * D + c[None, :], row < M
    t = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    t += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    n = damp * _inverse_rms(t, D, eps)[:, None] * t
    tl.store(t_out + at, t.to(t_out.dtype.element_ty), mask=inside)
    tl.store(n_out + at, n.to(n_out.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_backward_kernel(
    dt, dn, t, dx, M, damp, eps, MORE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS rows of the gradient at both summands; MORE: t has a gradient `dt` of its own."""
    c = tl.arange(0, D)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    at, inside = row * D + c[None, :], row < M
    grad = damp * tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
    total = _norm_gradient(tl.load(t + at, mask=inside, other=0.0).to(tl.float32), grad, D, eps)
    if MORE:
        total += tl.load(dt + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)


def mix_norm(
    x: Tensor,
    branch: Tensor | None,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    x0: Tensor,
    mix_2D: Tensor,
    damp: float,
    block: RowBlock = ROW_BLOCK,
) -> list[Tensor]:
    """u and n, and t unless it is x itself; arguments of `kernels.reference.mix_norm`, [M, D]."""
    (M, D), summed = x.shape, branch is not None or skip is not None
    u, n = torch.empty_like(x), torch.empty_like(x)
    t = torch.empty_like(x) if summed else x
    mix_norm_kernel[(triton.cdiv(M, block.rows),)](
        x,
        x if branch is None else branch,
        x if skip is None else skip,
        mix_2D if skip_weight_D is None else skip_weight_D,
        x0,
        mix_2D,
        u,
        n,
        t,
        M,
        damp,
        EPS,
        BRANCH=branch is not None,
        SKIP=skip is not None,
        FACTOR=False,
        D=D,
        ROWS=block.rows,
        num_warps=block.warps,
    )
    return [u, n, t] if summed else [u, n]


def mix_factor(
    x: Tensor,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    x0: Tensor,
    mix_2D: Tensor,
    damp: float,
    block: RowBlock = ROW_BLOCK,
) -> tuple[Tensor, Tensor]:
    """u [M, D] and its factors [M], float32; arguments, [M, D]: `kernels.reference.mix_factor`."""
    M, D = x.shape
    u = torch.empty_like(x)
    factor = torch.empty(M, dtype=torch.float32, device=x.device)
    mix_norm_kernel[(triton.cdiv(M, block.rows),)](
        x,
        x,
        x if skip is None else skip,
        mix_2D if skip_weight_D is None else skip_weight_D,
        x0,
        mix_2D,
        u,
        factor,
        x,
        M,
        damp,
        EPS,
        BRANCH=False,
        SKIP=skip is not None,
        FACTOR=True,
        D=D,
        ROWS=block.rows,
        num_warps=block.warps,
    )
    return u, factor


def entry_block(skip: bool) -> RowBlock:
    """Block shape of `mix_norm_backward`, with a skip or without."""
    return SKIP_SUMMING_BLOCK if skip else SUMMING_BLOCK


def mix_norm_backward(
    du: Tensor,
    dn: Tensor,
    dt: Tensor | None,
    t: Tensor,
    x0: Tensor,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    mix_2D: Tensor,
    damp: float | None,
    block: RowBlock | None = None,
) -> list[Tensor]:
    """Gradients at x (and branch) and x0, partial sums [P, 3, D] of those at a, b and w; and dskip.

    Args:
        du: gradient at u, [M, D].
        dn: gradient at n; without damp, at u through the product that applies u's factor.
        dt: gradient at t beside what u passes on, or None; without damp, at x.
        t: as the forward pass gave it; without damp, x.
        x0, skip, skip_weight_D, mix_2D: the forward pass's; weights float32.
        damp: that of `mix_norm`, or None after `mix_factor`.
        block: none: `entry_block`'s.
    """
    M, D = t.shape
    block = block or entry_block(skip is not None)
    programs = block.count(M)
    dx, dx0 = torch.empty_like(t), torch.empty_like(t)
    dskip = dx if skip is None else torch.empty_like(t)
    sums = torch.empty((programs, 3, D), dtype=torch.float32, device=t.device)
    mix_norm_backward_kernel[(programs,)](
        du,
        dn,
        du if dt is None else dt,
        t,
        x0,
        t if skip is None else skip,
        mix_2D if skip_weight_D is None else skip_weight_D,
        mix_2D,
        dx,
        dx0,
        dskip,
        sums,
        M,
        damp or 0.0,
        EPS,
        MORE=dt is not None,
        SKIP=skip is not None,
        FACTOR=damp is None,
        D=D,
        ROWS=block.rows,
        num_warps=block.warps,
    )
    return [dx, dx0, sums] if skip is None else [dx, dx0, sums, dskip]


def add_norm(
    x: Tensor, branch: Tensor, damp: float, block: RowBlock = ROW_BLOCK
) -> tuple[Tensor, Tensor]:
    """t and n, [M, D]; meaning: `kernels.reference.add_norm`."""
    M, D = x.shape
    t, n = torch.empty_like(x), torch.empty_like(x)
    grid = (triton.cdiv(M, block.rows),)
    add_norm_kernel[grid](
        x, branch, t, n, M, damp, EPS, D=D, ROWS=block.rows, num_warps=block.warps
    )
    return t, n


def add_norm_backward(
    dt: Tensor | None, dn: Tensor, t: Tensor, damp: float, block: RowBlock = ROW_BLOCK
) -> Tensor:
    """Gradient at x, which is that at branch too, [M, D].

    Args:
        dt: gradient at t beside what n passes on, [M, D], or None.
        dn: gradient at n.
        t: as the forward pass gave it.
        damp: that of `add_norm`.
    """
    M, D = t.shape
    dx = torch.empty_like(t)
    add_norm_backward_kernel[(triton.cdiv(M, block.rows),)](
        dn if dt is None else dt,
        dn,
        t,
        dx,
        M,
        damp,
        EPS,
        MORE=dt is not None,
        D=D,
        ROWS=block.rows,
        num_warps=block.warps,
    )
    return dx
