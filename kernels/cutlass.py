"""The CUTLASS kernels as torch operators, loaded from the library `kernels.build` makes.

Letters: M rows (tokens), D model width, F MLP width, K and N widths of a product's operands,
P tiles along the columns of a product.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels import checks
from kernels.build import library_path
from kernels.variants import (
    ACTIVATION_PLAN,
    DPRE_PLAN,
    DPRE_SCALED_PLAN,
    LINEAR_ADD_PLAN,
    NORM_GRADIENT_PLAN,
    UP_PLAN,
    UP_SCALED_PLAN,
    VARIANTS,
    Plan,
)


class _Launch(ctypes.Structure):
    """The C struct `fairway::Launch`."""

    _fields_ = (
        ("device", ctypes.c_int),
        ("sm_count", ctypes.c_int),
        ("raster_along_m", ctypes.c_int),
        ("max_swizzle", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """The built library, loaded once.

    Raises:
        RuntimeError: it has not been built for these sources, or cannot be loaded.
    """
    path = library_path()
    if not path.exists():
        raise RuntimeError(
            f"the CUTLASS kernels are not built ({path.name} is missing); build them with "
            "`python -m kernels.build`"
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be loaded ({error}); delete it and build it again with "
            "`python -m kernels.build`"
        ) from error
    loaded.fairway_status_text.restype = ctypes.c_char_p
    return loaded


def call(name: str, *arguments: object) -> None:
    """Call a C function of the library.

    Raises:
        RuntimeError: it returned a status other than 0; the message has CUTLASS's or CUDA's text.
    """
    status = getattr(library(), f"fairway_{name}")(*arguments)
    if status != 0:
        text = library().fairway_status_text(status).decode()
        raise RuntimeError(f"CUTLASS kernel {name} failed: {text} (status {status})")


@cache
def sm_count(device: int) -> int:
    """Streaming multiprocessors of a CUDA device, asked for once. Raises RuntimeError."""
    count = ctypes.c_int()
    call("sm_count", device, ctypes.byref(count))
    return count.value


def launch(plan: Plan, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> None:
    """Launch `plan` on the current stream of the tensors' device. Raises RuntimeError.

    Args:
        plan: variant and order of tiles.
        tensors: its C function's pointers, in order; an empty tensor's is null.
        sizes: its numbers, in order.
    """
    device = tensors[0].device
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        settings = _Launch(
            index,
            sm_count(index),
            int(plan.raster_along_m),
            plan.max_swizzle,
            torch.cuda.current_stream().cuda_stream,
        )
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
        call(plan.variant, *pointers, *sizes, ctypes.byref(settings))


def run_dpre(go_MD: Tensor, w_down_DF: Tensor, act_grad_MF: Tensor, plan: Plan) -> Tensor:
    """`dpre` with an explicit plan; for measurements and checks of every variant.

    Raises:
        ValueError: an argument does not fit, or the plan names no `dpre` variant.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    checks.check_dpre(go_MD, w_down_DF, act_grad_MF)
    check_plan(plan, "dpre")
    checks.require_hopper(go_MD)
    out_MF = torch.empty_like(act_grad_MF)
    (m, d), f = go_MD.shape, act_grad_MF.shape[1]
    launch(plan, (go_MD, w_down_DF, act_grad_MF, out_MF), (m, f, d))
    return out_MF


def run_up_activation(x_MD: Tensor, w_up_FD: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """`up_activation` with an explicit plan. Raises as `run_dpre` does."""
    checks.check_up_activation(x_MD, w_up_FD)
    check_plan(plan, "up")
    checks.require_hopper(x_MD)
    (m, d), f = x_MD.shape, w_up_FD.shape[0]
    act_grad_MF, post_MF = (x_MD.new_empty((m, f)) for _ in range(2))
    launch(plan, (x_MD, w_up_FD, act_grad_MF, post_MF), (m, f, d))
    return act_grad_MF, post_MF


def run_activation(x_MD: Tensor, w_up_FD: Tensor, plan: Plan) -> Tensor:
    """`activation` with an explicit plan. Raises as `run_dpre` does."""
    checks.check_up_activation(x_MD, w_up_FD)
    check_plan(plan, "activation")
    checks.require_hopper(x_MD)
    (m, d), f = x_MD.shape, w_up_FD.shape[0]
    post_MF = x_MD.new_empty((m, f))
    launch(plan, (x_MD, w_up_FD, post_MF), (m, f, d))
    return post_MF


def run_linear_add(
    x_MK: Tensor, w_NK: Tensor, residual_MN: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """`linear_add` with an explicit plan. Raises as `run_dpre` does."""
    checks.check_linear_add(x_MK, w_NK, residual_MN)
    check_plan(plan, "linear_add")
    checks.require_hopper(x_MK)
    (m, k), n = x_MK.shape, w_NK.shape[0]
    out_MN = torch.empty_like(residual_MN)
    squares_MP = row_sums(residual_MN, plan)
    launch(plan, (x_MK, w_NK, residual_MN, out_MN, squares_MP), (m, n, k))
    return out_MN, squares_MP


def run_up_scaled(
    x_MD: Tensor, w_up_FD: Tensor, scale_M: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """`up_scaled` with an explicit plan. Raises as `run_dpre` does."""
    checks.check_up_scaled(x_MD, w_up_FD, scale_M)
    check_plan(plan, "up_scaled")
    checks.require_hopper(x_MD)
    (m, d), f = x_MD.shape, w_up_FD.shape[0]
    post_MF = x_MD.new_empty((m, f))
    signs = x_MD.new_empty(signs_shape(m, f, plan), dtype=torch.int32)
    launch(plan, (x_MD, w_up_FD, scale_M, post_MF, signs), (m, f, d))
    return post_MF, signs


def run_dpre_scaled(
    go_MD: Tensor,
    w_down_DF: Tensor,
    post_MF: Tensor,
    signs: Tensor,
    scale_M: Tensor,
    plan: Plan,
    signs_plan: Plan,
) -> tuple[Tensor, Tensor]:
    """`dpre_scaled` with an explicit plan, and the plan of the `up_scaled` that stored signs.

    Raises:
        ValueError: as `run_dpre`, and for two plans that lay signs out differently.
        RuntimeError: as `run_dpre`.
    """
    check_plan(plan, "dpre_scaled")
    check_plan(signs_plan, "up_scaled")
    _check_signs_agree(plan, signs_plan)
    (m, d), f = go_MD.shape, post_MF.shape[1]
    checks.check_dpre_scaled(
        go_MD, w_down_DF, post_MF, signs, scale_M, signs_shape(m, f, signs_plan)
    )
    checks.require_hopper(go_MD)
    dpre_MF = torch.empty_like(post_MF)
    along_MP = row_sums(post_MF, plan)
    launch(plan, (go_MD, w_down_DF, post_MF, signs, scale_M, dpre_MF, along_MP), (m, f, d))
    return dpre_MF, along_MP


def run_norm_gradient(
    dpre_MF: Tensor, w_up_FD: Tensor, go_MD: Tensor, t_MD: Tensor, factor_M: Tensor, plan: Plan
) -> Tensor:
    """`norm_gradient` with an explicit plan. Raises as `run_dpre` does."""
    checks.check_norm_gradient(dpre_MF, w_up_FD, go_MD, t_MD, factor_M)
    check_plan(plan, "norm_gradient")
    checks.require_hopper(dpre_MF)
    (m, f), d = dpre_MF.shape, w_up_FD.shape[1]
    dt_MD = torch.empty_like(go_MD)
    launch(plan, (dpre_MF, w_up_FD, go_MD, t_MD, factor_M, dt_MD), (m, d, f))
    return dt_MD


def signs_shape(m: int, f: int, plan: Plan) -> tuple[int, int, int, int]:
    """Shape of the packed signs of [M, F]: tiles along M and F, threads, words of 32 bits."""
    variant = VARIANTS[plan.variant]
    rows, columns, _ = variant.tile
    words = rows * columns // (32 * variant.threads)
    return -(-m // rows), -(-f // columns), variant.threads, words


def row_sums(matrix: Tensor, plan: Plan) -> Tensor:
    """Empty float32 [M, P]: one sum a row of the matrix and tile of the plan's along it."""
    m, n = matrix.shape
    return matrix.new_empty((m, -(-n // VARIANTS[plan.variant].tile[1])), dtype=torch.float32)


def _check_signs_agree(reads: Plan, stores: Plan) -> None:
    if VARIANTS[reads.variant].signs_layout != VARIANTS[stores.variant].signs_layout:
        raise ValueError(
            f"{reads.variant} cannot read the signs {stores.variant} stores: tile, epilogue piece "
            "and schedule must be the same"
        )


def check_plan(plan: Plan, op: str) -> None:
    """The plan must name a variant of operator `op`. Raises ValueError."""
    if plan.variant not in VARIANTS or VARIANTS[plan.variant].op != op:
        known = ", ".join(name for name, v in VARIANTS.items() if v.op == op)
        raise ValueError(f"variant {plan.variant!r} is not one of {known}")


@torch.library.custom_op("fairway::dpre_cutlass", mutates_args=())
def dpre(go_MD: Tensor, w_down_DF: Tensor, act_grad_MF: Tensor) -> Tensor:
    """(go @ w_down) * act_grad, bfloat16 [M, F]; meaning: `kernels.reference.dpre`.

    Args:
        go_MD: bfloat16, contiguous; gradient at the MLP's output.
        w_down_DF: bfloat16, contiguous.
        act_grad_MF: bfloat16, contiguous; from `up_activation`.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    return run_dpre(go_MD, w_down_DF, act_grad_MF, DPRE_PLAN)


@dpre.register_fake
def _(go_MD: Tensor, w_down_DF: Tensor, act_grad_MF: Tensor) -> Tensor:
    return torch.empty_like(act_grad_MF)


@torch.library.custom_op("fairway::up_activation_cutlass", mutates_args=())
def up_activation(x_MD: Tensor, w_up_FD: Tensor) -> tuple[Tensor, Tensor]:
    """act_grad and post, bfloat16 [M, F]; meaning: `kernels.reference.up_activation`.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    return run_up_activation(x_MD, w_up_FD, UP_PLAN)


@up_activation.register_fake
def _(x_MD: Tensor, w_up_FD: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x_MD.shape[0], w_up_FD.shape[0])
    return x_MD.new_empty(shape), x_MD.new_empty(shape)


@torch.library.custom_op("fairway::activation_cutlass", mutates_args=())
def activation(x_MD: Tensor, w_up_FD: Tensor) -> Tensor:
    """post alone, bfloat16 [M, F]; meaning: `kernels.reference.activation`.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    return run_activation(x_MD, w_up_FD, ACTIVATION_PLAN)


@activation.register_fake
def _(x_MD: Tensor, w_up_FD: Tensor) -> Tensor:
    return x_MD.new_empty((x_MD.shape[0], w_up_FD.shape[0]))


@torch.library.custom_op("fairway::linear_add_cutlass", mutates_args=())
def linear_add(x_MK: Tensor, w_NK: Tensor, residual_MN: Tensor) -> tuple[Tensor, Tensor]:
    """residual + x @ w^T with the squares of its rows; meaning: `kernels.reference.linear_add`.

    Args:
        x_MK: bfloat16, contiguous.
        w_NK: bfloat16, contiguous.
        residual_MN: bfloat16, contiguous.

    Returns:
        The sum, bfloat16 [M, N], and float32 [M, P]: each row's squares before rounding, summed
        over the columns of each of P tiles. Their number follows from the plan.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    return run_linear_add(x_MK, w_NK, residual_MN, LINEAR_ADD_PLAN)


@linear_add.register_fake
def _(x_MK: Tensor, w_NK: Tensor, residual_MN: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual_MN), row_sums(residual_MN, LINEAR_ADD_PLAN)


@torch.library.custom_op("fairway::up_scaled_cutlass", mutates_args=())
def up_scaled(x_MD: Tensor, w_up_FD: Tensor, scale_M: Tensor) -> tuple[Tensor, Tensor]:
    """post, bfloat16 [M, F], and the signs of pre; meaning: `kernels.reference.up_scaled`.

    Args:
        x_MD: bfloat16, contiguous.
        w_up_FD: bfloat16, contiguous.
        scale_M: float32, contiguous, positive: it must not change a sign.

    Returns:
        post, and the signs as int32 in a layout that `dpre_scaled` alone reads.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    return run_up_scaled(x_MD, w_up_FD, scale_M, UP_SCALED_PLAN)


@up_scaled.register_fake
def _(x_MD: Tensor, w_up_FD: Tensor, scale_M: Tensor) -> tuple[Tensor, Tensor]:
    m, f = x_MD.shape[0], w_up_FD.shape[0]
    shape = signs_shape(m, f, UP_SCALED_PLAN)
    return x_MD.new_empty((m, f)), x_MD.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("fairway::dpre_scaled_cutlass", mutates_args=())
def dpre_scaled(
    go_MD: Tensor, w_down_DF: Tensor, post_MF: Tensor, signs: Tensor, scale_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward of `up_scaled` at x @ w_up^T; meaning: `kernels.reference.dpre_scaled`.

    Args:
        go_MD: bfloat16, contiguous; gradient at the MLP's output.
        w_down_DF: bfloat16, contiguous.
        post_MF: bfloat16, contiguous; from `up_scaled`, as are
        signs: int32, contiguous.
        scale_M: float32, contiguous; the one given to `up_scaled`.

    Returns:
        The gradient, bfloat16 [M, F], and float32 [M, P]: gradient at pre times pre, summed over
        the columns of each of P tiles of a row. Their number follows from the plan.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    return run_dpre_scaled(
        go_MD, w_down_DF, post_MF, signs, scale_M, DPRE_SCALED_PLAN, UP_SCALED_PLAN
    )


@dpre_scaled.register_fake
def _(
    go_MD: Tensor, w_down_DF: Tensor, post_MF: Tensor, signs: Tensor, scale_M: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(post_MF), row_sums(post_MF, DPRE_SCALED_PLAN)


@torch.library.custom_op("fairway::norm_gradient_cutlass", mutates_args=())
def norm_gradient(
    dpre_MF: Tensor, w_up_FD: Tensor, go_MD: Tensor, t_MD: Tensor, factor_M: Tensor
) -> Tensor:
    """go + dpre @ w_up - factor t, bfloat16 [M, D]; meaning: `kernels.reference.norm_gradient`.

    Args:
        dpre_MF: bfloat16, contiguous; from `dpre_scaled`.
        w_up_FD: bfloat16, contiguous.
        go_MD: bfloat16, contiguous; gradient at t + mlp(scale t).
        t_MD: bfloat16, contiguous.
        factor_M: float32, contiguous.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    return run_norm_gradient(dpre_MF, w_up_FD, go_MD, t_MD, factor_M, NORM_GRADIENT_PLAN)


@norm_gradient.register_fake
def _(dpre_MF: Tensor, w_up_FD: Tensor, go_MD: Tensor, t_MD: Tensor, factor_M: Tensor) -> Tensor:
    return torch.empty_like(go_MD)
