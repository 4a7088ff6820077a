"""Late QAT: weights rounded to int6 in the forward pass, gradients passed straight through.

Letters: N matrices of a bank, R rows, C columns.
"""

import torch
from torch import Tensor


def fake_quantize_rows(w: Tensor, bits: int = 6) -> Tensor:
    """Round each row of `w` [..., R, C] to a symmetric grid of 2^(bits-1) - 1 steps a side.

    The row's scale is absmax / (2^(bits-1) - 1); a zero row stays zero. The gradient is that of
    the identity (straight-through estimator, Bengio et al. 2013). Same shape and dtype as `w`.
    """
    top = 2 ** (bits - 1) - 1
    scale = w.detach().abs().amax(dim=-1, keepdim=True) / top
    safe = torch.where(scale > 0, scale, 1.0)
    rounded = torch.round(w.detach() / safe) * scale
    return rounded + (w - w.detach())  # exactly `rounded`: the bracket is zero
