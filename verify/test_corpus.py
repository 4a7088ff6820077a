"""Data folders and the embedded corpus: disjoint splits, deterministic, rebuilt when it must be."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import embedded
from trainer.corpus import DataFolder, embedded_corpus, open_data, open_folder, unigram_entropy_nats
from trainer.errors import DataError, RunError
from trainer.shards import write_shard
from trainer.tokenizer import Tokenizer, train_tokenizer

MINI = {
    "pydoc_data/topics.py": b"topics = {"
    + b",".join(
        f"'t{n}': 'Topic {n} is about w{n * n} and the word v{n}.\\n\\nA paragraph that all topics "
        f"share, word for word.\\n\\n{f'Then more of x{n % 9}. ' * 12}{n}'".encode()
        for n in range(120)
    )
    + b"}",
    "a.py": b'"""Module doc, long enough to stay a document."""\n'
    + b"".join(
        b'def f%d():\n    """Return the %d-th of the numbers, counting from nought."""\n' % (n, n)
        for n in range(40)
    ),
    "broken.py": b"def (:",
}


@pytest.fixture(scope="module")
def corpus() -> DataFolder:
    return embedded_corpus()


def documents(data: DataFolder, shards: list[np.ndarray]) -> list[str]:
    """Texts of the documents in `shards`, taken apart at BOS."""
    tokenizer = Tokenizer(data.tokenizer)
    tokens = np.concatenate(shards)
    starts = np.flatnonzero(tokens == 1)
    assert starts[0] == 0
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, starts[1:])]


def test_no_validation_text_in_training(corpus: DataFolder) -> None:
    """No validation document, and no single paragraph of one, occurs in the training split."""
    train = documents(corpus, corpus.train())
    val = documents(corpus, [corpus.val(1)])

    def keys(texts: list[str]) -> set[str]:
        parts = [part for text in texts for part in re.split(r"\n[ \t]*\n", text)]
        return {"".join(re.findall(r"[a-z0-9]", part.lower())) for part in parts} - {""}

    assert len(val) >= 10
    assert not set(train) & set(val)
    assert not keys(train) & keys(val)


def test_embedded_figures(corpus: DataFolder) -> None:
    """The embedded corpus has 1.5 MB or more, 8 even shards, 1024 pieces, 1-15 % held out."""
    manifest = json.loads((corpus.dir / "manifest.json").read_text())
    figures = corpus.describe()
    assert figures["name"] == "embedded"
    assert figures["train_shards"] == 8
    assert figures["train_tokens"] == manifest["train"]["tokens"] > 500_000
    assert figures["val_tokens"] == manifest["val"]["tokens"]
    assert 0.01 < figures["val_tokens"] / figures["train_tokens"] < 0.15
    assert Tokenizer(corpus.tokenizer).vocab_size == 1024
    lengths = [len(tokens) for tokens in corpus.train()]
    assert max(lengths) - min(lengths) <= 1
    texts = documents(corpus, corpus.train())
    assert len(texts) == manifest["train"]["documents"]
    assert sum(len(text.encode()) for text in texts) == manifest["train"]["bytes"] > 1_500_000


def test_splits_and_repeats() -> None:
    """Splitting keeps every paragraph once and depends on content alone, not on file order."""
    train, val = embedded.split_documents(MINI)
    backwards = embedded.split_documents(dict(reversed(MINI.items())))
    everything = "\n\n".join([*train, *val])
    assert everything.count("A paragraph that all topics share") == 1
    assert everything.count("Topic 7 is about w49 ") == 1
    assert everything.count("Return the 7-th of the numbers") == 1
    assert 0 < len(val) < 0.2 * len(train)
    topics = {text for text in train + val if "share" not in text}
    assert topics == {text for text in [*backwards[0], *backwards[1]] if "share" not in text}
    for text in topics & set(val):
        assert text in backwards[1]


def test_deterministic_across_processes(tmp_path: Path) -> None:
    """Two processes with different hash seeds build the same corpus, to the byte."""
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from verify.test_corpus import MINI; from trainer import embedded;"
        "embedded.VOCAB_SIZE = 400; embedded.stdlib_sources = lambda: MINI;"
        "print(embedded.ensure_built(Path(sys.argv[1])))"
    )
    root = Path(__file__).resolve().parent.parent
    built: list[dict[str, bytes]] = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", script, str(tmp_path / seed), str(root)]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        folder = Path(done.stdout.strip().splitlines()[-1])
        built.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(built[0]) == 8 + 1 + 1 + 1
    assert built[0] == built[1]


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built corpus is used again as it is, and built anew once a source changes."""
    monkeypatch.setattr(embedded, "VOCAB_SIZE", 400)
    monkeypatch.setattr(embedded, "stdlib_sources", lambda: MINI)
    first = embedded.ensure_built(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert embedded.ensure_built(tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    changed = {**MINI, "b.py": b'"""Another module."""'}
    monkeypatch.setattr(embedded, "stdlib_sources", lambda: changed)
    assert embedded.ensure_built(tmp_path) != first
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 2
    assert open_data(first, 400).describe()["train_shards"] == 8


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that fails leaves no folder behind that a later run would take for whole."""

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "VOCAB_SIZE", 400)
    monkeypatch.setattr(embedded, "stdlib_sources", lambda: MINI)
    monkeypatch.setattr(embedded, "write_shard", no_space)
    with pytest.raises(RunError, match="No space left"):
        embedded.ensure_built(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_no_stdlib_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without its library's sources is told so, with the way out."""
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=r"trainer\.fetch"):
        embedded.stdlib_sources()


@pytest.fixture(scope="module")
def small_model() -> bytes:
    return train_tokenizer([f"word{n} and number {n}" for n in range(300)], 300)


@pytest.fixture
def folder(tmp_path: Path, small_model: bytes) -> Path:
    """A good data folder: two training shards, one of validation, a tokenizer of 300 pieces."""
    for number in range(2):
        write_shard(tmp_path / f"x_train_{number:06d}.bin", np.arange(50) + number)
    write_shard(tmp_path / "x_val_000000.bin", np.arange(20))
    (tmp_path / "x.model").write_bytes(small_model)
    return tmp_path


def test_open_folder(folder: Path) -> None:
    """A folder of shards opens with every token in order."""
    data = open_folder(folder, 300)
    assert [tokens.tolist() for tokens in data.train()] == [
        list(range(50)),
        list(range(1, 51)),
    ]
    assert data.val(19).tolist() == list(range(20))
    assert data.val(4, max_tokens=5).tolist() == [0, 1, 2, 3, 4]
    write_shard(folder / "x_val_000001.bin", np.array([7, 9]))
    assert open_folder(folder, 300).val(19).tolist() == [*range(20), 7, 9]


def test_short_validation_split(folder: Path) -> None:
    """A validation split shorter than one window is refused."""
    data = open_folder(folder, 300)
    with pytest.raises(DataError, match=r"20 tokens, less than one window of 20 \+ 1"):
        data.val(20)
    with pytest.raises(DataError, match="less than one window"):
        data.val(5, max_tokens=5)


def test_unfit_folders(folder: Path, small_model: bytes) -> None:
    """A folder without shards or tokenizer, with two, or of another vocabulary is refused."""
    with pytest.raises(DataError, match="300 pieces, the model expects 1024"):
        open_folder(folder, 1024)
    (folder / "y.model").write_bytes(small_model)
    with pytest.raises(DataError, match=r"found x\.model, y\.model"):
        open_folder(folder, 300)
    (folder / "x.model").unlink()
    (folder / "y.model").unlink()
    with pytest.raises(DataError, match="found none"):
        open_folder(folder, 300)
    (folder / "x_val_000000.bin").unlink()
    with pytest.raises(DataError, match=r"no \*_val_"):
        open_folder(folder, 300)
    with pytest.raises(DataError, match="not a folder"):
        open_data(folder / "absent", 300)


def test_foreign_tokens(folder: Path) -> None:
    """A shard with token ids beyond the tokenizer is refused when its split is loaded."""
    write_shard(folder / "x_train_000001.bin", np.array([1, 300]))
    with pytest.raises(DataError, match="token id 300"):
        open_folder(folder, 300).train()


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=4))
def test_unigram_entropy(shards: list[list[int]]) -> None:
    """Unigram entropy is -sum p ln p over all shards' tokens."""
    tokens = [token for shard in shards for token in shard]
    expected = -math.fsum(math.log(tokens.count(token) / len(tokens)) for token in tokens)
    actual = unigram_entropy_nats([np.array(shard, dtype=np.uint16) for shard in shards], 10)
    assert actual == pytest.approx(expected / len(tokens), abs=1e-12)
