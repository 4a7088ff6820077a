"""Bytes of tokens, and text to tokens and back."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from trainer import embedded
from trainer.errors import DataError
from trainer.tokenizer import Tokenizer, train_tokenizer
from trainer.tokens import token_bytes

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
WORDS = st.text(" \u2581\n\t\x00\r\ue000\ue001 thean.é日\U0001f600", max_size=60)


@pytest.fixture(scope="module")
def model() -> Path:
    """The embedded corpus's tokenizer."""
    (path,) = embedded.ensure_built().glob("*.model")
    return path


def counted(model: Path, ids: list[int]) -> list[int]:
    ids_N = torch.tensor(ids)
    return token_bytes(model).count(ids_N[1:], ids_N[:-1]).tolist()


@given(text=UNICODE | WORDS)
@example(text="")
@example(text=" leading")
@example(text="\u2581marked \u2581\u2581 text")
@example(text="  two  runs   of spaces  ")
@example(text="".join(map(chr, range(0x100))))
def test_bytes_sum_to_the_text(model: Path, text: str) -> None:
    """Bytes of a document's tokens sum to the length of its UTF-8 text, for arbitrary Unicode."""
    ids = Tokenizer(model).encode(text)
    assert ids[0] == 1
    assert sum(counted(model, ids)) == len(text.encode())


@given(text=UNICODE | WORDS)
@example(text=" \u2581 x")
def test_text_round_trip(model: Path, text: str) -> None:
    """Encoding and decoding gives back the very same text, for arbitrary Unicode."""
    tokenizer = Tokenizer(model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts=st.lists(WORDS, max_size=4))
def test_stream_of_documents(model: Path, texts: list[str]) -> None:
    """Over documents one after another bytes sum to the sum of their texts."""
    ids = [token for text in texts for token in Tokenizer(model).encode(text)]
    assert sum(counted(model, [0, *ids])) == sum(len(text.encode()) for text in texts)
    assert Tokenizer(model).decode(ids) == "".join(texts)


def test_every_piece(model: Path) -> None:
    """Each piece counts its text's bytes: byte pieces 1, control pieces 0, a space mark 1."""
    opened = Tokenizer(model)
    tables = token_bytes(model)
    all_V = torch.arange(opened.vocab_size)
    after_text = tables.count(all_V, torch.full_like(all_V, opened.vocab_size - 1)).tolist()
    after_bos = tables.count(all_V, torch.full_like(all_V, 1)).tolist()
    for token in range(opened.vocab_size):
        piece = opened.model.id_to_piece(token)
        if token <= 3:  # pad, BOS, EOS, unknown
            length = 0
        elif piece.startswith("<0x") and len(piece) == 6:
            length = 1
        else:
            length = sum(1 if char == "\u2581" else len(char.encode()) for char in piece)
        assert after_text[token] == length
        assert after_bos[token] == length - (length > 0 and piece[0] == "\u2581")
    assert sum(opened.model.is_byte(token) for token in range(opened.vocab_size)) == 256


def test_count_keeps_shape_and_takes_shard_types(model: Path) -> None:
    """Counts have the shape of the ids and are int64 whatever integer type the ids have."""
    tables = token_bytes(model).to("cpu")
    ids = torch.tensor([[1, 300, 301], [5, 6, 7]])
    for dtype in (torch.int16, torch.int32, torch.int64):
        counts = tables.count(ids.to(dtype), ids.roll(1).to(dtype))
        assert counts.shape == ids.shape
        assert counts.dtype == torch.int64
        assert counts.tolist() == tables.count(ids, ids.roll(1)).tolist()


def test_batch_equals_single(model: Path) -> None:
    """Documents encoded together, over threads, have the tokens they have alone."""
    tokenizer = Tokenizer(model)
    texts = ["", "one two", "a\u2581b", "日本 " * 50, " x"]
    assert tokenizer.encode_documents(texts, threads=2) == [tokenizer.encode(t) for t in texts]


def test_training_is_deterministic() -> None:
    """The same texts give the same tokenizer, byte for byte."""
    texts = [f"the number {n} and the word w{n % 7} follow each other" for n in range(300)]
    assert train_tokenizer(texts, 320) == train_tokenizer(texts, 320)


def test_bad_tokenizers(model: Path, tmp_path: Path) -> None:
    """Missing, damaged and wrongly sized tokenizers, and lone surrogates, are clear errors."""
    with pytest.raises(DataError, match="no tokenizer"):
        Tokenizer(tmp_path / "none.model")
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(DataError, match="not a SentencePiece model"):
        Tokenizer(damaged)
    with pytest.raises(DataError, match="has 1024 pieces, the model expects 512"):
        token_bytes(model, 512)
    with pytest.raises(DataError, match="surrogate"):
        Tokenizer(model).encode("a\ud800b")
    with pytest.raises(DataError, match="smaller vocabulary"):
        train_tokenizer(["abc"], 1024)


@pytest.mark.skipif(
    "FAIRWAY_DATA" not in os.environ, reason="needs FAIRWAY_DATA: a folder with the contest's data"
)
@given(words=st.lists(st.text("abcdefghijklmnopqrstuvwxyzABC.,'", min_size=1), max_size=20))
def test_contest_tokenizer(words: list[str]) -> None:
    """With the contest's tokenizer bytes sum exactly for text that its folding leaves alone."""
    (path,) = Path(os.environ["FAIRWAY_DATA"]).glob("*.model")
    text = " ".join(words)
    assert sum(counted(path, Tokenizer(path).encode(text))) == len(text.encode())
