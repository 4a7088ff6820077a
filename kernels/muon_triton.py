# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (the type checker does not know what triton.jit makes of a function)
"""Muon's elementwise work in Triton: momentum before the orthogonalisation, the update after it.

Each is one pass over the bank, where PyTorch's operators make five and two. Arithmetic is float32.

Meaning: `kernels.reference.nesterov` and `apply_update`.

Letters: N matrices, R rows, C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.checks import check_float32, check_shape

BLOCK = 2048
TILE = 32
"""Elements of a program; an update that comes transposed is read in square tiles."""


@triton.jit
def nesterov_kernel(grad, momentum, out, clip, coefficient, count, BLOCK: tl.constexpr):
    """BLOCK elements of the new momentum and of the direction."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * tl.load(clip)
    m = coefficient * tl.load(momentum + at, mask=inside, other=0.0) + g
    tl.store(momentum + at, m, mask=inside)
    tl.store(out + at, (g + coefficient * m).to(out.dtype.element_ty), mask=inside)


@triton.jit
def apply_update_kernel(
    weight, update, keep, rate, R, C, update_matrix, update_row, update_column,
    TILE: tl.constexpr,
):  # fmt: skip
    """A square tile of the weights, which are contiguous; the update has any strides."""
    n = tl.program_id(2).to(tl.int64)
    r = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    c = (tl.program_id(0) * TILE + tl.arange(0, TILE))[None, :]
    inside = (r < R) & (c < C)
    at = n * R * C + r * C + c
    source = update + n * update_matrix + r * update_row + c * update_column
    w = tl.load(weight + at, mask=inside, other=0.0)
    u = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    tl.store(weight + at, keep * w - rate * u, mask=inside)


def nesterov(
    grad_NRC: Tensor, momentum_NRC: Tensor, clip: Tensor, coefficient: float, dtype: torch.dtype
) -> Tensor:
    """Nesterov direction [N, R, C] in `dtype`; the momentum, float32, is renewed in place.

    Args:
        grad_NRC: a bank's gradient.
        momentum_NRC: contiguous, float32.
        clip: factor on the gradient, 0-dim float32 on its device.
        coefficient: Muon's momentum.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    _check_master("momentum", momentum_NRC)
    check_shape("grad [N, R, C]", grad_NRC, *momentum_NRC.shape)
    check_float32("clip", clip)
    _check_place(momentum=momentum_NRC, grad=grad_NRC, clip=clip)
    grad_NRC = grad_NRC.contiguous()
    out = torch.empty_like(grad_NRC, dtype=dtype)
    count = grad_NRC.numel()
    nesterov_kernel[(triton.cdiv(count, BLOCK),)](
        grad_NRC, momentum_NRC, out, clip, coefficient, count, BLOCK=BLOCK
    )
    return out


def apply_update(weight_NRC: Tensor, update_NRC: Tensor, keep: float, rate: float) -> None:
    """weight <- keep weight - rate update, in place.

    Args:
        weight_NRC: contiguous, float32.
        update_NRC: of any strides.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    _check_master("weight", weight_NRC)
    check_shape("update [N, R, C]", update_NRC, *weight_NRC.shape)
    _check_place(weight=weight_NRC, update=update_NRC)
    N, R, C = weight_NRC.shape
    grid = (triton.cdiv(C, TILE), triton.cdiv(R, TILE), N)
    apply_update_kernel[grid](
        weight_NRC, update_NRC, keep, rate, R, C, *update_NRC.stride(), TILE=TILE
    )


def _check_master(name: str, tensor: Tensor) -> None:
    """What is renewed in place is a contiguous bank, float32. Raises ValueError."""
    if tensor.dtype != torch.float32 or tensor.ndim != 3:
        raise ValueError(
            f"{name} must be float32 [N, R, C], not {tensor.dtype} {tuple(tensor.shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous: it is renewed in place")


def _check_place(**tensors: Tensor) -> None:
    """All are on one CUDA device, or interpreted on the CPU. Raises ValueError."""
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor.device != first.device or not (tensor.is_cuda or knobs.runtime.interpret):
            raise ValueError(f"{name} is on {tensor.device}; all must be on one CUDA device")
