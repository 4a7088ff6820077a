"""A block whose sums and norms live in the epilogues of its products, as differentiable functions.

An RMS norm is one factor a row, so a product can read the rows as they are and apply the factor to
what it gives; and a product that ends a branch can add the stream it joins, and enter the next
block. What is left between the products is one pass at the entry of the first block (`enter`) and
the passes over the heads.

Gradient of a norm in this form: F(x, factor of x) depends on factor x alone, so the factor's
gradient is the part along x of the gradient at x with the factor held fixed. Whoever takes a factor
therefore sends none back; `enter`, `mlp_half` and `mlp_enter` account for it.

The model takes them for whole windows, in training and in scoring. Where no gradient is wanted, the
signs that `up_scaled` leaves for the backward pass are written for nothing.

The products are CUTLASS's (kernels/cutlass.py, entry_cutlass.py), the pass is Triton's
(kernels/residual_triton.py); plain meaning: `kernels.reference`.

Letters: D model width, F MLP width, M rows, N and K columns of a product, P partial sums.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import cutlass, entry_cutlass, pass_ops
from kernels.reference import norm_factor


def enter(
    x: Tensor,
    x0: Tensor,
    mix_2D: Tensor,
    damp: float,
    *,
    skip: Tensor | None = None,
    skip_weight_D: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Entry of a block: u = a (x + w skip) + b x0, and its norm as factors.

    Args:
        x, x0, skip: [..., D], bfloat16 on a CUDA device, D a power of two.
        mix_2D: a and b, float32.
        damp: factor on the normalised rows.
        skip_weight_D: w, float32.
        keep: x is wanted once more.

    Returns:
        u for the branch to be added to; u once more, [..., D], and its factors, float32 [...], for
        the products that read them multiplied; and, with `keep`, x for a later block to take as
        skip. Each reader sends its own gradient back, and one pass adds them.

    Raises:
        ValueError: a tensor it cannot take.
    """
    rows = [None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (x, skip, x0)]
    u, again, factor, *kept = _Enter.apply(*rows, skip_weight_D, mix_2D, damp, keep)
    sent = kept[0].view_as(x) if kept else None
    return u.view_as(x), again.view_as(x), factor.view(x.shape[:-1]), sent


def linear_add(x: Tensor, w_NK: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """residual + x @ w^T, [..., N], and partial sums [M, P] of the squares of its rows.

    Args:
        x: [..., K], bfloat16 on a Hopper GPU.
        w_NK: bfloat16.
        residual: [..., N], bfloat16.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, or the library is missing.
    """
    x_MK, residual_MN = (t.reshape(-1, t.shape[-1]).contiguous() for t in (x, residual))
    out_MN, squares_MP = _LinearAdd.apply(x_MK, w_NK.contiguous(), residual_MN)
    return out_MN.view_as(residual), squares_MP


def mlp_half(
    t: Tensor, squares_MP: Tensor, w_up_FD: Tensor, w_down_DF: Tensor, damp: float
) -> Tensor:
    """t + mlp(damp norm(t)), the second half of a block, [..., D].

    Args:
        t: [..., D], bfloat16 on a Hopper GPU.
        squares_MP: partial sums of the squares of t's rows, as `linear_add` gives them.
        w_up_FD, w_down_DF: bfloat16.
        damp: factor on the normalised rows.

    Raises: as `linear_add`.
    """
    t_MD = t.reshape(-1, t.shape[-1]).contiguous()
    factor_M = norm_factor(squares_MP.detach().sum(dim=1), t.shape[-1], damp)
    out_MD = _MlpHalf.apply(t_MD, factor_M, w_up_FD.contiguous(), w_down_DF.contiguous(), damp)
    return out_MD.view_as(t)


def mlp_enter(
    t: Tensor,
    squares_MP: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    damp: float,
    x0: Tensor,
    mix_2D: Tensor,
    next_damp: float,
    *,
    skip: Tensor | None = None,
    skip_weight_D: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`enter` of the next block at `mlp_half` of this one, in the down-projection's epilogue.

    Args:
        t, squares_MP, w_up_FD, w_down_DF, damp: those of `mlp_half`.
        x0, mix_2D, skip, skip_weight_D, keep: those of `enter`.
        next_damp: the damp of `enter`.

    Returns: as `enter`. Raises: as `linear_add`.
    """
    t_MD, *rows = (
        None if r is None else r.reshape(-1, r.shape[-1]).contiguous() for r in (t, x0, skip)
    )
    assert t_MD is not None
    width = t.shape[-1]
    factor_M = norm_factor(squares_MP.detach().sum(dim=1), width, damp)
    weights = w_up_FD.contiguous(), w_down_DF.contiguous()
    u, again, squares, *kept = _MlpEnter.apply(
        t_MD, factor_M, *weights, damp, *rows, mix_2D, skip_weight_D, keep
    )
    factor = norm_factor(squares.sum(dim=1), width, next_damp).view(t.shape[:-1])
    return u.view_as(t), again.view_as(t), factor, kept[0].view_as(t) if kept else None


class _Enter(torch.autograd.Function):
    """One kernel each way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        skip: Tensor | None,
        x0: Tensor,
        skip_weight_D: Tensor | None,
        mix_2D: Tensor,
        damp: float,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        u, factor = pass_ops.mix_factor(x, skip, skip_weight_D, x0, mix_2D, damp)
        ctx.save_for_backward(x, skip, skip_weight_D, x0, mix_2D)
        ctx.mark_non_differentiable(factor)
        # An output that nobody reads would have a gradient of zeros, made and read for nothing.
        return (u, u.view_as(u), factor, x.view_as(x)) if keep else (u, u.view_as(u), factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        du, through, _, *dx_kept = grads
        dx, dx0, d_skip, d_weight, d_mix = _entry_gradients(
            du, through, dx_kept, *ctx.saved_tensors
        )
        return dx, d_skip, dx0, d_weight, d_mix, None, None


class _LinearAdd(torch.autograd.Function):
    """The sum costs nothing backward: its gradient is handed on as it is."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, residual_MN: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_MK, w_NK)
        out_MN, squares_MP = cutlass.linear_add(x_MK, w_NK, residual_MN)
        ctx.mark_non_differentiable(squares_MP)
        return out_MN, squares_MP

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_MK, w_NK = ctx.saved_tensors
        go_MN = grads[0].contiguous()
        return go_MN @ w_NK, go_MN.t() @ x_MK, go_MN


class _MlpHalf(torch.autograd.Function):
    """Two products forward; two backward and the weights' two, which are left to the compiler."""

    @staticmethod
    def forward(
        ctx: Any,
        t_MD: Tensor,
        factor_M: Tensor,
        w_up_FD: Tensor,
        w_down_DF: Tensor,
        damp: float,
    ) -> Tensor:
        post_MF, signs = cutlass.up_scaled(t_MD, w_up_FD, factor_M)
        ctx.save_for_backward(t_MD, factor_M, w_up_FD, w_down_DF, post_MF, signs)
        ctx.damp = damp
        return cutlass.linear_add(post_MF, w_down_DF, t_MD)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        go_MD = grads[0].contiguous()
        dt_MD, d_up, d_down = _mlp_gradients(go_MD, ctx.damp, *ctx.saved_tensors)
        return dt_MD, None, d_up, d_down, None


class _MlpEnter(torch.autograd.Function):
    """`_MlpHalf`, then `_Enter`, whose forward pass is the second product's epilogue."""

    @staticmethod
    def forward(
        ctx: Any,
        t_MD: Tensor,
        factor_M: Tensor,
        w_up_FD: Tensor,
        w_down_DF: Tensor,
        damp: float,
        x0_MD: Tensor,
        skip_MD: Tensor | None,
        mix_2D: Tensor,
        skip_weight_D: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        post_MF, signs = cutlass.up_scaled(t_MD, w_up_FD, factor_M)
        x_MD, u_MD, squares_MP = entry_cutlass.linear_mix(
            post_MF, w_down_DF, t_MD, x0_MD, mix_2D, skip_MD, skip_weight_D
        )
        ctx.save_for_backward(
            t_MD, factor_M, w_up_FD, w_down_DF, post_MF, signs,
            x_MD, skip_MD, skip_weight_D, x0_MD, mix_2D,
        )  # fmt: skip
        ctx.damp = damp
        ctx.mark_non_differentiable(squares_MP)
        entered = (u_MD, u_MD.view_as(u_MD), squares_MP)
        return (*entered, x_MD.view_as(x_MD)) if keep else entered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        du, through, _, *dx_kept = grads
        half, entry = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        dx, dx0, d_skip, d_weight, d_mix = _entry_gradients(du, through, dx_kept, *entry)
        dt_MD, d_up, d_down = _mlp_gradients(dx, ctx.damp, *half)
        return dt_MD, None, d_up, d_down, None, dx0, d_skip, d_mix, d_weight, None


def _entry_gradients(
    du: Tensor,
    through: Tensor,
    dx_kept: Sequence[Tensor],
    x: Tensor,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    x0: Tensor,
    mix_2D: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients at x, x0, the skip, its weight and the mix, by one pass.

    Args:
        du, through: gradients at u, from the branch's sum and through the product.
        dx_kept: that at x from a later block, if any.
        x, skip, skip_weight_D, x0, mix_2D: what the block entered from.
    """
    dx, dx0, sums_P3D, *more = pass_ops.mix_norm_backward(
        du.contiguous(),
        through.contiguous(),
        dx_kept[0].contiguous() if dx_kept else None,
        x,
        x0,
        skip,
        skip_weight_D,
        mix_2D,
        None,
    )
    sums_3D = sums_P3D.sum(dim=0)
    d_skip, d_weight = (more[0], sums_3D[2]) if more else (None, None)
    return dx, dx0, d_skip, d_weight, sums_3D[:2]


def _mlp_gradients(
    go_MD: Tensor,
    damp: float,
    t_MD: Tensor,
    factor_M: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    post_MF: Tensor,
    signs: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at t and the two weights of `mlp_half`, given that at its result."""
    dpre_MF, along_MP = cutlass.dpre_scaled(go_MD, w_down_DF, post_MF, signs, factor_M)
    inverse_square_M = (factor_M / damp).square()
    norm_M = along_MP.sum(dim=1) * inverse_square_M / t_MD.shape[1]
    dt_MD = cutlass.norm_gradient(dpre_MF, w_up_FD, go_MD, t_MD, norm_M)
    return dt_MD, dpre_MF.t() @ t_MD, go_MD.t() @ post_MF
