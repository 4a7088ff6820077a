"""Bytes of code that count towards the contest's limit: the sources of `trainer` and `kernels`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("trainer", "kernels")
SUFFIXES = (".py", ".cu", ".cuh", ".in")


def code_files() -> dict[str, int]:
    """Size in bytes of every counted source file, by path relative to the project."""
    return {
        str(path.relative_to(ROOT)): path.stat().st_size
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*"))
        if path.suffix in SUFFIXES
    }


def code_bytes() -> int:
    """Sum of the sizes of all counted source files."""
    return sum(code_files().values())
