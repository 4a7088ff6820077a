"""One self-contained script from the sources of `trainer` and `kernels`.

The modules that the record's commands import, found by following import statements, are minified
(python-minifier) and compressed together (Brotli 11). The script holds the result as a string
literal in Latin-1, where a byte is a character and only five need an escape: 2 % more than the
archive itself, where base85 takes 25 %. The same sources give the same bytes.
"""

import ast
import hashlib
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import brotli
import python_minifier

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("trainer", "kernels")
COMMANDS = ("trainer.__main__", "trainer.evaluate", "kernels.build")
"""What the script can run, and therefore whose imports it holds."""

STAND_INS = {"trainer.codesize": "trainer.submission.own_size"}
"""Modules whose place another one takes inside the script."""

DEVICE_SOURCES = "kernels/cuda"
"""Packed as they are: the kernel library's name is their hash, so a library built from the
repository serves the script too."""

HEADER = """# -*- coding: latin-1 -*-
# Fairway in one file: trains, quantizes, compresses and scores. Try --help.
# It unpacks its minified sources into a hidden folder beside itself.
"""

_KEEPS_NAMES = re.compile(r"^(import|from) triton|\b(custom|triton)_op\(", re.MULTILINE)
"""Triton compiles what its functions say, and operator schemas come from annotations."""


def modules() -> dict[str, Path]:
    """Source file of every module the commands import, by the name it goes by in the script."""
    found: dict[str, Path] = {}
    waiting: list[str] = list(COMMANDS)
    while waiting:
        name = waiting.pop()
        path = _source(STAND_INS.get(name, name))
        if name in found or path is None:
            continue
        found[name] = path
        waiting.extend(_imported(ast.parse(path.read_text(encoding="utf-8"))))
        waiting.append(name.rpartition(".")[0])
    return dict(sorted(found.items()))


def third_party() -> list[str]:
    """Top-level names that the packed modules import from other projects, in order."""
    names: set[str] = {"brotli"}
    for path in modules().values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names.update(name.split(".")[0] for name in _imported(tree))
    return sorted(names - set(PACKAGES) - set(sys.stdlib_module_names))


def archive() -> dict[str, str]:
    """Content of every packed file, by its path below the unpacked folder."""
    packed = {
        _target(name, path): minify(path.read_text(encoding="utf-8"))
        for name, path in modules().items()
    }
    for path in _device_sources():
        packed[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return packed


def minify(source: str) -> str:
    """`source` without comments, docstrings and needless annotations, and with short locals.

    Modules with device code or operators keep their names and annotations.
    """
    free = _KEEPS_NAMES.search(source) is None
    return python_minifier.minify(
        source,
        remove_literal_statements=True,
        remove_annotations=python_minifier.RemoveAnnotationsOptions(
            remove_variable_annotations=free,
            remove_return_annotations=free,
            remove_argument_annotations=free,
            remove_class_attribute_annotations=False,
        ),
        rename_locals=free,
        constant_folding=free,
        hoist_literals=False,  # Brotli does that better
    )


def packed_script() -> bytes:
    """The whole of `train_gpt.py`."""
    text = "\0".join(field for item in archive().items() for field in item)
    data = brotli.compress(text.encode(), mode=brotli.MODE_TEXT, quality=11, lgwin=24)
    start = minify(_existing("trainer.submission.start").read_text(encoding="utf-8"))
    for constant, value in (
        ("PAYLOAD", latin1_literal(data)),
        ("DIGEST", f"'{hashlib.sha256(data).hexdigest()}'"),
    ):
        empty = f"{constant}=''"
        assert start.count(empty) == 1, f"start.py must define {constant} once, as an empty string"
        start = start.replace(empty, f"{constant}={value}")
    return (HEADER + start + "\n").encode("latin-1")


def latin1_literal(data: bytes) -> str:
    """A Python string literal on one line whose value, encoded as Latin-1, is `data`."""
    text = data.decode("latin-1").translate({92: r"\\", 39: r"\'", 10: r"\n", 13: r"\r"})
    text = re.sub("\0(?=[0-7])", r"\\x00", text)  # an octal escape would swallow the digit
    return "'" + text.replace("\0", r"\0") + "'"


def source_digest() -> str:
    """Hash of all sources and tools that decide the script's bytes, without packing."""
    digest = hashlib.sha256()
    tools = (platform.python_version(), version("python-minifier"), version("brotli"))
    digest.update("\0".join(tools).encode())
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    for path in sorted([*sources, *_device_sources()]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _imported(tree: ast.Module) -> Iterator[str]:
    """Every name an import statement anywhere in `tree` might mean as a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _source(module: str) -> Path | None:
    """Source file of one of our modules; None for any other name."""
    if module.split(".")[0] not in PACKAGES:
        return None
    stem = ROOT.joinpath(*module.split("."))
    candidates = (stem / "__init__.py", stem.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


def _existing(module: str) -> Path:
    path = _source(module)
    assert path is not None, module
    return path


def _target(module: str, source: Path) -> str:
    stem = module.replace(".", "/")
    return f"{stem}/__init__.py" if source.name == "__init__.py" else f"{stem}.py"


def _device_sources() -> list[Path]:
    return sorted(path for path in (ROOT / DEVICE_SOURCES).iterdir() if path.is_file())
