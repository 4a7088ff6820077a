"""What every fused kernel demands of its arguments.

Letters: M rows (tokens), D model width, F MLP width, K and N widths of a product's operands.
"""

from functools import cache

import torch
from torch import Tensor

ROW_UNIT = 8
"""Widths are multiples of this: TMA moves rows in units of 16 bytes."""


def check_up_activation(x_MD: Tensor, w_up_FD: Tensor) -> None:
    """Arguments of `up_activation` and `activation`.

    Raises:
        ValueError: one does not fit; the message names the first.
    """
    check_matrices(x=x_MD, w_up=w_up_FD)
    if x_MD.shape[1] != w_up_FD.shape[1]:
        raise ValueError(
            f"w_up [F, D] {tuple(w_up_FD.shape)} does not fit x [M, D] {tuple(x_MD.shape)}"
        )


def check_dpre(go_MD: Tensor, w_down_DF: Tensor, act_grad_MF: Tensor) -> None:
    """Arguments of `dpre`. Raises ValueError naming the first that does not fit."""
    check_matrices(go=go_MD, w_down=w_down_DF, act_grad=act_grad_MF)
    if w_down_DF.shape[0] != go_MD.shape[1]:
        raise ValueError(
            f"w_down [D, F] {tuple(w_down_DF.shape)} does not fit go [M, D] {tuple(go_MD.shape)}"
        )
    if act_grad_MF.shape != (go_MD.shape[0], w_down_DF.shape[1]):
        raise ValueError(
            f"act_grad {tuple(act_grad_MF.shape)} must be [M, F] = "
            f"({go_MD.shape[0]}, {w_down_DF.shape[1]})"
        )


def check_linear_add(x_MK: Tensor, w_NK: Tensor, residual_MN: Tensor) -> None:
    """Arguments of `linear_add`. Raises ValueError naming the first that does not fit."""
    check_matrices(x=x_MK, w=w_NK, residual=residual_MN)
    if w_NK.shape[1] != x_MK.shape[1]:
        raise ValueError(f"w [N, K] {tuple(w_NK.shape)} does not fit x [M, K] {tuple(x_MK.shape)}")
    check_shape("residual [M, N]", residual_MN, x_MK.shape[0], w_NK.shape[0])


def check_up_scaled(x_MD: Tensor, w_up_FD: Tensor, scale_M: Tensor) -> None:
    """Arguments of `up_scaled`. Raises ValueError naming the first that does not fit."""
    check_up_activation(x_MD, w_up_FD)
    check_factors("scale", scale_M, x_MD)


def check_dpre_scaled(
    go_MD: Tensor,
    w_down_DF: Tensor,
    post_MF: Tensor,
    signs: Tensor,
    scale_M: Tensor,
    signs_shape: tuple[int, ...],
) -> None:
    """Arguments of `dpre_scaled`; signs must have `signs_shape`.

    Raises:
        ValueError: one does not fit; the message names the first.
    """
    check_matrices(go=go_MD, w_down=w_down_DF, post=post_MF)
    if w_down_DF.shape[0] != go_MD.shape[1]:
        raise ValueError(
            f"w_down [D, F] {tuple(w_down_DF.shape)} does not fit go [M, D] {tuple(go_MD.shape)}"
        )
    check_shape("post [M, F]", post_MF, go_MD.shape[0], w_down_DF.shape[1])
    check_factors("scale", scale_M, go_MD)
    if signs.dtype != torch.int32 or tuple(signs.shape) != signs_shape:
        raise ValueError(
            f"signs must be int32 {signs_shape} as up_scaled stores them, not {signs.dtype} "
            f"{tuple(signs.shape)}"
        )
    if signs.device != go_MD.device or not signs.is_contiguous() or signs.data_ptr() % 16:
        raise ValueError(f"signs must be contiguous, on {go_MD.device} and as up_scaled gave them")


def check_norm_gradient(
    dpre_MF: Tensor, w_up_FD: Tensor, go_MD: Tensor, t_MD: Tensor, factor_M: Tensor
) -> None:
    """Arguments of `norm_gradient`. Raises ValueError naming the first that does not fit."""
    check_matrices(dpre=dpre_MF, w_up=w_up_FD, go=go_MD, t=t_MD)
    if w_up_FD.shape[0] != dpre_MF.shape[1]:
        raise ValueError(
            f"w_up [F, D] {tuple(w_up_FD.shape)} does not fit dpre [M, F] {tuple(dpre_MF.shape)}"
        )
    for name, tensor in (("go [M, D]", go_MD), ("t [M, D]", t_MD)):
        check_shape(name, tensor, dpre_MF.shape[0], w_up_FD.shape[1])
    check_factors("factor", factor_M, dpre_MF)


def require_hopper(tensor: Tensor) -> None:
    """The tensor's GPU must be Hopper. Raises RuntimeError."""
    require_hopper_device(tensor.device, "the fused kernels need", "backend 'reference'")


def require_hopper_device(device: torch.device, needing: str, instead: str) -> None:
    """The GPU must be Hopper.

    Args:
        device: a CUDA device.
        needing: who needs it, with its verb, for the message.
        instead: what to choose on another GPU, likewise.

    Raises:
        RuntimeError: it is another.
    """
    capability = _capability(device)
    if capability != (9, 0):
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}; {needing} 9.0 (Hopper). Choose {instead} here."
        )


def check_cuda_tensors(**tensors: Tensor | None) -> None:
    """Every tensor is contiguous and on one CUDA device; None passes. Raises ValueError."""
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        first = tensor if first is None else first
        if not tensor.is_cuda or tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; all must be on one CUDA device")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() on it")


def check_rows(**tensors: Tensor) -> None:
    """Tensors [B, T, G, K] on a CUDA device whose rows are contiguous and evenly spaced.

    Raises:
        ValueError: another layout or place; the message names the tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.is_cuda:
            raise ValueError(f"{name} is on {tensor.device}; it must be on a CUDA device")
        _, T, _, K = tensor.shape
        batch, row, head, element = tensor.stride()
        if (head, element) != (K, 1) or batch != T * row:
            raise ValueError(f"{name} must have contiguous rows; call .contiguous() on it")


def check_power_of_two(**sizes: int) -> None:
    """Triton's blocks have sizes that are powers of two. Raises ValueError."""
    for name, size in sizes.items():
        if size < 1 or size & (size - 1):
            raise ValueError(
                f"{name} {size} must be a power of two for the fused passes; choose passes "
                "'reference'"
            )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """The tensor has this shape. Raises ValueError."""
    if tensor.shape != shape:
        raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape}")


def check_float32(name: str, tensor: Tensor, *shape: int) -> None:
    """The tensor is float32 and has this shape. Raises ValueError."""
    if tensor.dtype != torch.float32 or tensor.shape != shape:
        raise ValueError(
            f"{name} must be float32 {shape}, not {tensor.dtype} {tuple(tensor.shape)}"
        )


def check_factors(name: str, factors_M: Tensor, rows: Tensor) -> None:
    """One float32 a row of `rows`, and as `check_beside` asks. Raises ValueError."""
    if factors_M.dtype != torch.float32 or tuple(factors_M.shape) != (rows.shape[0],):
        raise ValueError(
            f"{name} must be float32 ({rows.shape[0]},), one a row, not {factors_M.dtype} "
            f"{tuple(factors_M.shape)}"
        )
    check_beside(name, factors_M, rows)


def check_beside(name: str, tensor: Tensor, rows: Tensor) -> None:
    """On the device of `rows`, contiguous, and aligned to 16 bytes. Raises ValueError."""
    if tensor.device != rows.device:
        raise ValueError(f"{name} is on {tensor.device}, its rows on {rows.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; call .contiguous() on it")
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} must begin at a multiple of 16 bytes; call .clone() on it")


def check_matrices(**tensors: Tensor) -> None:
    """Type, place, rank, width, layout and alignment of each matrix. Raises ValueError."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"{name} must be bfloat16, not {tensor.dtype}")
        if not tensor.is_cuda:
            raise ValueError(f"{name} must be on a CUDA device, not on {tensor.device}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, {first_name} on {first.device}")
        if tensor.ndim != 2:
            raise ValueError(f"{name} must have 2 dims, not {tensor.ndim}")
        if tensor.numel() == 0:
            raise ValueError(f"{name} {tuple(tensor.shape)} is empty")
        if tensor.shape[1] % ROW_UNIT:
            raise ValueError(
                f"{name}: its width {tensor.shape[1]} must be a multiple of {ROW_UNIT}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() on it")
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes; call .clone() on it")
