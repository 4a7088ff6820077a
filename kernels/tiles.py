"""Tile configurations of the Triton kernels, and which of them are used."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One configuration.

    Attributes:
        block_m, block_n, block_k: tile of the output, and depth of one step.
        warps: warps of a program.
        stages: depth of the software pipeline.
        programs_per_sm: persistent programs per multiprocessor.
        group_m: tiles are visited in bands of this many rows, for reuse in L2.
        flatten: let the pipeline run on across tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs_per_sm: int = 1
    group_m: int = 8
    flatten: bool = True

    @property
    def name(self) -> str:
        """Short unique name."""
        flat = "" if self.flatten else "_noflat"
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k}_w{self.warps}_s{self.stages}"
            f"_p{self.programs_per_sm}_g{self.group_m}{flat}"
        )


PUBLISHED_FORWARD = Tile(128, 256, 64, warps=8, stages=4)
"""The published record's forward."""

PUBLISHED_BACKWARD = Tile(128, 256, 64, warps=8, stages=3)
"""The published record's Triton backward."""

FORWARD = PUBLISHED_FORWARD
"""Fastest forward on an H100 at the record's shape; see kernels/NOTES.md."""

BACKWARD = PUBLISHED_BACKWARD
"""Fastest Triton backward on an H100 at the record's shape; see kernels/NOTES.md."""

CANDIDATES = (
    Tile(128, 128, 64, warps=4, stages=3, programs_per_sm=2),
    Tile(128, 128, 64, warps=4, stages=3, programs_per_sm=2, flatten=False),
    Tile(128, 128, 64, warps=8, stages=3, programs_per_sm=2),
    Tile(128, 128, 64, warps=8, stages=4),
    Tile(128, 128, 128, warps=8, stages=2),
    Tile(128, 256, 64, warps=8, stages=3),
    Tile(128, 256, 64, warps=8, stages=3, flatten=False),
    Tile(128, 256, 64, warps=8, stages=4, group_m=1),
    Tile(64, 256, 64, warps=4, stages=2, programs_per_sm=2),
    Tile(128, 128, 64, warps=4, stages=2, programs_per_sm=2),
    Tile(64, 128, 64, warps=4, stages=4, programs_per_sm=3),
    Tile(256, 128, 64, warps=8, stages=3),
    Tile(128, 128, 64, warps=4, stages=3, programs_per_sm=2, group_m=1),
)
"""Configurations worth measuring: smaller tiles leave room for a second program whose main loop
hides the first one's stores."""


@dataclass(frozen=True)
class RowBlock:
    """Configuration of a pass over rows.

    Attributes:
        rows: rows of a program at a time.
        warps: warps of a program.
        programs: programs of a pass that sums over rows, each of which takes every so-many-th
            block; others launch one program a block.
    """

    rows: int
    warps: int
    programs: int = 528

    def count(self, rows: int) -> int:
        """Programs of a summing pass over this many rows, and lines of partial sums it leaves."""
        return min(self.programs, -(-rows // self.rows))


ROW_BLOCK = RowBlock(4, 4)
"""Passes that only map rows to rows."""
SUMMING_BLOCK = RowBlock(2, 2, programs=2112)
"""The entry of a block, backward: few rows, for the sums over rows take registers."""
SKIP_SUMMING_BLOCK = RowBlock(1, 2, programs=1056)
"""The same with a skip: a sum more in registers."""
HEADS_SUMMING_BLOCK = RowBlock(4, 4, programs=2112)
"""The heads, backward: their sums are one number a head. All three by `python -m bench.passes
--blocks` on an H100."""
