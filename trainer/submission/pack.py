"""One self-contained script from the sources of `trainer` and `kernels`.

The modules that the record's commands import, found by following import statements, lose what
nothing in them uses, are minified (python-minifier) and encoded together as the surprises of a
model (`mixing`), a tenth less than Brotli makes of them. The script holds the result as a string
literal in Latin-1, written as a number with a digit for each of the 251 characters that need no
escape: 0.4 % more than the archive itself, where base85 takes 25 %. The same sources give the same
bytes.
"""

import ast
import hashlib
import platform
import re
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path

import brotli
import python_minifier

from kernels.variants import VARIANTS
from trainer.submission import coding, cplusplus, shake
from trainer.submission.start import DIGITS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("trainer", "kernels")
COMMANDS = ("trainer.__main__", "trainer.evaluate", "kernels.build")
"""What the script can run, and therefore whose imports it holds."""

STAND_INS = {
    "trainer.codesize": "trainer.submission.own_size",
    "trainer.embedded": "trainer.submission.own_corpus",
    "trainer.report": "trainer.submission.own_report",
}
"""Modules whose place another one takes inside the script."""

ROOTS = ("main",)
"""What the start of the script calls in a command."""

OPTIONAL = ("kernels.flash4_epilogue",)
"""Modules for attention `flash4` alone: what they import comes with its package."""

PROGRAM = ("trainer.submission.mixing", "trainer.submission.unpack")
"""What it runs first, as one source."""
STARTED = ("start", "unpack", "decode")
"""Names of it that the start of the script and the checks call."""

DEVICE_SOURCES = "kernels/cuda"
"""Packed without comments. A kernel library is named after its sources, so the script builds its
own."""

HEADER = """# -*- coding: latin-1 -*-
# Fairway in one file: trains, quantizes, compresses and scores. Try --help.
# It unpacks its minified sources into a hidden folder beside itself.
"""

_KEEPS_NAMES = re.compile(r"^(import|from) triton|\b(custom|triton)_op\(", re.MULTILINE)
"""Triton compiles what its functions say, and operator schemas come from annotations."""
_READS_ANNOTATIONS = re.compile(r"^triton\.|\b(custom|triton)_op\(")


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
    """Top-level names that the packed modules import from other projects, in order.

    Those of `OPTIONAL` are left out.
    """
    names: set[str] = {"brotli"}
    for path in (path for name, path in modules().items() if name not in OPTIONAL):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names.update(name.split(".")[0] for name in _imported(tree))
    return sorted(names - set(PACKAGES) - set(sys.stdlib_module_names))


def archive() -> dict[str, str]:
    """Content of every packed file, by its path below the unpacked folder."""
    sources = modules()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in sources.items()}
    _keep_planned(trees["kernels.variants"])
    shake.drop_unused(trees, ROOTS)
    private = shake.private_names(trees, ROOTS)
    packed = {
        _target(name, path): minify(trees[name], private[name]) for name, path in sources.items()
    }
    for path in _device_sources():
        text = path.read_text(encoding="utf-8")
        packed[path.relative_to(ROOT).as_posix()] = cplusplus.strip(text)
    return packed


def _keep_planned(tree: ast.Module) -> None:
    """Of the variants in kernels/variants.py keep those that a plan names: others are for tables.

    A list of another form is an AssertionError.
    """
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    (elements,) = (
        statement.value.elts
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Tuple)
        and ast.unparse(statement.targets[0]) == "_ALL"
    )
    named = list(zip(VARIANTS, elements, strict=True))
    elements[:] = [element for name, element in named if name in strings]


def minify(tree: ast.Module, private: Collection[str] = ()) -> str:
    """`tree` without docstrings and needless annotations, and with short names.

    Modules with device code or operators keep the names, and annotations where they are read.

    Args:
        tree: a module; changed in place.
        private: names of the module that may be shortened, for no other one has a word for them.
    """
    source = ast.unparse(tree)
    free = _KEEPS_NAMES.search(source) is None
    if not free:
        _drop_annotations(tree)
        source = ast.unparse(tree)
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
        rename_globals=free and bool(private),
        preserve_globals=sorted(shake.names(tree) - set(private)),
        constant_folding=free,
        hoist_literals=False,  # `mixing` does that better
    )


def _drop_annotations(tree: ast.Module) -> None:
    """Those of functions that neither Triton nor torch reads."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        if any(_READS_ANNOTATIONS.search(ast.unparse(d)) for d in node.decorator_list):
            continue
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None


def packed_script() -> bytes:
    """The whole of `train_gpt.py`."""
    text = "\0".join(field for item in archive().items() for field in item)
    sources = digits(coding.encode(text))
    program = digits(brotli.compress(_program().encode()))
    start = minify(_tree("trainer.submission.start"))
    digest = hashlib.sha256((program + sources).encode("latin-1")).hexdigest()
    for constant, value in (("PROGRAM", program), ("ARCHIVE", sources), ("DIGEST", digest)):
        empty = f"{constant}=''"
        assert start.count(empty) == 1, f"start.py must define {constant} once, as an empty string"
        start = start.replace(empty, f"{constant}='{value}'")
    return (HEADER + start + "\n").encode("latin-1")


def _program() -> str:
    """The modules of PROGRAM as one source, without their imports of each other."""
    tree = ast.Module([], [])
    for name in PROGRAM:
        tree.body += [
            statement
            for statement in _tree(name).body
            if not (isinstance(statement, ast.ImportFrom) and statement.module in PROGRAM)
        ]
    return minify(tree, shake.names(tree) - {*STARTED})


def digits(data: bytes) -> str:
    """`data` as a number of which `start.number` makes the bytes again; the first must not be 0."""
    number, found = int.from_bytes(data, "big"), ""
    assert data[:1] > b"\0"
    while number:
        number, digit = divmod(number, len(DIGITS))
        found += DIGITS[digit]
    return found[::-1]


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


def _tree(module: str) -> ast.Module:
    path = _source(module)
    assert path is not None, module
    return ast.parse(path.read_text(encoding="utf-8"))


def _target(module: str, source: Path) -> str:
    stem = module.replace(".", "/")
    return f"{stem}/__init__.py" if source.name == "__init__.py" else f"{stem}.py"


def _device_sources() -> list[Path]:
    return sorted(path for path in (ROOT / DEVICE_SOURCES).iterdir() if path.is_file())
