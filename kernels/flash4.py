"""FlashAttention for Hopper as torch operators, opaque to the compiler.

The kernels are those of the PyPI package flash-attn-4 (CuTe DSL), which compiles them on first use
in a few seconds. They are called below the package's own autograd function, which hides neither
its output's shape nor its branches from torch.compile; those entry points are private, so one
version of the package is asked for: `_flash_attn_fwd` and `_flash_attn_bwd` here, and in
`backward_kernel` and below what the latter calls.

Its backward pass adds dQ, and dK and dV of a group, in float32 in no fixed order: gradients differ
in their last bits from run to run.

`attention` is for any caller; kernels/heads_flash4.py joins the kernels to the head passes.

Letters: B windows, T positions, L positions of whole tiles, H query heads, G key/value heads,
K head size, R = H/G members of a group.
"""

import importlib
import os
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from kernels.checks import require_hopper_device

VERSION = "4.0.0b36"
REQUIREMENT = f"flash-attn-4[cu13]=={VERSION}"
INSTALL = f'pip install "{REQUIREMENT}"'

CACHE_SWITCH, CACHE_FOLDER = (
    f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("ENABLED", "DIR")
)
"""Environment variables of the package: whether compiled kernels stay on disk (1), and where."""

HEAD_SIZE = 64
"""Heads whose float32 sums of dQ `kernels.heads_triton.sum_at` can read."""
TILE = 128
"""Positions of a tile of the backward pass, for heads of that size."""


def attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Causal grouped-query attention, scale 1/sqrt(K); differentiable; contiguous [B, T, H, K].

    Args:
        q_BTHK: bfloat16 on a Hopper GPU, G divides H; heads may lie at any distance of 16 bytes.
        k_BTGK, v_BTGK: likewise; v may be columns of a wider tensor, and is not copied.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: the package is missing or of another version, or the GPU is not Hopper.
    """
    return flash_attention(q_BTHK, k_BTGK, v_BTGK)[0]


def require_flash4(device: str) -> None:
    """Check that the kernels can run on `device` ("cpu" or "cuda") before any work is done.

    Raises:
        ValueError: a CPU.
        RuntimeError: the package is missing or of another version, or the GPU is not Hopper.
    """
    if device != "cuda":
        raise ValueError("attention 'flash4' needs a CUDA device; on a CPU choose 'sdpa'")
    interface()
    require_hopper(torch.device("cuda"))


@cache
def interface() -> Any:
    """The package's module of entry points, imported once (5 s). Raises RuntimeError."""
    try:
        # By name: the packed submission lists what is imported as required, and this is optional.
        found = metadata.version("flash-attn-4")
        if found != VERSION:
            raise RuntimeError(
                f"attention 'flash4' calls flash-attn-4 {VERSION} by its private functions, but "
                f"{found} is installed; install it with `{INSTALL}`"
            )
        # Compiled kernels are kept for the next process, unless the user has said otherwise.
        os.environ.setdefault(CACHE_SWITCH, "1")
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        raise RuntimeError(
            f"attention 'flash4' cannot import flash-attn-4 ({error}); install it with `{INSTALL}`"
        ) from error


def require_hopper(device: torch.device) -> None:
    """The GPU must be Hopper, the only one these calls were checked on. Raises RuntimeError."""
    require_hopper_device(device, "attention 'flash4' needs", "'cudnn'")


def misfit(tensor: Tensor) -> str | None:
    """What the kernels cannot read in a layout [B, T, heads, K]; the package would copy it."""
    apart = [s for s, n in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if n > 1]
    if tensor.stride(3) != 1 or tensor.data_ptr() % 16 or any(s % 8 for s in apart):
        return "must have contiguous heads at multiples of 16 bytes; call .contiguous() on it"
    return None


def check_heads(**tensors: Tensor) -> None:
    """Tensors [B, T, heads, K] as the kernels read them, all like the first.

    Raises:
        ValueError: another type, place, shape or layout; the message names the tensor.
    """
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"{name} must be bfloat16, not {tensor.dtype}")
        if not tensor.is_cuda or tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; all must be on one CUDA device")
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be [B, T, heads, K], not empty")
        sizes = (*tensor.shape[:2], tensor.shape[3])
        if sizes != (*first.shape[:2], first.shape[3]) or first.shape[2] % tensor.shape[2]:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} does not fit queries {tuple(first.shape)}"
            )
        if (reason := misfit(tensor)) is not None:
            raise ValueError(f"{name} {reason}")


@torch.library.custom_op("fairway::flash_attention", mutates_args=())
def flash_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, K] and logarithm of each row's sum, float32 [B, H, T]; see `attention`."""
    check_heads(q=q_BTHK, k=k_BTGK, v=v_BTGK)
    require_hopper(q_BTHK.device)
    with torch.cuda.device_of(q_BTHK):
        out, lse, *_ = interface()._flash_attn_fwd(
            q_BTHK, k_BTGK, v_BTGK, causal=True, return_lse=True
        )
    return out, lse


@flash_attention.register_fake
def _(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q_BTHK.shape
    return q_BTHK.new_empty(q_BTHK.shape), q_BTHK.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("fairway::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    grad_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    out_BTHK: Tensor,
    lse_BHT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at q, k and v, contiguous whatever the layout of those. Raises as `attention`."""
    check_heads(q=q_BTHK, k=k_BTGK, v=v_BTGK, grad=grad_BTHK, out=out_BTHK)
    grads = tuple(t.new_empty(t.shape) for t in (q_BTHK, k_BTGK, v_BTGK))
    dq, dk, dv = grads
    with torch.cuda.device_of(q_BTHK):
        interface()._flash_attn_bwd(
            q_BTHK, k_BTGK, v_BTGK, out_BTHK, grad_BTHK, lse_BHT, causal=True, dq=dq, dk=dk, dv=dv
        )
    return dq, dk, dv


@flash_attention_backward.register_fake
def _(
    grad_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    out_BTHK: Tensor,
    lse_BHT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q_BTHK, k_BTGK, v_BTGK))
    return dq, dk, dv


@torch.library.custom_op("fairway::flash_attention_backward_sums", mutates_args=())
def flash_attention_backward_sums(
    grad_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    row_sums_BHL: Tensor,
    lse2_BHL: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The main kernel of the backward pass alone, between the caller's own passes.

    One call for the r-th query head of every group. No two query heads of a call share a key head,
    so the kernel writes dK and dV once, in bfloat16, where a call for all clears, adds to and
    converts float32 sums. Every member's gradient is rounded on its own.

    Args:
        grad_BTHK: gradient at the output, as q.
        q_BTHK, k_BTGK, v_BTGK: as `attention` takes them, with heads of HEAD_SIZE.
        row_sums_BHL: float32, the sum over K of output times gradient; L is `padded(T)`, and
            positions past T hold 0.
        lse2_BHL: float32, the base-2 logarithm of each row's sum; infinite past T.

    Returns:
        Float32 sums [B, H, L K], which times 1/sqrt(K) are the gradient at q; where which element
        lies says `kernels.heads_triton.sum_at`. Then the gradients at k and v, bfloat16
        [R, B, T, G, K], to be summed over R.

    Raises:
        ValueError, RuntimeError: as `attention`; or heads of another size, or rows' numbers that do
            not fit.
    """
    check_heads(q=q_BTHK, k=k_BTGK, v=v_BTGK, grad=grad_BTHK)
    check_sums(q_BTHK, row_sums=row_sums_BHL, lse2=lse2_BHL)
    B, _, H, K = q_BTHK.shape
    R = H // k_BTGK.shape[2]
    dk_RBTGK, dv_RBTGK = (t.new_empty((R, *t.shape)) for t in (k_BTGK, v_BTGK))
    dq_sums = torch.zeros(
        (B, H, row_sums_BHL.shape[2] * K), dtype=torch.float32, device=q_BTHK.device
    )
    with torch.cuda.device_of(q_BTHK):
        for r in range(R):
            # Every R-th head is read and written where it lies: all keep multiples of 16 bytes.
            q, grad = (t[:, :, r::R] for t in (q_BTHK, grad_BTHK))
            lse2, row_sums, sums = (t[:, r::R] for t in (lse2_BHL, row_sums_BHL, dq_sums))
            backward_kernel(q, k_BTGK, v_BTGK, grad, lse2, row_sums, sums, dk_RBTGK[r], dv_RBTGK[r])
    return dq_sums, dk_RBTGK, dv_RBTGK


@flash_attention_backward_sums.register_fake
def _(
    grad_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    row_sums_BHL: Tensor,
    lse2_BHL: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, H, K = q_BTHK.shape
    R = H // k_BTGK.shape[2]
    dk_RBTGK, dv_RBTGK = (t.new_empty((R, *t.shape)) for t in (k_BTGK, v_BTGK))
    shape = (B, H, row_sums_BHL.shape[2] * K)
    return q_BTHK.new_empty(shape, dtype=torch.float32), dk_RBTGK, dv_RBTGK


def padded(length: int) -> int:
    """Positions of whole tiles that hold `length` of them."""
    return -(-length // TILE) * TILE


def check_sums(q_BTHK: Tensor, **rows_BHL: Tensor) -> None:
    """What `flash_attention_backward_sums` asks beyond `check_heads`. Raises ValueError."""
    B, T, H, K = q_BTHK.shape
    if K != HEAD_SIZE:
        raise ValueError(
            f"attention 'flash4' between fused passes takes heads of {HEAD_SIZE}, not {K}: choose "
            "passes 'reference', or attention 'cudnn'"
        )
    for name, rows in rows_BHL.items():
        if rows.shape != (B, H, padded(T)) or rows.dtype != torch.float32:
            raise ValueError(
                f"{name} {tuple(rows.shape)} {rows.dtype} must be float32 {(B, H, padded(T))}"
            )
        if rows.device != q_BTHK.device or not rows.is_contiguous():
            raise ValueError(f"{name} must be contiguous and on {q_BTHK.device}")


def backward_kernel(q: Tensor, *tensors: Tensor) -> None:
    """Run the package's main kernel on as many query heads as key heads.

    `_flash_attn_bwd` wraps it in two more: one before it makes the rows' numbers and clears the
    sums, one after it converts them. What is passed here is what it passes for this case.

    Args:
        q: [B, T, G, K].
        tensors: k, v, the gradient, the rows' logarithms and sums [B, G, L], and what is written:
            sums [B, G, L K], cleared before, and the gradients at k and v.
    """
    package = interface()
    scale = q.shape[3] ** -0.5
    # The package compiles a case of its own where one tile holds all positions.
    key = (q.shape[3], q.shape[1] <= TILE)
    kernels = _backward_kernels()
    if key not in kernels:
        cute = package.cute
        kernels[key] = cute.compile(
            _backward_object(package, q.shape[3]),
            *(package.to_cute_tensor(t) for t in (q, *tensors)),
            scale,
            *[None] * 9,
            package.AuxData(None, None),
            None,
            None,
            cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
            options="--enable-tvm-ffi",
        )
    kernels[key](q, *tensors, scale, *[None] * 9, package.AuxData(None, None), None, None)


@cache
def _backward_kernels() -> Any:
    """Compiled kernels by key: the package's kind of cache, on disk if it is told to keep one."""
    return interface().get_jit_cache("fairway_bwd")


def _backward_object(package: Any, head_size: int) -> Any:
    """The kernel as the package sets it up for causal attention on Hopper."""
    chosen = package._tile_size_bwd_sm90(head_size, head_size, True, False)
    assert (chosen.m_block_size, chosen.n_block_size, chosen.AtomLayoutMdQ) == (TILE, TILE, 2)
    return package.FlashAttentionBackwardSm90(
        package.torch2cute_dtype_map[torch.bfloat16],
        head_size,
        head_size,
        1,
        True,
        is_local=False,
        deterministic=False,
        tile_m=chosen.m_block_size,
        tile_n=chosen.n_block_size,
        Q_stage=chosen.num_stages_Q,
        dO_stage=chosen.num_stages_dO,
        PdS_stage=chosen.num_stages_PdS,
        SdP_swapAB=chosen.SdP_swapAB,
        dKV_swapAB=chosen.dKV_swapAB,
        dQ_swapAB=chosen.dQ_swapAB,
        AtomLayoutMSdP=chosen.AtomLayoutMSdP,
        AtomLayoutNdKV=chosen.AtomLayoutNdKV,
        AtomLayoutMdQ=chosen.AtomLayoutMdQ,
        num_threads=(chosen.num_wg + 1) * 128,
        V_in_regs=False,
        dQ_single_wg=chosen.dQ_single_wg,
    )


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad_BTHK: Tensor, _grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row sums stay inside `attention`, so no gradient comes through them."""
    return flash_attention_backward(grad_BTHK.contiguous(), *ctx.saved_tensors)


flash_attention.register_autograd(_backward, setup_context=_save)
