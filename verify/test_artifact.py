"""Claims about the artifact: exact to the bit, counted to the byte, and safe to open."""

import hashlib
import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer import artifact
from trainer.config import ModelConfig
from trainer.errors import ArtifactError
from trainer.quantize import QuantizedMatrix, QuantizedModel
from verify.models import random_model

SMALL = ModelConfig(
    vocab_size=16, seq_len=8, width=16, layers=2, query_heads=2, kv_heads=1, mlp_width=16,
    rotary_dims=4, bigram_buckets=20, bigram_dim=8, value_embed_layers=(1,), value_embed_dim=8,
)  # fmt: skip


def packed_model(seed: int = 0, config: ModelConfig = SMALL) -> QuantizedModel:
    """A quantized model with random codes of every width and one int8 table."""
    generator = torch.Generator().manual_seed(seed)
    model = random_model(config)
    matrices = {}
    for i, (name, w) in enumerate(model.matrices().items()):
        bits = 4 + i % 5
        top = 2 ** (bits - 1) - 1
        codes = torch.randint(-top, top + 1, w.shape, generator=generator, dtype=torch.int8)
        matrices[name] = QuantizedMatrix(
            codes, torch.rand(len(w), generator=generator).half(), bits
        )
    banks = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
    others = {n: t.half() for n, t in model.state_dict().items() if n not in banks}
    table = others.pop("bigram.embed.weight")
    codes = torch.randint(-127, 128, table.shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(len(table), generator=generator).half()
    return QuantizedModel(
        config, matrices, {"bigram.embed.weight": QuantizedMatrix(codes, scales, 8)}, others
    )


DATA = artifact.pack(packed_model())


def _header(data: bytes) -> dict[str, Any]:
    return json.loads(data[16 : 16 + int.from_bytes(data[12:16], "little")])


def _body(data: bytes) -> bytes:
    return data[16 + int.from_bytes(data[12:16], "little") : -32]


def _same(a: QuantizedModel, b: QuantizedModel) -> None:
    assert a.model_config == b.model_config
    for ours, theirs in ((a.matrices, b.matrices), (a.tables, b.tables)):
        assert ours.keys() == theirs.keys()
        for name, matrix in ours.items():
            assert torch.equal(matrix.codes_RC, theirs[name].codes_RC), name
            assert torch.equal(matrix.scales_R, theirs[name].scales_R), name
            assert matrix.bits == theirs[name].bits
    assert a.others.keys() == b.others.keys()
    for name, tensor in a.others.items():
        assert torch.equal(tensor, b.others[name]), name


@given(seed=st.integers(0, 10_000), compressor=st.sampled_from(["brotli", "lzma"]))
def test_round_trip_to_the_bit(seed: int, compressor: artifact.Compressor) -> None:
    """Packing and unpacking gives back every code, scale and small tensor, to the bit."""
    packed = packed_model(seed)
    _same(artifact.unpack(artifact.pack(packed, compressor)), packed)


def test_packing_repeats_to_the_bit() -> None:
    """The same model always gives the same bytes."""
    assert artifact.pack(packed_model()) == DATA


def test_the_layout_is_as_documented() -> None:
    """An independent reader of the documented layout finds magic, header, payload and digest."""
    assert DATA[:8] == b"FAIRWAY\0"
    assert int.from_bytes(DATA[8:12], "little") == 1
    end = 16 + int.from_bytes(DATA[12:16], "little")
    header = json.loads(DATA[16:end])
    assert header["pieces"] == [len(DATA) - end - 32], "a small model is one piece"
    raw = brotli.decompress(DATA[end:-32])
    assert hashlib.sha256(DATA[:-32]).digest() == DATA[-32:]
    packed = packed_model()
    at, halves = 0, 0
    for name, bits, shape in header["tensors"]:
        count = 1
        for size in shape:
            count *= size
        if bits == 16:
            halves += count
            continue
        codes = {**packed.matrices, **packed.tables}[name].codes_RC.flatten().tolist()
        assert [b - 256 if b > 127 else b for b in raw[at : at + count]] == codes
        at += count
        halves += shape[0]
    assert len(raw) == at + 2 * halves
    widths = [bits for _, bits, _ in header["tensors"]]
    assert widths == sorted(widths), "codes of one alphabet lie together"


@pytest.mark.parametrize(
    ("compressor", "piece_bytes"),  # LZMA allocates its window anew for every piece: not for bytes
    [("brotli", 1), ("brotli", 1000), ("brotli", 4096), ("lzma", 1000), ("lzma", 4096)],
)
def test_pieces_are_joined_in_order(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int, compressor: artifact.Compressor
) -> None:
    """A payload compressed in pieces, the last one short, comes back to the bit."""
    small = replace(SMALL, layers=1, value_embed_layers=(), bigram_buckets=3, vocab_size=2)
    packed = packed_model(config=small)
    whole = len(brotli.decompress(_body(artifact.pack(packed))))
    monkeypatch.setattr(artifact, "PIECE_BYTES", piece_bytes)
    data = artifact.pack(packed, compressor, quality=1)
    lengths = _header(data)["pieces"]
    assert len(lengths) == -(-whole // piece_bytes)
    assert sum(lengths) == len(_body(data))
    _same(artifact.unpack(data), packed)


@given(st.data())
def test_every_damaged_byte_is_detected(data: st.DataObject) -> None:
    """Any change of any byte is detected."""
    at = data.draw(st.integers(0, len(DATA) - 1))
    flip = data.draw(st.integers(1, 255))
    damaged = DATA[:at] + bytes([DATA[at] ^ flip]) + DATA[at + 1 :]
    with pytest.raises(ArtifactError):
        artifact.unpack(damaged)


def test_every_position_is_covered_by_the_digest() -> None:
    """Flipping one bit is detected at every single position of the file."""
    for at in range(len(DATA)):
        damaged = bytearray(DATA)
        damaged[at] ^= 1
        with pytest.raises(ArtifactError):
            artifact.unpack(bytes(damaged))


@given(st.integers(0, len(DATA) - 1))
def test_truncation_is_detected(length: int) -> None:
    """A file cut anywhere is refused."""
    with pytest.raises(ArtifactError):
        artifact.unpack(DATA[:length])


def test_appended_bytes_are_detected() -> None:
    """Bytes behind the end are refused."""
    with pytest.raises(ArtifactError):
        artifact.unpack(DATA + b"\0")


def _forged(
    *, header: dict[str, object] | None = None, body: bytes | None = None, version: int = 1
) -> bytes:
    """DATA with parts replaced and a digest that is right again: a malicious file."""
    kept = _body(DATA) if body is None else body
    changed = {**_header(DATA), "pieces": [len(kept)], **(header or {})}
    text = json.dumps(changed).encode()
    forged = b"FAIRWAY\0" + version.to_bytes(4, "little") + len(text).to_bytes(4, "little")
    forged += text + kept
    return forged + hashlib.sha256(forged).digest()


def _tensors(change: object) -> list[list[object]]:
    tensors = _header(DATA)["tensors"]
    change(tensors)  # pyright: ignore[reportCallIssue]
    return tensors


def test_the_forger_works() -> None:
    """The forging helper changes nothing by itself: what it forges is refused for its content."""
    _same(artifact.unpack(_forged()), packed_model())


@pytest.mark.parametrize(
    ("forged", "words"),
    [
        (_forged(version=2), "version 2"),
        (_forged(header={"compressor": "zip"}), "makes no sense"),
        (_forged(header={"model": {"layers": "many"}}), "makes no sense"),
        (_forged(header={"model": {"layers": 10**9}}), "too large|makes no sense"),
        (_forged(header={"tensors": []}), "not those of the declared model"),
        (_forged(header={"tensors": _tensors(lambda t: t.append(t[0]))}), "declared model"),
        (_forged(header={"tensors": _tensors(lambda t: t[0].__setitem__(1, 3))}), "3 bits"),
        (_forged(header={"tensors": _tensors(lambda t: t[0].__setitem__(1, 16))}), "16 bits"),
        (_forged(header={"tensors": _tensors(lambda t: t[0].__setitem__(2, [9, 9]))}), "declared"),
        (_forged(header={"tensors": _tensors(lambda t: t[0].__setitem__(2, [2**40, 1]))}), "decl"),
        (_forged(header={"pieces": "many"}), "makes no sense"),
        (_forged(header={"pieces": []}), "pieces do not make up"),
        (_forged(header={"pieces": [len(_body(DATA)) - 1]}), "pieces do not make up"),
        (_forged(header={"pieces": [len(_body(DATA)), 0]}), "pieces do not make up"),
        (_forged(header={"pieces": [-1]}), "pieces do not make up"),
        (_forged(body=b"not brotli"), "decompressed"),
        (_forged(body=brotli.compress(b"\0" * 10)), "not the .* bytes it should be"),
        (_forged(body=brotli.compress(b"\0" * 10**8, quality=1)), "it should be"),
        (
            _forged(header={"compressor": "lzma"}, body=lzma.compress(b"\0" * 10**8, preset=0)),
            "it should be",
        ),
        (_forged(header={"compressor": "lzma"}), "decompressed"),
    ],
)
def test_forged_files_are_refused(forged: bytes, words: str) -> None:
    """A file with a right digest but a lying header or an exploding payload is refused."""
    with pytest.raises(ArtifactError, match=words):
        artifact.unpack(forged)


def test_a_bomb_is_stopped_before_it_unfolds() -> None:
    """A payload that would inflate a millionfold is stopped at the declared size."""
    bomb = brotli.compress(b"\0" * 2**28, quality=9)
    limit, brotli_buffer = 1000, 1 << 15
    assert len(bomb) < 1000
    assert len(artifact._decompress_brotli(bomb, limit)) <= limit + brotli_buffer
    bomb = lzma.compress(b"\0" * 2**28, preset=0)
    assert len(artifact._decompress_lzma(bomb, limit)) <= limit + 1


def test_a_declared_giant_is_refused_before_allocation() -> None:
    """A header that declares more weights than any artifact may hold is refused unread."""
    giant = ModelConfig(vocab_size=65_536, width=1024, layers=2, mlp_width=65_536,
                        value_embed_layers=(1,), bigram_buckets=65_536)  # fmt: skip
    shapes = dict(artifact._expected_shapes(giant))
    tensors = [
        [n, 5 if n.startswith("blocks") and len(s) == 2 and "mix" not in n else 16, list(s)]
        for n, s in shapes.items()
    ]
    forged = _forged(
        header={"model": {**vars(giant), "value_embed_layers": [1]}, "tensors": tensors}
    )
    with pytest.raises(ArtifactError, match="above the"):
        artifact.unpack(forged)


def test_missing_files_are_explained(tmp_path: Path) -> None:
    """A missing file gives an ArtifactError with its path."""
    with pytest.raises(ArtifactError, match=r"nothing\.fwy"):
        artifact.load(tmp_path / "nothing.fwy")
    path = tmp_path / "a.fwy"
    path.write_bytes(DATA)
    _same(artifact.load(path), packed_model())


def test_pruned_codes_make_it_smaller() -> None:
    """Zeroed codes make the compressed file smaller: pruning can work."""
    packed = packed_model()
    empty = {n: replace(m, codes_RC=m.codes_RC * 0) for n, m in packed.matrices.items()}
    assert len(artifact.pack(replace(packed, matrices=empty))) < len(DATA)
