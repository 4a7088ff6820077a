"""The joint projection of queries, keys and values with norm, rotary and gain in its epilogue.

One CUTLASS product gives heads as attention reads them. Each keeps the factor of its norm, so that
the backward pass (kernels/joined_heads_triton.py) needs neither the projection nor its input.

Letters: M rows (tokens), D model width, T positions of a window, H query heads, G key/value heads,
W joint width (H + 2 G) HEAD_SIZE, P = H + G heads with a norm, V = G HEAD_SIZE.
"""

import torch
from torch import Tensor

from kernels import checks, cutlass
from kernels.variants import HEADS_PLAN, Plan

HEAD_SIZE = 64
"""Width of a head: a piece of the epilogue holds one, so that its norm stays within a warp."""
HALF = 8
"""Dims of a head that turn, against as many: a dim and its partner lie in one thread."""


def require_heads(head_size: int, rotary_dims: int) -> None:
    """Check that a model's heads are those the kernel is written for, before any work is done.

    Raises:
        ValueError: they are not; the message says what to choose instead.
    """
    if (head_size, rotary_dims) != (HEAD_SIZE, 2 * HALF):
        raise ValueError(
            f"the projection that finishes its heads takes heads of {HEAD_SIZE} of which "
            f"{2 * HALF} dims turn, not {head_size} and {rotary_dims}: choose passes 'triton' "
            "(--passes triton)"
        )


def check_project_heads(
    rows_MD: Tensor,
    w_WD: Tensor,
    factor_M: Tensor,
    value_embed_MV: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """Arguments of `project_heads`. Raises ValueError naming the first that does not fit."""
    embeds = {} if value_embed_MV is None else {"value_embed": value_embed_MV}
    checks.check_matrices(rows=rows_MD, w=w_WD, **embeds)
    if w_WD.shape[1] != rows_MD.shape[1]:
        raise ValueError(
            f"w [W, D] {tuple(w_WD.shape)} does not fit rows [M, D] {tuple(rows_MD.shape)}"
        )
    checks.check_factors("factor", factor_M, rows_MD)
    for name, tensor, dims in (("gain", gain_H, 1), ("cos", cos, 2), ("sin", sin, 2)):
        if tensor.dtype != torch.float32 or tensor.ndim != dims or tensor.numel() == 0:
            raise ValueError(
                f"{name} must be float32 with {dims} dims and not empty, not {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device != rows_MD.device or not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} must be contiguous, start at a multiple of 16 bytes and be on "
                f"{rows_MD.device}"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be of one shape")
    heads = len(gain_H) + 2 * kv_heads
    if kv_heads < 1 or w_WD.shape[0] % heads:
        raise ValueError(
            f"w [W, D] {tuple(w_WD.shape)} does not hold {len(gain_H)} query heads and "
            f"{kv_heads} key and value heads"
        )
    require_heads(w_WD.shape[0] // heads, 2 * cos.shape[1])
    if value_embed_MV is not None:
        wanted = (rows_MD.shape[0], kv_heads * HEAD_SIZE)
        if tuple(value_embed_MV.shape) != wanted:
            raise ValueError(
                f"value_embed {tuple(value_embed_MV.shape)} must be [M, G {HEAD_SIZE}] = {wanted}"
            )


def run_project_heads(
    rows_MD: Tensor,
    w_WD: Tensor,
    factor_M: Tensor,
    value_embed_MV: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """`project_heads` with an explicit plan; for measurements and checks of every variant.

    Raises:
        ValueError: an argument does not fit, or the plan names no `heads` variant.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    check_project_heads(rows_MD, w_WD, factor_M, value_embed_MV, gain_H, kv_heads, cos, sin)
    cutlass.check_plan(plan, "heads")
    checks.require_hopper(rows_MD)
    (m, d), h = rows_MD.shape, len(gain_H)
    heads_MW = rows_MD.new_empty((m, w_WD.shape[0]))
    inverse_PM = factor_M.new_empty((h + kv_heads, m))
    # An empty tensor's pointer is null: nothing to add.
    embed = rows_MD.new_empty(0) if value_embed_MV is None else value_embed_MV
    tensors = (rows_MD, w_WD, factor_M, embed, gain_H, cos, sin, heads_MW, inverse_PM)
    cutlass.launch(plan, tensors, (m, d, cos.shape[0], h, kv_heads))
    return heads_MW, inverse_PM


@torch.library.custom_op("fairway::project_heads_cutlass", mutates_args=())
def project_heads(
    rows_MD: Tensor,
    w_WD: Tensor,
    factor_M: Tensor,
    value_embed_MV: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Finished heads of factor (rows @ w^T); meaning: `kernels.reference.project_heads`.

    Args:
        rows_MD: bfloat16, contiguous.
        w_WD: bfloat16, contiguous; rows for H query, G key and G value heads of HEAD_SIZE.
        factor_M: float32, contiguous; of the rows' norm.
        value_embed_MV: bfloat16, contiguous, or None.
        gain_H: float32, one a query head.
        kv_heads: G.
        cos: float32 [T, HALF], contiguous; row m is at position m % T.
        sin: likewise.

    Returns:
        Query, key and value heads side by side, bfloat16 [M, W], and 1 / rms of each head that is
        normed, before its norm, float32 [P, M].

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    return run_project_heads(
        rows_MD, w_WD, factor_M, value_embed_MV, gain_H, kv_heads, cos, sin, HEADS_PLAN
    )


@project_heads.register_fake
def _(
    rows_MD: Tensor,
    w_WD: Tensor,
    factor_M: Tensor,
    value_embed_MV: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    m = rows_MD.shape[0]
    return rows_MD.new_empty((m, w_WD.shape[0])), factor_M.new_empty((len(gain_H) + kv_heads, m))
