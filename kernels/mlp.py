"""The fused MLP as one differentiable function; its implementation is chosen by name.

    y = LeakyReLU(0.5)(x @ w_up^T)^2 @ w_down^T

Two products are opaque to the compiler: the up-projection with its activation, and the backward
product dpre = (go @ w_down) * act_grad. Everything else (the down-projection, dx and both weight
gradients) stays visible to torch.compile, which fuses across layers. Only act_grad and post are
saved besides the inputs. Where gradients are off, the up-projection gives post alone: the same
result to the bit, without storing act_grad for nothing.

Letters: M rows, D model width, F MLP width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import reference


@dataclass(frozen=True)
class Backend:
    """The opaque products of the MLP; `activation` is `up_activation` without act_grad."""

    up_activation: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    activation: Callable[[Tensor, Tensor], Tensor]
    dpre: Callable[[Tensor, Tensor, Tensor], Tensor]


BACKENDS = ("reference", "triton", "cutlass")


def load_backend(name: str) -> Backend:
    """The implementation called `name`; there is no fallback from one to another.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: a piece it needs is missing; the message says how to get it.
    """
    if name == "reference":
        return Backend(reference.up_activation, reference.activation, reference.dpre)
    if name == "triton":
        from kernels import triton_ops

        return Backend(triton_ops.up_activation, triton_ops.activation, triton_ops.dpre)
    if name == "cutlass":
        from kernels import cutlass

        return Backend(cutlass.up_activation, cutlass.activation, cutlass.dpre)
    raise ValueError(f"unknown MLP backend {name!r}; choose one of {', '.join(BACKENDS)}")


def require_backend(name: str, device: str) -> None:
    """Check that `name` can run on `device` ("cpu" or "cuda") before any work is done.

    Raises:
        ValueError: unknown backend, or one that needs a GPU on a CPU.
        RuntimeError: something it needs is missing.
    """
    if name != "reference" and device != "cuda":
        raise ValueError(f"backend {name!r} needs a CUDA device; on a CPU choose 'reference'")
    load_backend(name)
    if name == "cutlass":
        from kernels import cutlass

        cutlass.library()


def mlp(
    x: Tensor, w_up: Tensor, w_down: Tensor, *, backend: str = "reference"
) -> tuple[Tensor, Tensor]:
    """The MLP and its hidden activation.

    Args:
        x: [..., D]; any strides.
        w_up: [F, D], same dtype (bfloat16 for the fused backends).
        w_down: [D, F].
        backend: `reference`, `triton` or `cutlass`.

    Returns:
        y [..., D], and post [..., F], detached (it is the input of `w_down`, for calibration).

    Raises:
        ValueError: shapes, types or devices that do not fit, or an unknown backend.
        RuntimeError: the backend cannot load here.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_up, w_down = x.to(dtype), w_up.to(dtype), w_down.to(dtype)
    _check_shapes(x, w_up, w_down)
    x_MD = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        y_MD, post_MF = _FusedMLP.apply(x_MD, w_up, w_down, backend)
    else:
        post_MF = load_backend(backend).activation(x_MD.contiguous(), w_up.contiguous())
        y_MD = post_MF @ w_down.t()
    return y_MD.view_as(x), post_MF.view(*x.shape[:-1], w_up.shape[0])


def _check_shapes(x: Tensor, w_up: Tensor, w_down: Tensor) -> None:
    if w_up.ndim != 2 or w_down.ndim != 2 or x.ndim < 2:
        raise ValueError(
            f"x must have two dims or more, w_up and w_down two: got {x.ndim}, {w_up.ndim}, "
            f"{w_down.ndim}"
        )
    if w_up.shape[1] != x.shape[-1] or w_down.shape != (x.shape[-1], w_up.shape[0]):
        raise ValueError(
            f"x [..., D] {tuple(x.shape)}, w_up [F, D] {tuple(w_up.shape)} and w_down [D, F] "
            f"{tuple(w_down.shape)} do not fit together"
        )
    if not x.dtype == w_up.dtype == w_down.dtype:
        raise ValueError(
            f"x {x.dtype}, w_up {w_up.dtype} and w_down {w_down.dtype} must share one dtype"
        )


class _FusedMLP(torch.autograd.Function):
    """Forward and backward around the backend's two products."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, w_up_FD: Tensor, w_down_DF: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        act_grad_MF, post_MF = load_backend(backend).up_activation(
            x_MD.contiguous(), w_up_FD.contiguous()
        )
        ctx.save_for_backward(x_MD, w_up_FD, w_down_DF, act_grad_MF, post_MF)
        ctx.backend = backend
        ctx.mark_non_differentiable(post_MF)
        return post_MF @ w_down_DF.t(), post_MF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, w_up_FD, w_down_DF, act_grad_MF, post_MF = ctx.saved_tensors
        go_MD = grads[0].contiguous()
        dpre_MF = load_backend(ctx.backend).dpre(go_MD, w_down_DF.contiguous(), act_grad_MF)
        need_x, need_up, need_down, _ = ctx.needs_input_grad
        dx = dpre_MF @ w_up_FD if need_x else None
        d_up = dpre_MF.t() @ x_MD if need_up else None
        d_down = go_MD.t() @ post_MF if need_down else None
        return dx, d_up, d_down, None
