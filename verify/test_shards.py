"""Token shards: what is written is read back, and damaged or unfit files are refused."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import DataError
from trainer.shards import check_header, find_shards, read_shard, write_shard

VOCAB = 1024


def shard_bytes(tokens: list[int], magic: int = 20240520, version: int = 1) -> bytes:
    """The format, written out by hand."""
    header = struct.pack("<3i", magic, version, len(tokens)) + bytes(253 * 4)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


@given(tokens=st.lists(st.integers(0, 65535), min_size=1, max_size=300))
def test_round_trip(tokens: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """A shard's bytes are the published format and reading gives back every token."""
    path = tmp_path_factory.mktemp("shard") / "a_train_0.bin"
    write_shard(path, np.array(tokens))
    assert path.read_bytes() == shard_bytes(tokens)
    read = read_shard(path, 65536)
    assert read.dtype == np.uint16
    assert read.tolist() == tokens


def test_reads_a_shard_made_by_hand(tmp_path: Path) -> None:
    """A shard in the published layout that the project did not write is read exactly."""
    path = tmp_path / "x_val_000000.bin"
    path.write_bytes(shard_bytes([1, 1023, 0, 7]))
    assert read_shard(path, VOCAB).tolist() == [1, 1023, 0, 7]
    assert check_header(path) == 4


DAMAGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "magic": (lambda: shard_bytes([1, 2], magic=20240521), "magic 20240521"),
    "version": (lambda: shard_bytes([1, 2], version=2), "version 2"),
    "truncated body": (lambda: shard_bytes([1, 2])[:-1], "truncated"),
    "token missing": (lambda: shard_bytes([1, 2])[:-2], "truncated"),
    "padded body": (lambda: shard_bytes([1, 2]) + b"\0\0", "padded"),
    "half a header": (lambda: shard_bytes([1])[:1000], "truncated"),
    "empty file": (lambda: b"", "truncated"),
    "negative count": (
        lambda: struct.pack("<3i", 20240520, 1, -3) + bytes(1012),
        "padded",
    ),
    "no tokens": (lambda: shard_bytes([]), "no tokens"),
    "token = vocabulary": (lambda: shard_bytes([5, 1024, 3]), "token id 1024"),
    "token beyond": (lambda: shard_bytes([5, 3, 65535]), "token id 65535"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(damage: str, tmp_path: Path) -> None:
    """A shard with wrong magic, version, length or token ids is refused, with a cure."""
    make, reason = DAMAGE[damage]
    path = tmp_path / "bad_train_000000.bin"
    path.write_bytes(make())
    with pytest.raises(DataError, match=reason) as caught:
        read_shard(path, VOCAB)
    assert str(path) in str(caught.value)
    assert "trainer.fetch" in str(caught.value)


def test_every_scan_chunk_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single bad token is found wherever in the shard it lies."""
    monkeypatch.setattr("trainer.shards.SCAN_TOKENS", 4)
    for at in range(11):
        tokens = np.zeros(11, dtype=np.uint16)
        tokens[at] = VOCAB
        path = tmp_path / f"{at}_train_0.bin"
        write_shard(path, tokens)
        with pytest.raises(DataError, match="token id 1024"):
            read_shard(path, VOCAB)


@pytest.mark.parametrize("token", [-1, 65536])
def test_wide_tokens_are_not_written(token: int, tmp_path: Path) -> None:
    """Token ids that need more than 16 bits are refused, not wrapped around."""
    path = tmp_path / "wide_train_0.bin"
    with pytest.raises(DataError, match=r"0\.\.65535"):
        write_shard(path, np.array([3, token]))
    assert not path.exists()


def test_missing_file(tmp_path: Path) -> None:
    """A shard that cannot be opened is a clear error, not a traceback."""
    with pytest.raises(DataError, match="cannot read"):
        read_shard(tmp_path / "none_train_0.bin", VOCAB)


def test_find_shards(tmp_path: Path) -> None:
    """Shards of a split are found in order of name; a folder without them is a clear error."""
    with pytest.raises(DataError, match="not a folder"):
        find_shards(tmp_path / "absent", "train")
    with pytest.raises(DataError, match=r"no \*_train_\*\.bin"):
        find_shards(tmp_path, "train")
    for name in ("b_train_000001.bin", "b_train_000000.bin", "b_val_000000.bin", "notes.bin"):
        (tmp_path / name).touch()
    assert [p.name for p in find_shards(tmp_path, "train")] == [
        "b_train_000000.bin",
        "b_train_000001.bin",
    ]
    assert [p.name for p in find_shards(tmp_path, "val")] == ["b_val_000000.bin"]
