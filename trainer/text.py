"""Text files to shards.

Formats are told by content, not by name: zstd-compressed or not; JSON lines when the first line
is an object with a "text" string, one document a line; else plain UTF-8 text, one document a
file, cut at the next blank line once a document has PIECE_CHARS characters.

Memory stays constant: documents are encoded in groups and a shard is written when it is full.
"""

import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import zstandard

from trainer import files
from trainer.errors import ConfigError, DataError
from trainer.progress import progress
from trainer.shards import Split, write_shard
from trainer.tokenizer import Tokenizer, train_tokenizer

PIECE_CHARS = 1 << 20
GROUP_CHARS = 1 << 21
TOKENIZER_TRAINING_CHARS = 10_000_000
READ_BYTES = 1 << 17
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

Advance = Callable[[int], None]


def read_documents(path: Path, on_read: Advance = lambda _: None) -> Iterator[str]:
    """The documents of a text or JSON-lines file, empty ones left out.

    Args:
        path: the file, zstd-compressed or not.
        on_read: told the file bytes read since the last call.

    Raises:
        DataError: unreadable or truncated file, bytes that are not UTF-8, a line that is not an
            object with a "text" string.
    """
    try:
        with path.open("rb") as raw:
            lines = _counted(_open_text(raw), raw, on_read)
            first = next(lines, "")
            lines = itertools.chain([first], lines)
            documents = _json_lines(lines, path) if _is_json_line(first) else _pieces(lines)
            yield from (text for text in documents if text.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Convert it first.") from error
    except zstandard.ZstdError as error:
        raise DataError(f"{path} is a damaged zstd file ({error}). Fetch it again.") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def document_key(text: str) -> int:
    """64-bit hash of a document, white space and case aside; equal for exact duplicates."""
    folded = " ".join(text.split()).casefold()
    digest = hashlib.blake2b(folded.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass
class SplitCounts:
    """What went into one split."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    shards: int = 0
    unknown: int = 0


@dataclass
class _Writer:
    """Collects encoded documents of one split and writes full shards."""

    folder: Path
    split: Split
    shard_tokens: int
    counts: SplitCounts = field(default_factory=SplitCounts)
    parts: list[np.ndarray] = field(default_factory=list)
    waiting: int = 0

    def add(self, ids_N: np.ndarray) -> None:
        self.parts.append(ids_N)
        self.waiting += len(ids_N)
        self.counts.tokens += len(ids_N)
        while self.waiting >= self.shard_tokens:
            tokens_N = np.concatenate(self.parts)
            self._write(tokens_N[: self.shard_tokens])
            self.parts = [tokens_N[self.shard_tokens :]]
            self.waiting = len(self.parts[0])

    def finish(self) -> None:
        if self.waiting:
            self._write(np.concatenate(self.parts))

    def _write(self, tokens_N: np.ndarray) -> None:
        name = f"text_{self.split}_{self.counts.shards:06d}.bin"
        write_shard(self.folder / name, tokens_N)
        self.counts.shards += 1


@dataclass(frozen=True)
class TextSources:
    """Text for both splits: `val` files, or else a share of the documents of `train`."""

    train: tuple[Path, ...]
    val: tuple[Path, ...] = ()
    val_fraction: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction {self.val_fraction} must lie between 0 and 1")

    @property
    def total_bytes(self) -> int:
        """Size of all files. Raises DataError for a missing one."""
        missing = [str(path) for path in (*self.train, *self.val) if not path.is_file()]
        if missing:
            raise DataError(f"no such text file: {', '.join(missing)}")
        return sum(path.stat().st_size for path in (*self.train, *self.val))

    def documents(self, on_read: Advance = lambda _: None) -> Iterator[tuple[Split, str]]:
        """Every document with its split; training documents that also are held out are dropped."""
        held_out: set[int] = set()
        for path in self.val:
            for text in read_documents(path, on_read):
                held_out.add(document_key(text))
                yield "val", text
        for path in self.train:
            for text in read_documents(path, on_read):
                key = document_key(text)
                if self.val:
                    if key not in held_out:
                        yield "train", text
                else:
                    yield ("val" if key < self.val_fraction * 2**64 else "train"), text


def write_tokenizer(sources: TextSources, path: Path, vocab_size: int) -> None:
    """Train a tokenizer on the first 10 million characters of training text.

    Raises:
        DataError: unreadable or too little text.
        RunError: `path` cannot be written.
    """
    files.write_bytes(path, train_tokenizer(_training_sample(sources), vocab_size))


def _training_sample(sources: TextSources) -> Iterator[str]:
    taken = 0
    for split, text in sources.documents():
        if split == "train":
            yield text
            taken += len(text)
            if taken >= TOKENIZER_TRAINING_CHARS:
                return


def write_shards(
    sources: TextSources, tokenizer: Tokenizer, folder: Path, shard_tokens: int
) -> dict[Split, SplitCounts]:
    """Encode `sources` into shards in `folder`; documents keep their order within a split.

    Raises:
        DataError: unreadable text, or a split without documents.
        RunError: the disk is full or `folder` cannot be written.
    """
    writers: dict[Split, _Writer] = {
        split: _Writer(folder, split, shard_tokens) for split in ("train", "val")
    }
    threads = os.cpu_count() or 1
    unknown = tokenizer.model.unk_id()
    with progress("encode text (bytes)", sources.total_bytes) as advance:
        for group in _grouped(sources.documents(advance)):
            encoded = tokenizer.encode_documents([text for _, text in group], threads)
            for (split, text), ids in zip(group, encoded, strict=True):
                writer, ids_N = writers[split], np.array(ids, dtype=np.uint16)
                writer.counts.documents += 1
                writer.counts.bytes += len(text.encode())
                writer.counts.unknown += int((ids_N == unknown).sum())
                writer.add(ids_N)
    for split, writer in writers.items():
        writer.finish()
        if not writer.counts.documents:
            raise DataError(
                f"the {split} split got no document. Give more text, or --val files or another "
                "--val-fraction."
            )
    return {split: writer.counts for split, writer in writers.items()}


def _open_text(raw: BinaryIO) -> TextIO:
    compressed = raw.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC
    raw.seek(0)
    stream = io.BufferedReader(_ZstdFrames(raw)) if compressed else raw
    # Only \n ends a line, and nothing is translated: the text's own bytes count.
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")


class _ZstdFrames(io.RawIOBase):
    """Decompressed bytes of the frames in a file; unlike zstandard's own reader it notices a
    file that ends inside a frame.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.inside = False
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` (writable bytes); 0 at the end. Raises zstandard.ZstdError."""
        while not self.ready:
            packed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
                self.inside = False
            packed = packed or self.raw.read(READ_BYTES)
            if not packed:
                if self.inside:
                    raise zstandard.ZstdError("it ends before its data does")
                return 0
            self.inside = True
            self.ready = memoryview(self.frame.decompress(packed))
        target = memoryview(buffer)
        count = min(len(target), len(self.ready))
        target[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count


def _counted(lines: Iterable[str], raw: BinaryIO, on_read: Advance) -> Iterator[str]:
    told = 0
    for line in lines:
        yield line
        at = raw.tell()
        if at != told:
            on_read(at - told)
            told = at


def _is_json_line(line: str) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}). Mend it.") from error
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{path}, line {number} has no "text" string. Mend or drop it.')
        yield text


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    piece: list[str] = []
    chars = 0
    for line in lines:
        piece.append(line)
        chars += len(line)
        if chars >= PIECE_CHARS and not line.strip():
            yield "".join(piece)
            piece, chars = [], 0
    yield "".join(piece)


def _grouped(documents: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    """Lists of documents with about GROUP_CHARS characters each, in order."""
    group: list[tuple[Split, str]] = []
    chars = 0
    for split, text in documents:
        group.append((split, text))
        chars += len(text)
        if chars >= GROUP_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group
