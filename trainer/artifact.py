"""The artifact: one file that holds a quantized model. No pickle, nothing executable.

    offset  bytes
    0       8      magic "FAIRWAY\\0"
    8       4      format version, little-endian
    12      4      length H of the header, little-endian
    16      H      header, JSON: model settings, compressor, tensors in payload order
    16+H    ...    compressed payload
    end-32  32     SHA-256 of everything before it

The payload is the tensors' raw bytes: for each quantized tensor its int8 codes row by row, those
of equal bit width together; then every float16 number (scales and small tensors) split into a
plane of high bytes and a plane of low bytes, which compress better apart. It is compressed in
pieces of PIECE_BYTES, all at once on as many cores as there are; the header has their compressed
lengths.

Every damaged byte changes the digest. Sizes are bounded by the declared shapes before anything is
allocated, and decompression stops at the declared length.
"""

import hashlib
import json
import lzma
import math
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import brotli
import dacite
import numpy as np
import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.errors import ArtifactError, ConfigError
from trainer.model import GPT
from trainer.quantize import BANKS, QuantizedMatrix, QuantizedModel

MAGIC = b"FAIRWAY\0"
VERSION = 1
PREFIX = struct.Struct("<8sII")
DIGEST_BYTES = 32
BROTLI_QUALITY = 11
QUICK_QUALITY = 4
"""For files that live within a run."""
MATRIX_BITS = (4, 5, 6, 7, 8)
PIECE_BYTES = 1 << 21
"""Raw bytes compressed on their own: codes hardly resemble each other, so that cutting costs some
0.1 % in size, and a many-core machine is through in a tenth of the time."""
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 28
"""Far above any model of the contest, far below a machine's memory."""

Compressor = Literal["brotli", "lzma"]


@dataclass(frozen=True)
class Entry:
    """One tensor of the payload. bits 4 to 8: matrix; 8: also int8 table; 16: float16."""

    name: str
    bits: int
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def half_count(self) -> int:
        """float16 numbers it brings: itself, or one scale a row."""
        return self.entries if self.bits == 16 else self.shape[0]


def pack(
    packed: QuantizedModel, compressor: Compressor = "brotli", quality: int = BROTLI_QUALITY
) -> bytes:
    """The artifact's bytes. `quality` is Brotli's: 11 takes a minute on the record's model."""
    entries = _entries(packed)
    raw = _payload(packed, entries)

    def compressed(begin: int) -> bytes:
        piece = raw[begin : begin + PIECE_BYTES]
        if compressor == "brotli":
            return brotli.compress(piece, quality=quality, lgwin=24)
        return lzma.compress(piece, preset=9)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compressors release the interpreter lock
        bodies = list(pool.map(compressed, range(0, len(raw), PIECE_BYTES)))
    header = {
        "model": asdict(packed.model_config),
        "compressor": compressor,
        "tensors": [[e.name, e.bits, e.shape] for e in entries],
        "pieces": [len(body) for body in bodies],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    data = PREFIX.pack(MAGIC, VERSION, len(text)) + text + b"".join(bodies)
    return data + hashlib.sha256(data).digest()


def unpack(data: bytes, source: str = "artifact") -> QuantizedModel:
    """The quantized model in an artifact's bytes.

    Raises:
        ArtifactError: damaged, of another version, or larger than any artifact may be.
    """
    header, body = _checked_header(data, source)
    try:
        config = dacite.from_dict(
            ModelConfig, header["model"], dacite.Config(strict=True, cast=[tuple])
        )
        entries = [Entry(n, b, tuple(shape)) for n, b, shape in header["tensors"]]
        compressor: Compressor = header["compressor"]
        decompress = _DECOMPRESSORS[compressor]
        lengths = [int(n) for n in header["pieces"]]
    except (KeyError, TypeError, ValueError, dacite.DaciteError, ConfigError) as error:
        raise ArtifactError(f"{source}: the header makes no sense ({error})") from error
    _check_entries(entries, config, source)
    size = sum(_payload_bytes(e) for e in entries)
    if size > MAX_PAYLOAD_BYTES:
        raise ArtifactError(
            f"{source}: declares {size:,} bytes of weights, above the {MAX_PAYLOAD_BYTES:,} that "
            "any artifact may hold"
        )
    begins = range(0, size, PIECE_BYTES)
    if len(lengths) != len(begins) or min(lengths) < 0 or sum(lengths) != len(body):
        raise ArtifactError(f"{source}: the pieces do not make up the {len(body):,} bytes there")
    pieces: list[bytes] = []
    at = 0
    for begin, length in zip(begins, lengths, strict=True):
        expected = min(PIECE_BYTES, size - begin)
        try:
            pieces.append(decompress(body[at : at + length], expected))
        except (brotli.error, lzma.LZMAError) as error:
            raise ArtifactError(f"{source}: a piece cannot be decompressed ({error})") from error
        if len(pieces[-1]) != expected:
            raise ArtifactError(f"{source}: a piece is not the {expected:,} bytes it should be")
        at += length
    return _read_payload(b"".join(pieces), entries, config)


def load(path: Path) -> QuantizedModel:
    """Read an artifact. Raises ArtifactError when it is missing, damaged or too large."""
    try:
        if path.stat().st_size > MAX_PAYLOAD_BYTES:
            raise ArtifactError(f"{path} is too large to be an artifact")
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    return unpack(data, str(path))


# Writing.


def _entries(packed: QuantizedModel) -> list[Entry]:
    """Payload order: by bit width, so that codes of one alphabet lie together."""
    coded = {**packed.matrices, **packed.tables}
    entries = [Entry(n, m.bits, tuple(m.codes_RC.shape)) for n, m in coded.items()]
    entries.sort(key=lambda e: e.bits)
    return entries + [Entry(n, 16, tuple(t.shape)) for n, t in packed.others.items()]


def _payload(packed: QuantizedModel, entries: list[Entry]) -> bytes:
    coded = {**packed.matrices, **packed.tables}
    codes = [coded[e.name].codes_RC.contiguous().numpy().tobytes() for e in entries if e.bits < 16]
    halves = [
        (packed.others[e.name] if e.bits == 16 else coded[e.name].scales_R).reshape(-1)
        for e in entries
    ]
    raw = torch.cat(halves).numpy().astype("<f2").tobytes()
    return b"".join(codes) + raw[1::2] + raw[0::2]


# Reading.


def _checked_header(data: bytes, source: str) -> tuple[dict[str, Any], bytes]:
    """Header and compressed body of bytes whose digest is right. Raises ArtifactError."""
    if len(data) < PREFIX.size + DIGEST_BYTES or not data.startswith(MAGIC):
        raise ArtifactError(f"{source} is not a Fairway artifact (or was cut off at its start)")
    _, version, header_bytes = PREFIX.unpack_from(data)
    if version != VERSION:
        raise ArtifactError(
            f"{source} has format version {version}, this code reads {VERSION}; use the code it "
            "was written with, or write it anew"
        )
    if hashlib.sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        raise ArtifactError(
            f"{source} is damaged: its SHA-256 does not match. Copy it again or write it anew."
        )
    begin, end = PREFIX.size, PREFIX.size + header_bytes
    if header_bytes > MAX_HEADER_BYTES or end > len(data) - DIGEST_BYTES:
        raise ArtifactError(f"{source}: the header's length {header_bytes:,} is impossible")
    try:
        header = json.loads(data[begin:end])
    except ValueError as error:
        raise ArtifactError(f"{source}: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{source}: the header is not a JSON object")
    return header, data[end:-DIGEST_BYTES]


def _check_entries(entries: list[Entry], config: ModelConfig, source: str) -> None:
    """The tensors are those of a model with these settings. Raises ArtifactError."""
    if max(config.layers, config.vocab_size, config.width, config.mlp_width) > 1 << 16:
        raise ArtifactError(f"{source}: the declared model is too large to be real")
    expected = dict(_expected_shapes(config))
    declared = {e.name: e.shape for e in entries}
    wrong = sorted({n for n in expected.keys() | declared if expected.get(n) != declared.get(n)})
    if wrong or len(declared) != len(entries):
        raise ArtifactError(
            f"{source}: its tensors are not those of the declared model: {', '.join(wrong[:5])}"
        )
    for entry in entries:
        allowed = MATRIX_BITS if _is_matrix(entry.name) else (8, 16)
        if entry.bits not in allowed or (entry.bits == 8 and len(entry.shape) != 2):
            raise ArtifactError(f"{source}: {entry.name} cannot have {entry.bits} bits")


def _is_matrix(name: str) -> bool:
    return name.startswith("blocks.") and name.rsplit(".", 1)[1] in (
        "q",
        "k",
        "v",
        "out",
        "up",
        "down",
    )


def _expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor an artifact of this model holds."""
    with torch.device("meta"):
        model = GPT(config)
    for name, matrix in model.matrices().items():
        yield name, tuple(matrix.shape)
    for name, tensor in model.state_dict().items():
        if name not in BANKS:
            yield name, tuple(tensor.shape)


def _payload_bytes(entry: Entry) -> int:
    return (0 if entry.bits == 16 else entry.entries) + 2 * entry.half_count


def _read_payload(raw: bytes, entries: list[Entry], config: ModelConfig) -> QuantizedModel:
    codes: dict[str, Tensor] = {}
    at = 0
    for e in entries:
        if e.bits < 16:
            flat = np.frombuffer(raw, np.int8, e.entries, at).copy()
            codes[e.name] = torch.from_numpy(flat).view(e.shape)
            at += e.entries
    count = sum(e.half_count for e in entries)
    planes = np.frombuffer(raw, np.uint8, 2 * count, at).reshape(2, count)
    halves = torch.from_numpy(np.ascontiguousarray(planes[::-1].T).view("<f2").reshape(-1).copy())
    pieces = dict(
        zip((e.name for e in entries), halves.split([e.half_count for e in entries]), strict=True)
    )
    quantized = {
        e.name: QuantizedMatrix(codes[e.name], pieces[e.name], e.bits)
        for e in entries
        if e.bits < 16
    }
    return QuantizedModel(
        config,
        matrices={n: m for n, m in quantized.items() if _is_matrix(n)},
        tables={n: m for n, m in quantized.items() if not _is_matrix(n)},
        others={e.name: pieces[e.name].view(e.shape) for e in entries if e.bits == 16},
    )


# Decompression never yields more than it was told to expect.


def _decompress_brotli(body: bytes, size: int) -> bytes:
    decoder = brotli.Decompressor()
    parts: list[bytes] = []
    length = 0
    data = body
    while length <= size:
        part = decoder.process(data, output_buffer_limit=size + 1 - length)
        data = b""
        if not part:
            break
        parts.append(part)
        length += len(part)
    if not decoder.is_finished():
        return b""
    return b"".join(parts)


def _decompress_lzma(body: bytes, size: int) -> bytes:
    decoder = lzma.LZMADecompressor(memlimit=1 << 30)
    raw = decoder.decompress(body, max_length=size + 1)
    return raw if decoder.eof and not decoder.unused_data else b""


_DECOMPRESSORS: dict[Compressor, Callable[[bytes, int], bytes]] = {
    "brotli": _decompress_brotli,
    "lzma": _decompress_lzma,
}
