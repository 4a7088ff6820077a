"""Machine code for Hopper, made and read without a GPU: which instructions a kernel really uses."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kernels import build
from kernels.tiles import Tile
from kernels.variants import (
    DPRE_PLAN,
    DPRE_SCALED_PLAN,
    EXCLUDE_SELF_PLAN,
    HEADS_PLAN,
    LINEAR_ADD_PLAN,
    LINEAR_MIX_SKIP_PLAN,
    NORM_GRADIENT_PLAN,
    UP_SCALED_PLAN,
    VARIANTS,
)

COMPILED = (
    DPRE_PLAN,
    DPRE_SCALED_PLAN,
    EXCLUDE_SELF_PLAN,
    HEADS_PLAN,
    LINEAR_ADD_PLAN,
    LINEAR_MIX_SKIP_PLAN,
    NORM_GRADIENT_PLAN,
    UP_SCALED_PLAN,
)
"""Plans whose variants the checks compile; each takes a minute of a core and 4 GB."""


@dataclass(frozen=True)
class MachineCode:
    """What a compiled file holds.

    Attributes:
        target: architecture it is for, such as `sm_90a`.
        opcodes: how often each instruction occurs, without its modifiers.
        registers: registers of a thread, of the hungriest kernel inside.
        stack_bytes: local memory of a thread; spilled registers live there.
    """

    target: str
    opcodes: Counter[str]
    registers: int
    stack_bytes: int


def read(path: Path) -> MachineCode:
    """Disassemble a cubin, or the device code in an object file or shared library.

    Raises:
        subprocess.CalledProcessError: the file holds no device code.
    """
    listing = _cuobjdump("-sass", path)
    usage = _cuobjdump("-res-usage", path)
    target = re.search(r"\bsm_\w+", listing)
    return MachineCode(
        target=target.group() if target else "",
        opcodes=Counter(re.findall(r"\b([A-Z][A-Z0-9]+)(?:\.[\w.]+)? ", listing)),
        registers=max(int(n) for n in re.findall(r"\bREG:(\d+)", usage)),
        stack_bytes=max(int(n) for n in re.findall(r"\bSTACK:(\d+)", usage)),
    )


def cutlass_library(name: str) -> Path:
    """A library of one of the COMPILED variants alone; the first call compiles all, two at once."""
    _compile_all()
    return build.build([name])


def compiler_log(name: str) -> str:
    """What the compiler said of a COMPILED variant; after `cutlass_library`."""
    version = build.compiler_version(build.find_nvcc())
    return (
        build.object_folder(build.instantiate(VARIANTS[name]), version) / f"{name}.log"
    ).read_text()


@cache
def _compile_all() -> None:
    build.build([plan.variant for plan in COMPILED], jobs=2)


def _cuobjdump(option: str, path: Path) -> str:
    import triton  # its wheel carries the tool, so that no CUDA toolkit is needed

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def compile_triton(kernel: str, tile: Tile, folder: Path) -> tuple[MachineCode, int]:
    """Compile a Triton MLP kernel for sm_90; needs no GPU.

    Args:
        kernel: `up_activation`, `activation` (the same without act_grad) or `dpre`.
        tile: its configuration.
        folder: where the cubin is written.

    Returns:
        The code, and the bytes of shared memory a program takes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import backward_triton, forward_triton

    m, n, k = tile.block_m, tile.block_n, tile.block_k
    half = (m, n // 2)
    function: Any
    constants: dict[str, Any] = {}
    if kernel == "dpre":
        function = backward_triton.dpre_kernel
        blocks = {"go": (m, k), "w_down": (k, n), "act_grad": half, "dpre": half}
    else:
        function = forward_triton.up_activation_kernel
        blocks = {"x": (m, k), "w_up": (n, k), "act_grad": half, "post": half}
        if kernel == "activation":
            del blocks["act_grad"]
            constants["act_grad"] = None
    constants |= {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": tile.group_m,
        "FLATTEN": tile.flatten,
    }
    signature = {name: f"tensordesc<bf16[{r},{c}]>" for name, (r, c) in blocks.items()}
    signature |= dict.fromkeys(("M", "F", "D"), "i32") | dict.fromkeys(constants, "constexpr")
    compiled: Any = triton.compile(
        ASTSource(function, signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    cubin = folder / f"{kernel}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return read(cubin), compiled.metadata.shared
