"""Claims about the machine code of the Triton kernels, compiled for Hopper without a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest

from kernels.tiles import BACKWARD, FORWARD, Tile
from verify.hopper_code import compile_triton

SHARED_MEMORY = 227 * 1024
"""Bytes a program may have on Hopper."""


@pytest.mark.parametrize(
    ("kernel", "tile", "loads"),
    [("up_activation", FORWARD, 2), ("activation", FORWARD, 2), ("dpre", BACKWARD, 4)],
)
def test_triton_compiles_to_hoppers_own_instructions(
    kernel: str, tile: Tile, loads: int, tmp_path: Path
) -> None:
    """The Triton kernels are warp-group products and bulk copies alone, and spill nothing."""
    code, shared = compile_triton(kernel, tile, tmp_path)
    assert code.target == "sm_90a"
    groups = tile.warps // 4
    products = (tile.block_m // 64 // groups) * (tile.block_n / 256) * (tile.block_k // 16)
    assert code.opcodes["HGMMA"] >= products
    assert code.opcodes["HMMA"] == 0
    assert code.opcodes["UTMALDG"] >= loads  # the two operands; backward, two halves of act_grad
    halves, outputs = 2, 2 if kernel == "up_activation" else 1
    assert code.opcodes["UTMASTG"] >= halves * outputs
    around = {name: code.opcodes[name] for name in ("LDG", "STG")}
    assert around == {"LDG": 0, "STG": 0}, "global memory is reached around the copy engine"
    assert code.opcodes["LDL"] == code.opcodes["STL"] == code.stack_bytes == 0, "spills"
    assert shared <= SHARED_MEMORY


def test_triton_without_act_grad_stores_half_as_much(tmp_path: Path) -> None:
    """Where no gradient is wanted the Triton forward has half the stores, and as many products."""
    both, _ = compile_triton("up_activation", FORWARD, tmp_path)
    alone, _ = compile_triton("activation", FORWARD, tmp_path)
    assert 2 * alone.opcodes["UTMASTG"] == both.opcodes["UTMASTG"]
    assert alone.opcodes["HGMMA"] == both.opcodes["HGMMA"]


@pytest.mark.parametrize(
    ("kernel", "tile"),
    [("up_activation", FORWARD), ("activation", FORWARD), ("dpre", BACKWARD)],
)
def test_spills_would_be_seen(kernel: str, tile: Tile, tmp_path: Path) -> None:
    """The same tile with half the warps does spill: the check above can fail."""
    code, _ = compile_triton(kernel, replace(tile, warps=4), tmp_path)
    assert code.registers == 255
    assert code.stack_bytes > 0
    assert code.opcodes["STL"] > 0
    assert code.opcodes["LDL"] > 0
