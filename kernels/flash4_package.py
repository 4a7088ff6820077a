"""The PyPI package flash-attn-4: which version, whether it is there, and where kernels are kept."""

import importlib
import os
from functools import cache
from importlib import metadata
from typing import Any

VERSION = "4.0.0b36"
REQUIREMENT = f"flash-attn-4[cu13]=={VERSION}"
INSTALL = f'pip install "{REQUIREMENT}"'

CACHE_SWITCH, CACHE_FOLDER = (
    f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("ENABLED", "DIR")
)
"""Environment variables of the package: whether compiled kernels stay on disk (1), and where."""

COMPILERS = ("nvidia-cutlass-dsl", "apache-tvm-ffi", "quack-kernels")
"""Packages it brings along that decide what its kernels compile to."""


def versions() -> dict[str, str]:
    """Version of the package and of `COMPILERS`, without importing any.

    Raises:
        RuntimeError: one is missing, or the package is of another version than its private
            functions are called for.
    """
    try:
        # By name: the packed submission lists what is imported as required, and this is optional.
        found = {name: metadata.version(name) for name in ("flash-attn-4", *COMPILERS)}
    except metadata.PackageNotFoundError as error:
        raise _missing(error) from error
    if found["flash-attn-4"] != VERSION:
        raise RuntimeError(
            f"attention 'flash4' calls flash-attn-4 {VERSION} by its private functions, but "
            f"{found['flash-attn-4']} is installed; install it with `{INSTALL}`"
        )
    return found


@cache
def interface() -> Any:
    """The package's module of entry points, imported once (3 to 9 s). Raises RuntimeError."""
    versions()
    # What it compiles is for Hopper, and is kept for the next process, unless the user has said
    # otherwise.
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
    os.environ.setdefault(CACHE_SWITCH, "1")
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        raise _missing(error) from error


def _missing(error: Exception) -> RuntimeError:
    return RuntimeError(
        f"attention 'flash4' cannot import flash-attn-4 ({error}); install it with `{INSTALL}`"
    )
