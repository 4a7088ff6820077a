"""What the persistent Triton kernels share: the order of tiles and the size of the grid."""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles import Tile

INTERPRETER_PROGRAMS = 3
"""Programs without a GPU (Triton's interpreter): few, so that each has several tiles."""


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of tile number `tile`.

    Bands of GROUP_M tile rows, column by column inside a band: neighbours in time share weights
    and inputs in L2.
    """
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    per_band = GROUP_M * columns
    first_row = tile // per_band * GROUP_M
    band_rows = tl.minimum(rows - first_row, GROUP_M)
    inside = tile % per_band
    return (first_row + inside % band_rows) * BLOCK_M, (inside // band_rows) * BLOCK_N


def grid_size(tensor: Tensor, rows: int, columns: int, tile: Tile) -> int:
    """Programs to launch: as many as the GPU holds at once, and no more than there are tiles."""
    tiles = math.ceil(rows / tile.block_m) * math.ceil(columns / tile.block_n)
    if not tensor.is_cuda:
        return min(tiles, INTERPRETER_PROGRAMS)
    return min(tiles, _multiprocessors(tensor.device) * tile.programs_per_sm)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
