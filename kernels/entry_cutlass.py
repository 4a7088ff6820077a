"""The product that ends a block, with the entry of the next block in its epilogue.

One CUTLASS product in place of a product and of a pass that reads what it wrote.

Letters: M rows (tokens), K and N widths of the product's operands, N also of the residual stream,
P tiles along N.
"""

import torch
from torch import Tensor

from kernels import checks, cutlass
from kernels.variants import LINEAR_MIX_PLAN, LINEAR_MIX_SKIP_PLAN, Plan

PAIR_BYTES = 8
"""Channels' factors are read two at a time."""


def check_linear_mix(
    y_MK: Tensor,
    w_NK: Tensor,
    residual_MN: Tensor,
    x0_MN: Tensor,
    mix_2N: Tensor,
    skip_MN: Tensor | None,
    skip_weight_N: Tensor | None,
) -> None:
    """Arguments of `linear_mix`. Raises ValueError naming the first that does not fit."""
    checks.check_linear_add(y_MK, w_NK, residual_MN)
    if (skip_MN is None) != (skip_weight_N is None):
        missing = "skip" if skip_MN is None else "skip_weight"
        raise ValueError(f"{missing} is missing: a skip and its weight come together")
    for name, rows in (("x0", x0_MN), ("skip", skip_MN)):
        if rows is not None:
            checks.check_matrices(y=y_MK, **{name: rows})
            checks.check_shape(f"{name} [M, N]", rows, *residual_MN.shape)
    n = w_NK.shape[0]
    checks.check_float32("mix [2, N]", mix_2N, 2, n)
    if skip_weight_N is not None:
        checks.check_float32("skip_weight [N]", skip_weight_N, n)
    channels = {"mix": mix_2N, "skip_weight": skip_weight_N}
    checks.check_cuda_tensors(y=y_MK, **channels)
    for name, factors in channels.items():
        if factors is not None and factors.data_ptr() % PAIR_BYTES:
            raise ValueError(f"{name} must start at a multiple of {PAIR_BYTES} bytes; clone it")


def run_linear_mix(
    y_MK: Tensor,
    w_NK: Tensor,
    residual_MN: Tensor,
    x0_MN: Tensor,
    mix_2N: Tensor,
    skip_MN: Tensor | None,
    skip_weight_N: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_mix` with an explicit plan; for measurements and checks of every variant.

    Raises:
        ValueError: an argument does not fit, or the plan names no variant with, or without, a skip.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    check_linear_mix(y_MK, w_NK, residual_MN, x0_MN, mix_2N, skip_MN, skip_weight_N)
    cutlass.check_plan(plan, "linear_mix" if skip_MN is None else "linear_mix_skip")
    checks.require_hopper(y_MK)
    x_MN, u_MN, squares_MP = _results(residual_MN, plan)
    absent = y_MK.new_empty(0)  # an empty tensor's pointer is null
    skip = absent if skip_MN is None else skip_MN
    weight = absent if skip_weight_N is None else skip_weight_N
    tensors = (y_MK, w_NK, residual_MN, x0_MN, mix_2N, skip, weight, x_MN, u_MN, squares_MP)
    cutlass.launch(plan, tensors, (y_MK.shape[0], *w_NK.shape))
    return x_MN, u_MN, squares_MP


def _results(residual_MN: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the results."""
    squares_MP = cutlass.row_sums(residual_MN, plan)
    return torch.empty_like(residual_MN), torch.empty_like(residual_MN), squares_MP


def _plan(skip_MN: Tensor | None) -> Plan:
    return LINEAR_MIX_PLAN if skip_MN is None else LINEAR_MIX_SKIP_PLAN


@torch.library.custom_op("fairway::linear_mix_cutlass", mutates_args=())
def linear_mix(
    y_MK: Tensor,
    w_NK: Tensor,
    residual_MN: Tensor,
    x0_MN: Tensor,
    mix_2N: Tensor,
    skip_MN: Tensor | None,
    skip_weight_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's end and the next one's entry; meaning: `kernels.reference.linear_mix`.

    Args:
        y_MK: bfloat16, contiguous.
        w_NK: bfloat16, contiguous.
        residual_MN: bfloat16, contiguous.
        x0_MN: bfloat16, contiguous; the embedding.
        mix_2N: float32, contiguous; factors of the stream and of x0.
        skip_MN: bfloat16, contiguous, or None.
        skip_weight_N: float32, contiguous; with a skip.

    Returns:
        x and u, bfloat16 [M, N], and float32 [M, P]: the squares of each row of u before rounding,
        summed over the columns of each of P tiles. Their number follows from the plan.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    return run_linear_mix(
        y_MK, w_NK, residual_MN, x0_MN, mix_2N, skip_MN, skip_weight_N, _plan(skip_MN)
    )


@linear_mix.register_fake
def _(
    y_MK: Tensor,
    w_NK: Tensor,
    residual_MN: Tensor,
    x0_MN: Tensor,
    mix_2N: Tensor,
    skip_MN: Tensor | None,
    skip_weight_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(residual_MN, _plan(skip_MN))
