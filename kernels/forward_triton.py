# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (the type checker does not know what triton.jit makes of a function)
"""The fused up-projection in Triton: a persistent TMA GEMM whose epilogue is the activation.

    pre = x @ w_up^T;  act_grad = 2 pre or pre / 2;  post = 0.5 act_grad pre

Outputs leave straight from the float32 accumulator, in two half tiles, so `pre` never reaches
memory. Where no gradient is wanted, neither does act_grad.

Letters: M rows (tokens), D model width, F MLP width.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.persistent import grid_size, tile_origin
from kernels.tiles import FORWARD, Tile


@triton.jit
def up_activation_kernel(
    x,  # [M, D]
    w_up,  # [F, D]
    act_grad,  # [M, F], or None: it is not stored
    post,  # [M, F]
    M,
    F,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """One persistent program: every grid-th tile of post, and of act_grad if wanted."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile_origin(tile, M, F, BLOCK_M, BLOCK_N, GROUP_M)
        pre = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, D, BLOCK_K):
            pre = tl.dot(x.load([m, k]), w_up.load([n, k]).T, pre)
        halves = tl.permute(tl.reshape(pre, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        left_grad = tl.where(left > 0, 2 * left, 0.5 * left)
        if act_grad is not None:
            act_grad.store([m, n], left_grad.to(act_grad.dtype))
        post.store([m, n], (0.5 * left_grad * left).to(post.dtype))
        right_grad = tl.where(right > 0, 2 * right, 0.5 * right)
        if act_grad is not None:
            act_grad.store([m, n + BLOCK_N // 2], right_grad.to(act_grad.dtype))
        post.store([m, n + BLOCK_N // 2], (0.5 * right_grad * right).to(post.dtype))


def up_activation(x_MD: Tensor, w_up_FD: Tensor, tile: Tile = FORWARD) -> tuple[Tensor, Tensor]:
    """act_grad and post, [M, F] in the dtype of x; meaning: `kernels.reference.up_activation`.

    Arguments are taken as they are; `kernels.triton_ops` checks them first.
    """
    act_grad_MF = x_MD.new_empty((x_MD.shape[0], w_up_FD.shape[0]))
    return act_grad_MF, _launch(x_MD, w_up_FD, act_grad_MF, tile)


def activation(x_MD: Tensor, w_up_FD: Tensor, tile: Tile = FORWARD) -> Tensor:
    """post alone, [M, F] in the dtype of x; meaning: `kernels.reference.activation`.

    Arguments are taken as they are; `kernels.triton_ops` checks them first.
    """
    return _launch(x_MD, w_up_FD, None, tile)


def _launch(x_MD: Tensor, w_up_FD: Tensor, act_grad_MF: Tensor | None, tile: Tile) -> Tensor:
    """Run the kernel, which fills act_grad if it is given; returns post."""
    (M, D), F = x_MD.shape, w_up_FD.shape[0]
    post_MF = x_MD.new_empty((M, F))
    half = [tile.block_m, tile.block_n // 2]
    up_activation_kernel[(grid_size(x_MD, M, F, tile),)](
        TensorDescriptor.from_tensor(x_MD, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(w_up_FD, [tile.block_n, tile.block_k]),
        None if act_grad_MF is None else TensorDescriptor.from_tensor(act_grad_MF, half),
        TensorDescriptor.from_tensor(post_MF, half),
        M,
        F,
        D,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        FLATTEN=tile.flatten,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return post_MF
