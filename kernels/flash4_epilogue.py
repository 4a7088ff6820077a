# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""flash4's forward kernel with XSA in its epilogue, in CuTe DSL.

Imported by kernels/flash4_compiled.py when it compiles it: everything here needs the package.

Letters: B windows, T positions, L >= T, H query heads, G key/value heads, K head size.
"""

import operator
from typing import Any

import cutlass
from cutlass import Float32, cute
from flash_attn.cute import utils
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from quack import layout_utils

SMALLEST_SQUARE = 1e-24
"""Of `kernels.reference.SMALLEST_NORM`: shorter values count as this long."""
COLUMN_STEP = 8
"""Columns between a thread's pairs of them in a row of wgmma's accumulators."""


class WithoutOwnValues(FlashAttentionForwardSm90):
    """Writes y - own v in place of the output y, v a query's own value; and own, of every row.

    It takes two auxiliary tensors: the values again, [B, T, G, K], and where `own` belongs, float32
    [B, H, L]. What it writes as a row's logarithm is to base 2, as the backward pass asks for it.
    Heads of a group must be apart (`pack_gqa=False`): a row of a tile is a position. The package
    gives a block of threads one tile.
    """

    def mma(self, *arguments: Any) -> None:
        """Find the tile's own values, for the methods below, which do not get the tensors."""
        tiled_mma, tidx = arguments[1], arguments[15]
        *_, seqlen_of, _, scheduler_of, _, aux_data, _ = arguments
        m_block, head_idx, batch_idx, _ = scheduler_of().initial_work_tile_info().tile_idx
        values, self.own = aux_data.tensors
        self.values = values[batch_idx, None, head_idx // self.qhead_per_kvhead, None]
        self.last = seqlen_of(batch_idx).seqlen_q - 1
        tile = cute.make_identity_tensor((self.tile_m, self.tile_hdimv))
        tile = cute.domain_offset((m_block * self.tile_m, 0), tile)
        self.places = layout_utils.reshape_acc_to_mn(tiled_mma.get_slice(tidx).partition_C(tile))
        super().mma(*arguments)

    def last_half_block_overlap(self, *arguments: Any, **options: Any) -> Any:
        """Send for the values ahead of the last product, which takes as long as they do."""
        rows, columns = (cute.size(self.places, mode=[mode]) for mode in (0, 1))
        # A thread's columns are pairs, a word each.
        self.words = cute.make_rmem_tensor(
            cute.make_layout((rows, columns // 2), stride=(columns // 2, 1)), cutlass.Uint32
        )
        for r in range(rows):
            row, column = self.places[r, 0]
            at = cutlass.min(row, self.last)  # rows past the last are not stored
            address = utils.elem_pointer(self.values, (at, column)).toint()
            pairs = cute.make_ptr(cutlass.Uint32, address, cute.AddressSpace.gmem, assumed_align=4)
            apart = cute.make_layout(columns // 2, stride=COLUMN_STEP // 2)
            cute.autovec_copy(cute.make_tensor(pairs, apart), self.words[r, None])
        return super().last_half_block_overlap(*arguments, **options)

    @cute.jit
    def epilogue(
        self,
        acc_O: cute.Tensor,
        lse: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        sO: cute.Tensor,
        seqlen: Any,
        gmem_tiled_copy_O: cute.TiledCopy,
        tma_atom_O: cute.CopyAtom,
        tiled_mma: cute.TiledMma,
        tidx: cutlass.Int32,
        m_block: cutlass.Int32,
        head_idx: cutlass.Int32,
        batch_idx: cutlass.Int32,
    ):
        """Take the own values off a tile's normalised output, then store it as the package does."""
        out = layout_utils.reshape_acc_to_mn(acc_O)
        value = cute.recast_tensor(self.words, self.dtype)
        own = self.own[batch_idx, head_idx, None]
        for r in cutlass.range_constexpr(cute.size(out, mode=[0])):
            square, along = Float32(0.0), Float32(0.0)
            for c in cutlass.range_constexpr(cute.size(out, mode=[1])):
                square += Float32(value[r, c]) * Float32(value[r, c])
                along += out[r, c] * Float32(value[r, c])
            square = utils.warp_reduce(square, operator.add, width=4)
            along = utils.warp_reduce(along, operator.add, width=4)
            share = along * cute.arch.rcp_approx(cute.arch.fmax(square, Float32(SMALLEST_SQUARE)))
            for c in cutlass.range_constexpr(cute.size(out, mode=[1])):
                out[r, c] = out[r, c] - share * Float32(value[r, c])
            if self.places[r, 0][1] == 0 and self.places[r, 0][0] <= self.last:
                own[self.places[r, 0][0]] = share
            lse[r] = lse[r] * utils.LOG2_E
        FlashAttentionForwardSm90.epilogue(
            self, acc_O, lse, mO, mLSE, sO, seqlen, gmem_tiled_copy_O, tma_atom_O, tiled_mma,
            tidx, m_block, head_idx, batch_idx,
        )  # fmt: skip
