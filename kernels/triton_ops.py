"""The Triton kernels as torch operators: checked, opaque to the compiler, with shapes known to it.

Letters: M rows (tokens), D model width, F MLP width.
"""

import torch
from torch import Tensor

from kernels import backward_triton, checks, forward_triton


@torch.library.custom_op("fairway::up_activation_triton", mutates_args=())
def up_activation(x_MD: Tensor, w_up_FD: Tensor) -> tuple[Tensor, Tensor]:
    """act_grad and post, bfloat16 [M, F]; meaning: `kernels.reference.up_activation`.

    Args:
        x_MD: bfloat16, contiguous, on a Hopper GPU.
        w_up_FD: bfloat16, contiguous.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: the GPU is not Hopper.
    """
    checks.check_up_activation(x_MD, w_up_FD)
    checks.require_hopper(x_MD)
    with torch.cuda.device(x_MD.device):
        return forward_triton.up_activation(x_MD, w_up_FD)


@up_activation.register_fake
def _(x_MD: Tensor, w_up_FD: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x_MD.shape[0], w_up_FD.shape[0])
    return x_MD.new_empty(shape), x_MD.new_empty(shape)


@torch.library.custom_op("fairway::activation_triton", mutates_args=())
def activation(x_MD: Tensor, w_up_FD: Tensor) -> Tensor:
    """post alone, bfloat16 [M, F]; meaning: `kernels.reference.activation`.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: the GPU is not Hopper.
    """
    checks.check_up_activation(x_MD, w_up_FD)
    checks.require_hopper(x_MD)
    with torch.cuda.device(x_MD.device):
        return forward_triton.activation(x_MD, w_up_FD)


@activation.register_fake
def _(x_MD: Tensor, w_up_FD: Tensor) -> Tensor:
    return x_MD.new_empty((x_MD.shape[0], w_up_FD.shape[0]))


@torch.library.custom_op("fairway::dpre_triton", mutates_args=())
def dpre(go_MD: Tensor, w_down_DF: Tensor, act_grad_MF: Tensor) -> Tensor:
    """(go @ w_down) * act_grad, bfloat16 [M, F]; meaning: `kernels.reference.dpre`.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: the GPU is not Hopper.
    """
    checks.check_dpre(go_MD, w_down_DF, act_grad_MF)
    checks.require_hopper(go_MD)
    with torch.cuda.device(go_MD.device):
        return backward_triton.dpre(go_MD, w_down_DF, act_grad_MF)


@dpre.register_fake
def _(go_MD: Tensor, w_down_DF: Tensor, act_grad_MF: Tensor) -> Tensor:
    return torch.empty_like(act_grad_MF)
