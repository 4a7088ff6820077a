"""The CUTLASS kernels as torch operators, loaded from the library `kernels.build` makes.

Letters: M rows (tokens), D model width, F MLP width.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels import checks
from kernels.build import library_path
from kernels.variants import ACTIVATION_PLAN, DPRE_PLAN, UP_PLAN, VARIANTS, Plan


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


def launch(plan: Plan, tensors: tuple[Tensor, ...], sizes: tuple[int, int, int]) -> None:
    """Launch `plan` on the current stream of the tensors' device. Raises RuntimeError."""
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
    _check_plan(plan, "dpre")
    checks.require_hopper(go_MD)
    out_MF = torch.empty_like(act_grad_MF)
    (m, d), f = go_MD.shape, act_grad_MF.shape[1]
    launch(plan, (go_MD, w_down_DF, act_grad_MF, out_MF), (m, f, d))
    return out_MF


def run_up_activation(x_MD: Tensor, w_up_FD: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """`up_activation` with an explicit plan. Raises as `run_dpre` does."""
    checks.check_up_activation(x_MD, w_up_FD)
    _check_plan(plan, "up")
    checks.require_hopper(x_MD)
    (m, d), f = x_MD.shape, w_up_FD.shape[0]
    act_grad_MF, post_MF = (x_MD.new_empty((m, f)) for _ in range(2))
    launch(plan, (x_MD, w_up_FD, act_grad_MF, post_MF), (m, f, d))
    return act_grad_MF, post_MF


def run_activation(x_MD: Tensor, w_up_FD: Tensor, plan: Plan) -> Tensor:
    """`activation` with an explicit plan. Raises as `run_dpre` does."""
    checks.check_up_activation(x_MD, w_up_FD)
    _check_plan(plan, "activation")
    checks.require_hopper(x_MD)
    (m, d), f = x_MD.shape, w_up_FD.shape[0]
    post_MF = x_MD.new_empty((m, f))
    launch(plan, (x_MD, w_up_FD, post_MF), (m, f, d))
    return post_MF


def _check_plan(plan: Plan, op: str) -> None:
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
