"""Build the CUTLASS kernels: `python -m kernels.build`.

One translation unit a variant, linked into one plain C shared library that needs neither torch
nor Python: it may be built on a machine without a GPU and carried to one. The library is cached
by the hash of all sources, an object by that of its own, and both by flags and compiler.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from kernels.variants import VARIANTS, Variant

SOURCES = Path(__file__).resolve().parent / "cuda"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "kernels"
FLAGS = (
    "-gencode=arch=compute_90a,code=sm_90a",
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-DNDEBUG",  # without it ptxas serialises wgmma (warning C7510)
    "-Xptxas=-v",
    "-Xcompiler=-fPIC",
)
HEADER_PACKAGE = "nvidia-cutlass==4.2.0.0"
INCLUDE = re.compile(r'^#include "(\w+\.cuh)"', re.MULTILINE)
SERIALISED = re.compile(r"\(C75\d\d\)")
"""ptxas warnings that it gave up on asynchronous wgmma or on register reallocation."""


def source_hash() -> str:
    """Hash of everything that decides what the library does, the compiler left aside.

    The loader knows no compiler, so this names the library; the compiler's version is recorded
    beside it and checked when building.
    """
    return _digest(sorted(SOURCES.iterdir()), *VARIANTS)


def object_folder(text: str, version: str) -> Path:
    """Where the object lies that `version` of the compiler made of a translation unit.

    Args:
        text: the unit's source; with it count the headers it includes, and theirs.
        version: from `compiler_version`.
    """
    return CACHE / f"object_{_digest(_headers(text), text, version)}"


def _headers(text: str) -> list[Path]:
    """Our own headers that a source includes, directly or not."""
    found: set[Path] = set()
    waiting = [text]
    while waiting:
        new = {SOURCES / name for name in INCLUDE.findall(waiting.pop())} - found
        found |= new
        waiting += [path.read_text() for path in new]
    return sorted(found)


def _digest(files: Sequence[Path], *extra: str) -> str:
    """Hash of files with their names, the flags, CUTLASS's version, and `extra`."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    for part in (*FLAGS, HEADER_PACKAGE, *extra):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def library_path() -> Path:
    """Where the library of the present sources lies once built."""
    return CACHE / f"fairway_kernels_{source_hash()}.so"


def find_nvcc() -> Path:
    """The CUDA compiler: on PATH, under CUDA_HOME, or under /usr/local/cuda.

    Raises:
        RuntimeError: there is none.
    """
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    raise RuntimeError(
        "no CUDA compiler: nvcc is neither on PATH nor under CUDA_HOME or /usr/local/cuda. "
        "Install the CUDA toolkit 12.8 or newer, or copy a library built elsewhere to "
        f"{library_path()}"
    )


def find_headers() -> tuple[Path, Path]:
    """Include folders of CUTLASS inside the installed nvidia-cutlass wheel.

    Raises:
        RuntimeError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations))) / "source"
        folders = (root / "include", root / "tools" / "util" / "include")
        if all(folder.is_dir() for folder in folders):
            return folders
    raise RuntimeError(
        "no CUTLASS headers: install their wheel with "
        f"`python -m pip install --no-deps {HEADER_PACKAGE}`"
    )


def compiler_version(nvcc: Path) -> str:
    """Release and build of nvcc, from its last lines of output.

    Raises:
        RuntimeError: it does not run.
    """
    try:
        result = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"the CUDA compiler {nvcc} does not run: {error}") from error
    return " ".join(result.stdout.split()[-4:])


def build(variants: Sequence[str] | None = None, jobs: int = 1) -> Path:
    """Compile and link what is missing; returns the library (or, for some variants, a partial one).

    Args:
        variants: names to build; None builds all into the library the loader looks for.
        jobs: compilations at once; each takes about 4 GB and a minute.

    Raises:
        RuntimeError: compiler or headers missing, or a compilation failed.
        KeyError: an unknown variant.
    """
    nvcc, headers = find_nvcc(), find_headers()
    version = compiler_version(nvcc)
    names = list(VARIANTS) if variants is None else list(variants)
    library = library_path()
    if variants is not None:
        subset = hashlib.sha256(",".join(names).encode()).hexdigest()[:8]
        library = library.with_name(f"{library.stem}_part_{subset}.so")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "build.lock"):
        sidecar = library.with_suffix(".json")
        if library.exists() and _built_with(sidecar) == version:
            return library
        units = {"status": (SOURCES / "status.cu").read_text()}
        units.update((name, instantiate(VARIANTS[name])) for name in names)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(
                pool.map(lambda unit: _compile(nvcc, headers, version, *unit), units.items())
            )
        _link(nvcc, objects, library)
        partial = sidecar.with_suffix(".partial")
        partial.write_text(json.dumps({"compiler": version, "variants": names}, indent=2))
        partial.replace(sidecar)
    return library


def _built_with(sidecar: Path) -> str | None:
    """Compiler of the library beside `sidecar`; None when an interrupted build did not say."""
    try:
        return json.loads(sidecar.read_text())["compiler"]
    except (OSError, ValueError, KeyError):
        return None


def instantiate(variant: Variant) -> str:
    """Source of a variant's translation unit."""
    source = "linear_mix" if variant.skip else variant.op
    text, shape = ((SOURCES / f"{name}.cu.in").read_text() for name in (source, "variant"))
    values = {
        "VARIANT": shape.rstrip(),
        "M": variant.tile[0],
        "N": variant.tile[1],
        "K": variant.tile[2],
        "CM": variant.cluster[0],
        "CN": variant.cluster[1],
        "EM": variant.epilogue[0],
        "EN": variant.epilogue[1],
        "SCHEDULE": variant.schedule,
        "OPERAND": variant.operand,
        "STORES": variant.stores,
        "LOADS": variant.loads,
        "SKIP": str(variant.skip).lower(),
        "NAME": variant.name,
    }
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    return text


def _compile(nvcc: Path, headers: tuple[Path, Path], version: str, name: str, text: str) -> Path:
    """Object file of one translation unit, from the cache if it is there."""
    folder = object_folder(text, version)
    folder.mkdir(exist_ok=True)
    target = folder / f"{name}.o"
    if target.exists():
        return target
    source = folder / f"{name}.cu"
    source.write_text(text)
    partial = folder / f"{name}.partial.o"
    includes = [f"-I{path}" for path in (SOURCES, *headers)]
    started = time.perf_counter()
    result = subprocess.run(
        [nvcc, *FLAGS, *includes, "-c", source, "-o", partial],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"compiling {name} failed:\n{result.stderr[-4000:]}")
    if SERIALISED.search(result.stderr):
        raise RuntimeError(
            f"compiling {name}: ptxas serialised the matrix instructions:\n{result.stderr[-4000:]}"
        )
    (folder / f"{name}.log").write_text(result.stderr)
    partial.replace(target)
    print(f"compiled {name} in {time.perf_counter() - started:.0f} s", flush=True)
    return target


def _link(nvcc: Path, objects: list[Path], library: Path) -> None:
    """One shared library with the CUDA runtime inside."""
    partial = library.with_suffix(".partial")
    result = subprocess.run(
        [nvcc, "-shared", "-cudart=static", FLAGS[0], *objects, "-o", partial],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"linking failed:\n{result.stderr[-4000:]}")
    partial.replace(library)


def main() -> int:
    """Build from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels.build", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="compilations at once (4 GB each)")
    parser.add_argument(
        "--variant", action="append", choices=list(VARIANTS), help="build only this (repeatable)"
    )
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be 1 or more, not {arguments.jobs}")
    try:
        library = build(arguments.variant, arguments.jobs)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"built {library} ({library.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
