"""FlashAttention for Hopper as torch operators, opaque to the compiler.

The kernels are those of the PyPI package flash-attn-4 (CuTe DSL), which compiles them on first use
in a few seconds. They are called below the package's own autograd function, which hides neither
its output's shape nor its branches from torch.compile; those entry points are private, so one
version of the package is asked for (kernels/flash4_package.py): `_flash_attn_fwd` and
`_flash_attn_bwd` here, and in kernels/flash4_compiled.py what these call.

Its backward pass adds dQ, and dK and dV of a group, in float32 in no fixed order: gradients differ
in their last bits from run to run.

`attention` is for any caller; kernels/heads_flash4.py joins the kernels to the head passes, and
kernels/joined_attention.py to the products around them.

Letters: B windows, T positions, L positions of whole tiles, H query heads, G key/value heads,
K head size, R = H/G members of a group.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.checks import require_hopper_device
from kernels.flash4_compiled import HEAD_SIZE, TILE, backward_kernel, forward_kernel
from kernels.flash4_package import interface, versions


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

    Nothing is imported for that.

    Raises:
        ValueError: a CPU.
        RuntimeError: the package is missing or of another version, or the GPU is not Hopper.
    """
    if device != "cuda":
        raise ValueError("attention 'flash4' needs a CUDA device; on a CPU choose 'sdpa'")
    versions()
    require_hopper(torch.device("cuda"))


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
    if tensors["k"].shape != tensors["v"].shape:
        raise ValueError("k and v must have the same heads")


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


@torch.library.custom_op("fairway::flash_attention_exclude_self", mutates_args=())
def flash_attention_exclude_self(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """XSA of causal attention in one kernel (kernels/flash4_epilogue.py), and its rows' numbers.

    Meaning: `kernels.reference.exclude_self_parts` of `attention`, whose output is never stored.

    Args:
        q_BTHK, k_BTGK, v_BTGK: as `attention` takes them, with heads of HEAD_SIZE.

    Returns:
        The rest y - own v of the output y, with v the query's own value, bfloat16 [B, T, H, K];
        own, float32 [B, H, L]; and the base-2 logarithm of each row's sum, float32 [B, H, L]. L is
        `padded(T)`; past T own is 0, and the logarithm infinite.

    Raises:
        ValueError, RuntimeError: as `attention`; or heads of another size.
    """
    check_heads(q=q_BTHK, k=k_BTGK, v=v_BTGK)
    check_size(q_BTHK)
    require_hopper(q_BTHK.device)
    B, T, H, _ = q_BTHK.shape
    rest = q_BTHK.new_empty(q_BTHK.shape)
    own, lse2 = (rest.new_empty((B, H, padded(T)), dtype=torch.float32) for _ in range(2))
    if padded(T) > T:
        own.zero_()
        lse2.fill_(math.inf)
    with torch.cuda.device_of(q_BTHK):
        forward_kernel(q_BTHK, k_BTGK, v_BTGK, rest, lse2, own)
    return rest, own, lse2


@flash_attention_exclude_self.register_fake
def _(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _ = q_BTHK.shape
    own, lse2 = (q_BTHK.new_empty((B, H, padded(T)), dtype=torch.float32) for _ in range(2))
    return q_BTHK.new_empty(q_BTHK.shape), own, lse2


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
    dq_sums = row_sums_BHL.new_zeros((B, H, row_sums_BHL.shape[2] * K))
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


def check_size(q_BTHK: Tensor) -> None:
    """Heads that the kernels between fused passes take. Raises ValueError."""
    if q_BTHK.shape[3] != HEAD_SIZE:
        raise ValueError(
            f"attention 'flash4' between fused passes takes heads of {HEAD_SIZE}, not "
            f"{q_BTHK.shape[3]}: choose passes 'reference', or attention 'cudnn'"
        )


def check_sums(q_BTHK: Tensor, **rows_BHL: Tensor) -> None:
    """What `flash_attention_backward_sums` asks beyond `check_heads`. Raises ValueError."""
    check_size(q_BTHK)
    B, T, H, _ = q_BTHK.shape
    for name, rows in rows_BHL.items():
        if rows.shape != (B, H, padded(T)) or rows.dtype != torch.float32:
            raise ValueError(
                f"{name} {tuple(rows.shape)} {rows.dtype} must be float32 {(B, H, padded(T))}"
            )
        if rows.device != q_BTHK.device or not rows.is_contiguous():
            raise ValueError(f"{name} must be contiguous and on {q_BTHK.device}")


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad_BTHK: Tensor, _grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row sums stay inside `attention`, so no gradient comes through them."""
    return flash_attention_backward(grad_BTHK.contiguous(), *ctx.saved_tensors)


flash_attention.register_autograd(_backward, setup_context=_save)
