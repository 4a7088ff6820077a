# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (the type checker does not know what triton.jit makes of a function)
"""The fused backward product in Triton, the published comparison point of the CUTLASS kernel.

    dpre = (go @ w_down) * act_grad

Letters: M rows (tokens), D model width, F MLP width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.persistent import grid_size, tile_origin
from kernels.tiles import BACKWARD, Tile


@triton.jit
def dpre_kernel(
    go,  # [M, D]
    w_down,  # [D, F]
    act_grad,  # [M, F]
    dpre,  # [M, F]
    M,
    F,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """One persistent program: every grid-th tile of dpre."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile_origin(tile, M, F, BLOCK_M, BLOCK_N, GROUP_M)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, D, BLOCK_K):
            product = tl.dot(go.load([m, k]), w_down.load([k, n]), product)
        halves = tl.permute(tl.reshape(product, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        left = left * act_grad.load([m, n]).to(tl.float32)
        dpre.store([m, n], left.to(dpre.dtype))
        right = right * act_grad.load([m, n + BLOCK_N // 2]).to(tl.float32)
        dpre.store([m, n + BLOCK_N // 2], right.to(dpre.dtype))


def dpre(go_MD: Tensor, w_down_DF: Tensor, act_grad_MF: Tensor, tile: Tile = BACKWARD) -> Tensor:
    """Gradient at the pre-activation, [M, F]; meaning: `kernels.reference.dpre`.

    Arguments are taken as they are; `kernels.triton_ops` checks them first.
    """
    (M, D), F = go_MD.shape, w_down_DF.shape[1]
    out = torch.empty_like(act_grad_MF)
    half = [tile.block_m, tile.block_n // 2]
    dpre_kernel[(grid_size(go_MD, M, F, tile),)](
        TensorDescriptor.from_tensor(go_MD, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(w_down_DF, [tile.block_k, tile.block_n]),
        TensorDescriptor.from_tensor(act_grad_MF, half),
        TensorDescriptor.from_tensor(out, half),
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
    return out
