"""The embedded corpus: English that CPython itself installs, so that nothing is downloaded.

Documents are the topics of `pydoc_data` and, for each standard-library module, its docstrings.
Every paragraph is kept once, where it first occurs, so nothing in the validation split occurs in
training. A document is held out when the hash of its text says so.

The result lies in `.cache/embedded-FINGERPRINT` beside the `trainer` package. The fingerprint
covers the sources' content, the Python and SentencePiece versions and this file, so a change in
any of them builds anew; deleting `.cache` is always safe.
"""

import ast
import hashlib
import inspect
import platform
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np
import sentencepiece

from trainer import files
from trainer.errors import DataError, RunError
from trainer.progress import log, progress
from trainer.shards import write_shard
from trainer.tokenizer import Tokenizer, train_tokenizer

VOCAB_SIZE = 1024
TRAIN_SHARDS = 8
HELD_OUT_PARTS = 20  # one document in twenty
MIN_DOCUMENT_CHARS = 200
CACHE = Path(__file__).resolve().parent.parent / ".cache"

_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "ensurepip",
    "encodings",
    "__pycache__",
}
_LETTERS = re.compile(r"[\W_]+")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


def ensure_built(cache: Path = CACHE) -> Path:
    """The folder of the embedded corpus's shards and tokenizer, built if it is not there.

    Raises:
        DataError: this Python has no readable standard-library sources.
        RunError: `cache` cannot be written.
    """
    sources = stdlib_sources()
    print_ = fingerprint(sources)
    folder = cache / f"embedded-{print_[:16]}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / "embedded.lock"):
            if not folder.is_dir():
                _build(folder, sources, print_)
    except OSError as error:
        raise RunError(
            f"cannot write the embedded corpus to {cache}: {error.strerror or error}. "
            "Free some space or make the folder writable."
        ) from error
    return folder


def stdlib_sources() -> dict[str, bytes]:
    """Name -> content of the standard library's .py files, in order of name. Raises DataError."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
        and path.relative_to(root).parts[0] != "config"
    }
    if "pydoc_data/topics.py" not in sources:
        raise DataError(
            f"this Python has no standard-library sources with pydoc_data in {root}, from which "
            "the embedded corpus is built. Install them, or set data.dir to a folder of shards "
            "(`python -m trainer.fetch`)."
        )
    return dict(sorted(sources.items()))


def fingerprint(sources: dict[str, bytes]) -> str:
    """Hash of everything the built corpus depends on."""
    digest = hashlib.sha256()
    builder = [Path(__file__), Path(inspect.getfile(Tokenizer))]
    versions = f"{platform.python_version()} {sentencepiece.__version__}"
    for part in (versions.encode(), *(path.read_bytes() for path in builder)):
        digest.update(hashlib.sha256(part).digest())
    for name, content in sources.items():
        digest.update(hashlib.sha256(name.encode()).digest())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def split_documents(sources: dict[str, bytes]) -> tuple[list[str], list[str]]:
    """Training and validation documents, each in the order of their hashes."""
    kept = _without_repeats(_documents(sources))
    hashed = sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in kept)
    held_out = [int(digest[:8], 16) % HELD_OUT_PARTS == 0 for digest, _ in hashed]
    train = [text for (_, text), out in zip(hashed, held_out, strict=True) if not out]
    val = [text for (_, text), out in zip(hashed, held_out, strict=True) if out]
    return train, val


def paragraphs(text: str) -> list[str]:
    """The parts of `text` between blank lines."""
    return [part.strip("\n") for part in _PARAGRAPH_BREAK.split(text) if part.strip()]


def paragraph_key(paragraph: str) -> str:
    """What makes two paragraphs the same: letters and digits, case aside."""
    return _LETTERS.sub("", paragraph.casefold())


def _documents(sources: dict[str, bytes]) -> Iterator[str]:
    with progress("embedded corpus: read", len(sources)) as advance:
        for name, content in sources.items():
            tree = _parse(content)
            if name == "pydoc_data/topics.py":
                yield from _topics(tree)
            else:
                yield "\n\n".join(_docstrings(tree))
            advance()


def _parse(content: bytes) -> ast.Module:
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError):
        # Some distributions ship templates that are not Python; they hold no docstrings.
        return ast.Module(body=[], type_ignores=[])


def _topics(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (ast.literal_eval(value) for value in node.values)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _without_repeats(documents: Iterator[str]) -> Iterator[str]:
    """Documents without the paragraphs that occurred before; short remains are dropped."""
    seen: set[str] = set()
    for text in documents:
        kept: list[str] = []
        for paragraph in paragraphs(text):
            key = paragraph_key(paragraph)
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
        document = "\n\n".join(kept)
        if len(document) >= MIN_DOCUMENT_CHARS:
            yield document


def _build(folder: Path, sources: dict[str, bytes], print_: str) -> None:
    log("building the embedded corpus (once; it is cached)")
    train, val = split_documents(sources)
    partial = Path(tempfile.mkdtemp(prefix=".embedded-", dir=folder.parent))
    try:
        model = partial / f"embedded_{VOCAB_SIZE}_bpe.model"
        with progress("embedded corpus: learn pieces", 1) as advance:
            files.write_bytes(model, train_tokenizer(train, VOCAB_SIZE))
            advance()
        tokenizer = Tokenizer(model, VOCAB_SIZE)
        train_N, val_N = _tokens(tokenizer, train), _tokens(tokenizer, val)
        for number, shard_N in enumerate(np.array_split(train_N, TRAIN_SHARDS)):
            write_shard(partial / f"embedded_train_{number:06d}.bin", shard_N)
        write_shard(partial / "embedded_val_000000.bin", val_N)
        manifest = {
            "fingerprint": print_,
            "python": platform.python_version(),
            "sentencepiece": sentencepiece.__version__,
            "vocab_size": VOCAB_SIZE,
            "train": _counts(train, train_N),
            "val": _counts(val, val_N),
        }
        files.write_json(partial / "manifest.json", manifest)
        partial.chmod(0o755)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tokens(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    encoded = tokenizer.encode_documents(documents)
    return np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])


def _counts(documents: list[str], tokens_N: np.ndarray) -> dict[str, int]:
    return {
        "documents": len(documents),
        "bytes": sum(len(text.encode()) for text in documents),
        "tokens": len(tokens_N),
    }
