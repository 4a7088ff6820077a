"""The gradient at attention's output: the out-projection's product with XSA's backward pass in it.

One CUTLASS product in place of a product, of a pass that reads what it wrote, and of the sums that
flash attention's backward pass starts from.

Letters: M rows (tokens), D model width, B windows, T positions, L positions of whole tiles of
flash4's, H query heads, G key/value heads, N = H HEAD_SIZE, V = G HEAD_SIZE, W = N + 2 V.
"""

import torch
from torch import Tensor

from kernels import checks, cutlass
from kernels.heads_cutlass import HEAD_SIZE
from kernels.variants import EXCLUDE_SELF_PLAN, Plan

MEMBERS = 2
"""Query heads of a group: a tile holds one group, so that its sums stay in registers."""


def check_exclude_self_gradient(
    go_MD: Tensor,
    w_DN: Tensor,
    rest_MN: Tensor,
    own_BHL: Tensor,
    heads_MW: Tensor,
) -> None:
    """Arguments of `exclude_self_gradient`.

    Raises:
        ValueError: one does not fit; the message names the first.
    """
    checks.check_matrices(go=go_MD, w=w_DN, rest=rest_MN, heads=heads_MW)
    if own_BHL.ndim != 3 or own_BHL.dtype != torch.float32:
        raise ValueError(f"own must be float32 [B, H, L], not {own_BHL.dtype} {own_BHL.shape}")
    (m, d), (windows, query_heads, padded) = go_MD.shape, own_BHL.shape
    if query_heads < 1 or query_heads % MEMBERS:
        raise ValueError(
            f"{query_heads} query heads do not make groups of {MEMBERS}, which the product with "
            "XSA's backward pass is written for"
        )
    n = query_heads * HEAD_SIZE
    checks.check_shape("w [D, N]", w_DN, d, n)
    checks.check_shape("rest [M, N]", rest_MN, m, n)
    checks.check_shape("heads [M, W]", heads_MW, m, n + 2 * (n // MEMBERS))
    if windows < 1 or m % windows or m > windows * padded:
        raise ValueError(f"{m} rows are not {windows} windows of at most {padded}, as own has them")
    checks.check_beside("own", own_BHL, go_MD)


def run_exclude_self_gradient(
    go_MD: Tensor,
    w_DN: Tensor,
    rest_MN: Tensor,
    own_BHL: Tensor,
    heads_MW: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """`exclude_self_gradient` with an explicit plan; for measurements and checks of every variant.

    Raises:
        ValueError: an argument does not fit, or the plan names no `exclude_self` variant.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    check_exclude_self_gradient(go_MD, w_DN, rest_MN, own_BHL, heads_MW)
    cutlass.check_plan(plan, "exclude_self")
    checks.require_hopper(go_MD)
    dy_MN, dv_MV, sums_BHL = _results(rest_MN, own_BHL)
    windows, query_heads, padded = own_BHL.shape
    if padded > (window := len(go_MD) // windows):
        sums_BHL.zero_()
    tensors = (go_MD, w_DN, rest_MN, own_BHL, heads_MW, dy_MN, dv_MV, sums_BHL)
    cutlass.launch(plan, tensors, (*go_MD.shape, window, query_heads, padded))
    return dy_MN, dv_MV, sums_BHL


def _results(rest_MN: Tensor, own_BHL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the results."""
    m, n = rest_MN.shape
    dv_MV = rest_MN.new_empty((m, n // MEMBERS))
    return torch.empty_like(rest_MN), dv_MV, torch.empty_like(own_BHL)


@torch.library.custom_op("fairway::exclude_self_gradient_cutlass", mutates_args=())
def exclude_self_gradient(
    go_MD: Tensor,
    w_DN: Tensor,
    rest_MN: Tensor,
    own_BHL: Tensor,
    heads_MW: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """XSA's backward pass of go @ w; meaning: `kernels.reference.exclude_self_gradient`.

    Args:
        go_MD: bfloat16, contiguous; gradient at the out-projection's result.
        w_DN: bfloat16, contiguous; its weights.
        rest_MN: bfloat16, contiguous; XSA's result, y - own v of attention's output y.
        own_BHL: float32, contiguous; of each row and head (y . v) / |v|^2. Not read past T = M/B.
        heads_MW: bfloat16, contiguous; query, key and value heads side by side, H twice G.

    Returns:
        Gradients at y, bfloat16 [M, N], and at the values, bfloat16 [M, V]; and y times its
        gradient (as rounded) summed over each head, float32 [B, H, L], 0 past T.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: no Hopper GPU, the library is missing, or the launch failed.
    """
    return run_exclude_self_gradient(go_MD, w_DN, rest_MN, own_BHL, heads_MW, EXCLUDE_SELF_PLAN)


@exclude_self_gradient.register_fake
def _(
    go_MD: Tensor,
    w_DN: Tensor,
    rest_MN: Tensor,
    own_BHL: Tensor,
    heads_MW: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(rest_MN, own_BHL)
