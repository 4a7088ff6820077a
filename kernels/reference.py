"""Plain PyTorch meaning of every kernel, in any floating dtype on any device.

With pre = x @ w_up^T, the MLP's activation is LeakyReLU(0.5)(pre)^2. Kernels store

    act_grad = 2 pre   where pre > 0, else 0.5 pre     (the activation's derivative)
    post     = 0.5 * act_grad * pre                    (the activation itself, for both signs)

so the backward pass, dpre = (go @ w_down) * act_grad, needs neither `pre` nor a branch.

Letters: M rows (tokens), D model width, F MLP width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def up_activation(x_MD: Tensor, w_up_FD: Tensor) -> tuple[Tensor, Tensor]:
    """act_grad and post, both [M, F], of inputs [M, D] and weights [F, D]."""
    pre = F.linear(x_MD, w_up_FD)
    act_grad = torch.where(pre > 0, 2 * pre, 0.5 * pre)
    return act_grad, 0.5 * act_grad * pre


def dpre(go_MD: Tensor, w_down_DF: Tensor, act_grad_MF: Tensor) -> Tensor:
    """Gradient at the pre-activation, [M, F], of output gradients [M, D]."""
    return (go_MD @ w_down_DF) * act_grad_MF


def mlp(x: Tensor, w_up_FD: Tensor, w_down_DF: Tensor) -> Tensor:
    """The MLP [..., D] -> [..., D] as its formula reads, differentiated by autograd."""
    return F.linear(F.leaky_relu(F.linear(x, w_up_FD), 0.5).square(), w_down_DF)
