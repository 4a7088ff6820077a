"""flash4's kernels as this project calls them: compiled once, linked, and kept on disk.

What `_flash_attn_fwd` and `_flash_attn_bwd` wrap, for the one case between fused passes: causal,
heads of `HEAD_SIZE`, bfloat16. Compiled for Hopper, with or without a GPU, each becomes a small
shared library. A later process loads that in milliseconds and never imports the package, which
takes seconds.

Letters: B windows, T positions, L positions of whole tiles, H query heads, G key/value heads,
K head size.
"""

import hashlib
import importlib
import os
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from kernels.build import CACHE
from kernels.flash4_package import CACHE_FOLDER, CACHE_SWITCH, interface, versions

HEAD_SIZE = 64
"""Heads whose float32 sums of dQ `kernels.heads_triton.sum_at` can read."""
TILE = 128
"""Positions of a tile of the backward pass, for heads of that size."""

SOURCES = tuple(Path(__file__).with_name(f"flash4_{name}.py") for name in ("compiled", "epilogue"))
"""What decides, beside the packages, what the kernels compile to."""
EXPORTED = "fairway"
"""Name of the function in a library."""
LIBRARIES = {
    "nvidia_cutlass_dsl": "cu13/lib/libcute_dsl_runtime.so",
    "tvm_ffi": "lib/libtvm_ffi.so",
}
"""What a kernel's library needs: package and path in it."""


def forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, rest: Tensor, lse2: Tensor, own: Tensor
) -> None:
    """Run the forward kernel with XSA in its epilogue (kernels/flash4_epilogue.py).

    Args:
        q: [B, T, H, K].
        k, v: [B, T, G, K].
        rest, lse2, own: written; as `kernels.flash4.flash_attention_exclude_self` returns them.

    Raises:
        RuntimeError: the package or a C compiler is missing, or there is no place for the kernel.
    """
    kernel = _kernel("forward", q.shape[2] // k.shape[2])
    aux = ((v, own), None)
    kernel(q, k, v, rest, lse2, HEAD_SIZE**-0.5, *[None] * 9, aux, None, None)


def backward_kernel(q: Tensor, *tensors: Tensor) -> None:
    """Run the main kernel of the backward pass on as many query heads as key heads.

    `_flash_attn_bwd` wraps it in two more: one before it makes the rows' numbers and clears the
    sums, one after it converts them. What is passed here is what it passes for this case.

    Args:
        q: [B, T, G, K].
        tensors: k, v, the gradient, the rows' logarithms and sums [B, G, L], and what is written:
            sums [B, G, L K], cleared before, and the gradients at k and v.

    Raises:
        RuntimeError: as `forward_kernel`.
    """
    kernel = _kernel("backward", 1)
    kernel(q, *tensors, HEAD_SIZE**-0.5, *[None] * 9, (None, None), None, None)


@cache
def _kernel(kind: str, members: int) -> Callable[..., None]:
    """A kernel for `members` query heads a key head, from disk or compiled now; RuntimeError."""
    if os.environ.get(CACHE_SWITCH, "1") != "1":
        with tempfile.TemporaryDirectory() as folder:
            return _load(_built(kind, members, Path(folder) / f"{kind}.so"))
    folder = Path(os.environ.get(CACHE_FOLDER) or CACHE.with_name("flash4"))
    library = folder / f"fairway_{kind}_{members}_{_digest()}.so"
    try:
        return _load(library)
    except OSError:  # not there, or what it was linked with has moved
        return _kept(kind, members, library)


def _kept(kind: str, members: int, library: Path) -> Callable[..., None]:
    """The kernel, made unless another process has just done so. Raises RuntimeError."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):
            try:
                return _load(library)
            except OSError:
                return _load(_built(kind, members, library))
    except OSError as error:
        raise RuntimeError(
            f"attention 'flash4' cannot keep its kernels in {library.parent} ({error}): let "
            f"{CACHE_FOLDER} name a folder for them, or set {CACHE_SWITCH}=0"
        ) from error


def _digest() -> str:
    """Hash of all that decides what the kernels compile to."""
    digest = hashlib.sha256()
    for path in SOURCES:
        digest.update(path.read_bytes())
    for item in versions().items():
        digest.update("=".join(item).encode())
    return digest.hexdigest()[:16]


def _load(library: Path) -> Callable[..., None]:
    """The function in a library. Raises OSError."""
    if not library.exists():
        raise FileNotFoundError(library)
    try:
        return importlib.import_module("tvm_ffi").load_module(str(library))[EXPORTED]
    except (RuntimeError, AttributeError) as error:
        raise OSError(f"{library} cannot be loaded: {error}") from error


def _built(kind: str, members: int, library: Path) -> Path:
    """Compile and link a kernel into `library`. Raises RuntimeError."""
    compiled = _compiled_forward(members) if kind == "forward" else _compiled_backward()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = [Path(folder) / f"{kind}.{suffix}" for suffix in ("o", "so")]
        compiled.export_to_c(object_file_path=str(made[0]), function_name=EXPORTED)
        _link(*made)
        made[1].replace(library)
    return library


def _link(object_file: Path, library: Path) -> None:
    """A shared library of an object file. Raises RuntimeError."""
    compiler = os.environ.get("CC") or "cc"
    needed = [_inside(package) / path for package, path in LIBRARIES.items()]
    paths = [f"-Wl,-rpath,{path.parent}" for path in needed]
    command = [*shlex.split(compiler), "-shared", "-o", library, object_file, *needed, *paths]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            "attention 'flash4' links its kernels with a C compiler: install gcc or set CC "
            f"({error})\n{getattr(error, 'stderr', '')[-2000:]}"
        ) from error


def _inside(package: str) -> Path:
    """Folder of an installed package, which is not imported."""
    found = find_spec(package)
    assert found is not None, f"{package} comes with flash-attn-4"
    return Path(next(iter(found.submodule_search_locations or ())))


def _compiled_forward(members: int) -> Any:
    """The kernel as the package sets it up, for groups of `members` query heads, heads apart."""
    package = interface()
    from kernels.flash4_epilogue import WithoutOwnValues  # here: it needs the package

    chosen = package._tile_size_fwd_sm90(HEAD_SIZE, HEAD_SIZE, True, False)
    kernel = WithoutOwnValues(
        package.torch2cute_dtype_map[torch.bfloat16],
        HEAD_SIZE,
        HEAD_SIZE,
        members,
        is_causal=True,
        is_local=False,
        pack_gqa=False,
        tile_m=chosen.m_block_size,
        tile_n=chosen.n_block_size,
        num_stages=2,
        num_threads=384,
        Q_in_regs=False,
        intra_wg_overlap=chosen.intra_wg_overlap,
        mma_pv_is_rs=chosen.mma_pv_is_rs,
    )
    q, k, v, rest = (_heads(package) for _ in range(4))
    lse2, own = (_rows(package) for _ in range(2))
    return _compiled(package, kernel, (q, k, v, rest, lse2), package.AuxData([v, own], None))


def _compiled_backward() -> Any:
    """The kernel as the package sets it up for causal attention on Hopper, a key head each."""
    package = interface()
    chosen = package._tile_size_bwd_sm90(HEAD_SIZE, HEAD_SIZE, True, False)
    assert (chosen.m_block_size, chosen.n_block_size, chosen.AtomLayoutMdQ) == (TILE, TILE, 2)
    kernel = package.FlashAttentionBackwardSm90(
        package.torch2cute_dtype_map[torch.bfloat16],
        HEAD_SIZE,
        HEAD_SIZE,
        1,
        True,
        is_local=False,
        deterministic=False,
        tile_m=chosen.m_block_size,
        tile_n=chosen.n_block_size,
        Q_stage=chosen.num_stages_Q,
        dO_stage=chosen.num_stages_dO,
        PdS_stage=chosen.num_stages_PdS,
        SdP_swapAB=chosen.SdP_swapAB,
        dKV_swapAB=chosen.dKV_swapAB,
        dQ_swapAB=chosen.dQ_swapAB,
        AtomLayoutMSdP=chosen.AtomLayoutMSdP,
        AtomLayoutNdKV=chosen.AtomLayoutNdKV,
        AtomLayoutMdQ=chosen.AtomLayoutMdQ,
        num_threads=(chosen.num_wg + 1) * 128,
        V_in_regs=False,
        dQ_single_wg=chosen.dQ_single_wg,
    )
    tensors = [_heads(package) for _ in range(4)]
    tensors += [_rows(package) for _ in range(3)] + [_heads(package) for _ in range(2)]
    return _compiled(package, kernel, tensors, package.AuxData(None, None))


def _compiled(package: Any, kernel: Any, tensors: Sequence[Any], aux: Any) -> Any:
    """`kernel` compiled for tensors of any size, on torch's current stream."""
    cute = package.cute
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    arguments = (*tensors, HEAD_SIZE**-0.5, *[None] * 9, aux, None, None, stream)
    with warnings.catch_warnings():
        # Its own container is strange to the compiler, which takes it all the same.
        warnings.filterwarnings("ignore", message="Argument aux_data")
        return cute.compile(kernel, *arguments, options="--enable-tvm-ffi")


def _heads(package: Any) -> Any:
    """A stand-in for heads in bfloat16, [any, any, any, HEAD_SIZE], at multiples of 16 bytes."""
    kind = package.torch2cute_dtype_map[torch.bfloat16]
    return _tensor(package, kind, (*_sizes(package), HEAD_SIZE), 16)


def _rows(package: Any) -> Any:
    """A stand-in for rows' float32 numbers, [any, any, any]."""
    return _tensor(package, package.Float32, _sizes(package), 4)


def _sizes(package: Any) -> tuple[Any, ...]:
    return tuple(package.cute.sym_int() for _ in range(3))


def _tensor(package: Any, kind: Any, shape: tuple[Any, ...], bytes_aligned: int) -> Any:
    """A stand-in for a tensor whose last dim is contiguous; the others lie as they like."""
    cute = package.cute
    strides = (*(cute.sym_int64() for _ in shape[1:]), 1)
    return cute.runtime.make_fake_tensor(kind, shape, strides, assumed_align=bytes_aligned)
