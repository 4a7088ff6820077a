"""A block whose sums and norms live in the epilogues of its products, as differentiable functions.

An RMS norm is one factor a row, so a product can read the rows as they are and apply the factor to
what it gives; and a product that ends a branch can add the stream it joins. What is left between
the products is one pass at the entry of a block (`enter`) and the passes over the heads.

Gradient of a norm in this form: F(x, factor of x) depends on factor x alone, so the factor's
gradient is the part along x of the gradient at x with the factor held fixed. Whoever takes a factor
therefore sends none back; `enter` and `mlp_half` account for it.

The model takes them for whole windows, in training and in scoring. Where no gradient is wanted, the
signs that `up_scaled` leaves for the backward pass are written for nothing.

The products are CUTLASS's (kernels/cutlass.py), the pass is Triton's (kernels/residual_triton.py);
plain meaning: `kernels.reference`.

Letters: D model width, F MLP width, M rows, N and K columns of a product, P partial sums.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import cutlass, pass_ops
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
        x, skip, skip_weight_D, x0, mix_2D = ctx.saved_tensors
        du, through, _, *dx_kept = grads
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
        d_skip = more[0] if more else None
        d_weight = sums_3D[2] if more else None
        return dx, d_skip, dx0, d_weight, sums_3D[:2], None, None


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
        t_MD, factor_M, w_up_FD, w_down_DF, post_MF, signs = ctx.saved_tensors
        go_MD = grads[0].contiguous()
        dpre_MF, along_MP = cutlass.dpre_scaled(go_MD, w_down_DF, post_MF, signs, factor_M)
        inverse_square_M = (factor_M / ctx.damp).square()
        norm_M = along_MP.sum(dim=1) * inverse_square_M / t_MD.shape[1]
        dt_MD = cutlass.norm_gradient(dpre_MF, w_up_FD, go_MD, t_MD, norm_M)
        return dt_MD, None, dpre_MF.t() @ t_MD, go_MD.t() @ post_MF, None
