"""The shard format: 256 little-endian int32 (magic, version, count, 0...), then uint16 tokens.

The contest's format. Documents follow one another, each starting with BOS; a shard may end, and
the next begin, inside a document.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from trainer import files
from trainer.errors import DataError

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_DTYPE = np.dtype("<u2")
SCAN_TOKENS = 1 << 24

Split = Literal["train", "val"]


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write `tokens` (integers in 0..65535) as one shard, atomically.

    Raises:
        DataError: a token does not fit into 16 bits.
        RunError: the disk is full or the folder cannot be written.
    """
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= 0xFFFF:
        raise DataError(f"{path}: token ids must lie in 0..65535; use a smaller vocabulary")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with files.atomic_path(path) as partial, partial.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype=TOKEN_DTYPE).data)


def read_shard(path: Path, vocab_size: int) -> np.memmap:
    """Map the tokens of a shard, uint16 [N], after checking all of it.

    Every token id is looked at once: one pass at memory or disk speed, which also warms the page
    cache.

    Raises:
        DataError: wrong magic or version, truncated or padded body, token id >= `vocab_size`.
    """
    count = check_header(path)
    if count == 0:
        raise DataError(f"{path} holds no tokens. {_advice(path)}")
    tokens_N = np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(count,))
    for start in range(0, count, SCAN_TOKENS):
        largest = int(tokens_N[start : start + SCAN_TOKENS].max())
        if largest >= vocab_size:
            raise DataError(
                f"{path} holds token id {largest}, but the vocabulary has {vocab_size} pieces "
                f"(0..{vocab_size - 1}). Use the tokenizer and the model.vocab_size that the shard "
                f"was written with, or {_advice(path).lower()}"
            )
    return tokens_N


def check_header(path: Path) -> int:
    """Tokens in the shard, after comparing its header with its size.

    Raises:
        DataError: unreadable, wrong magic or version, truncated or padded body.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {_advice(path)}") from error
    if len(head) < HEADER_BYTES:
        raise DataError(
            f"{path} is truncated: {size_bytes} bytes, less than its {HEADER_BYTES}-byte header. "
            f"{_advice(path)}"
        )
    magic, version, count = (int(v) for v in np.frombuffer(head, dtype="<i4")[:3])
    if magic != MAGIC:
        raise DataError(f"{path} is not a token shard: magic {magic}, not {MAGIC}. {_advice(path)}")
    if version != VERSION:
        raise DataError(
            f"{path} is a shard of version {version}; only version {VERSION} is known. "
            f"{_advice(path)}"
        )
    expected_bytes = HEADER_BYTES + TOKEN_DTYPE.itemsize * count
    if count < 0 or size_bytes != expected_bytes:
        state = "truncated" if size_bytes < expected_bytes else "padded"
        raise DataError(
            f"{path} is {state}: its header promises {count} tokens ({expected_bytes} bytes), the "
            f"file has {size_bytes} bytes. {_advice(path)}"
        )
    return count


def find_shards(folder: Path, split: Split) -> list[Path]:
    """The shards of one split in order of name.

    Raises:
        DataError: the folder is missing or has no such shard.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Fetch data into it: {_fetch(folder)}")
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise DataError(f"{folder} has no *_{split}_*.bin shard. Fetch them: {_fetch(folder)}")
    return paths


def _fetch(folder: Path) -> str:
    return f"`python -m trainer.fetch --out {folder}`"


def _advice(path: Path) -> str:
    return f"Delete it and fetch it again: {_fetch(path.parent)}"
