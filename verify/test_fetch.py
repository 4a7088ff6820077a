"""Fetching: a hub-shaped server on loopback, broken lines, damaged files; text to shards."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from trainer import fetch, text
from trainer.corpus import open_folder
from trainer.errors import ConfigError, DataError
from trainer.shards import write_shard
from trainer.text import TextSources, document_key, read_documents
from trainer.tokenizer import Tokenizer, train_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD_FOLDER = "datasets/datasets/fineweb10B_sp1024"
MODEL_PATH = "datasets/tokenizers/fineweb_1024_bpe.model"
WORDS = [f"word{n} and number {n} of many" for n in range(300)]


@dataclass
class Hub:
    """A dataset repository as the hub serves it, and what clients asked for."""

    files: dict[str, bytes]
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    drop_after: dict[str, int] = field(default_factory=dict)
    """Path -> bytes after which the connection breaks, once."""
    status: dict[str, list[int]] = field(default_factory=dict)
    """Path -> statuses of the next requests for it."""
    served: dict[str, bytes] = field(default_factory=dict)
    """Path -> content sent in place of the published one."""

    def gets(self, path: str) -> list[str | None]:
        """Range headers of the GET requests for one file."""
        return [span for verb, asked, span in self.requests if verb == "GET" and asked == path]

    def tree(self) -> bytes:
        """The answer to a recursive listing."""
        entries: list[dict[str, object]] = [
            {"type": "directory", "path": SHARD_FOLDER, "oid": "0" * 40, "size": 0}
        ]
        for path, content in self.files.items():
            entry = {"type": "file", "path": path, "oid": "1" * 40, "size": len(content)}
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return json.dumps(entries).encode()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    resolve = f"/datasets/{fetch.REPO}/resolve/main/"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            span = self.headers.get("Range")
            if path.startswith(f"/api/datasets/{fetch.REPO}/tree/main"):
                return self._send(200, hub.tree(), {"Content-Type": "application/json"}, body)
            name = path.removeprefix(resolve)
            hub.requests.append((self.command, name, span))
            if body and hub.status.get(name):
                return self._send(hub.status[name].pop(0), b"busy", {}, body)
            if name not in hub.files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            content = hub.served.get(name, hub.files[name])
            headers = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hashlib.sha256(hub.files[name]).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            if span is None:
                drop_after = hub.drop_after.pop(name, None) if body else None
                return self._send(200, content, headers, body, drop_after)
            start = int(span.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[start:], headers, body)

        def _send(
            self,
            status: int,
            content: bytes,
            headers: dict[str, str],
            body: bool,
            drop_after: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content[:drop_after])
            if body and drop_after is not None:
                self.wfile.flush()
                self.close_connection = True

    return Handler


@pytest.fixture(scope="session")
def model_bytes() -> bytes:
    return train_tokenizer(WORDS, 300)


@pytest.fixture
def hub(tmp_path: Path, model_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub with three training shards, one of validation, and a tokenizer."""
    made = tmp_path / "made"
    files = {MODEL_PATH: model_bytes, "datasets/manifest.json": b"{}", "README.md": b"hello"}
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            name = f"fineweb_{split}_{number:06d}.bin"
            write_shard(made / name, np.arange(20_000) % (290 + number))
            files[f"{SHARD_FOLDER}/{name}"] = (made / name).read_bytes()
    repository = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repository))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    repository.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(fetch, "_endpoint", lambda: repository.url)
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield repository
    server.shutdown()
    server.server_close()
    thread.join()


def shard(number: int, split: str = "train") -> str:
    return f"{SHARD_FOLDER}/fineweb_{split}_{number:06d}.bin"


def test_download_all(hub: Hub, tmp_path: Path) -> None:
    """A download brings every shard and the tokenizer, to the byte, ready to open."""
    out = tmp_path / "out"
    fetch.download(out, None)
    bins = {path.name: path.read_bytes() for path in out.glob("*.bin")}
    published = {Path(path).name: data for path, data in hub.files.items() if path[-4:] == ".bin"}
    assert bins == published
    data = open_folder(out, 300)
    assert len(data.train_paths) == 3
    assert len(data.val(100)) == 20_000
    assert not (out / ".download").exists()
    assert len(json.loads((out / "manifest.json").read_text())["files"]) == 5


def test_download_some_then_more(hub: Hub, tmp_path: Path) -> None:
    """--train-shards takes the first shards, and a second run fetches only what is not there."""
    fetch.download(tmp_path / "out", 1)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.bin")) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
    ]
    hub.requests.clear()
    fetch.download(tmp_path / "out", 2)
    assert {name for _, name, _ in hub.requests} == {shard(1)}
    with pytest.raises(DataError, match="has 3 training shards, not 4"):
        fetch.download(tmp_path / "out", 4)


def test_broken_line_resumes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a broken connection the download goes on at the byte where it stopped."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.drop_after[shard(0)] = 30_000
    fetch.download(tmp_path / "out", 1)
    assert hub.gets(shard(0)) == [None, "bytes=30000-"]
    got = (tmp_path / "out" / "fineweb_train_000000.bin").read_bytes()
    assert got == hub.files[shard(0)]


def test_busy_server_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    """A server error is tried again and does not end the download."""
    hub.status[shard(0)] = [500, 502]
    fetch.download(tmp_path / "out", 1)
    assert len(hub.gets(shard(0))) == 3
    got = (tmp_path / "out" / "fineweb_train_000000.bin").read_bytes()
    assert got == hub.files[shard(0)]


def test_persistent_failure(hub: Hub, tmp_path: Path) -> None:
    """A server that keeps failing ends in a clear error; finished files are not fetched again."""
    hub.status[shard(1)] = [500] * 100
    with pytest.raises(DataError, match=r"(?s)tried 4 x.*finished files are kept"):
        fetch.download(tmp_path / "out", 2)
    assert not (tmp_path / "out" / "fineweb_train_000001.bin").exists()
    hub.status.clear()
    hub.requests.clear()
    fetch.download(tmp_path / "out", 2)
    assert {name for _, name, _ in hub.requests} == {shard(1)}


def test_damaged_download(hub: Hub, tmp_path: Path) -> None:
    """A file that differs from its published checksum by one bit is refused and fetched again."""
    damaged = bytearray(hub.files[shard(0)])
    damaged[-1] ^= 1
    hub.served[shard(0)] = bytes(damaged)
    with pytest.raises(DataError, match="arrived damaged"):
        fetch.download(tmp_path / "out", 1)
    assert not list((tmp_path / "out").rglob("fineweb_train_*.bin"))
    hub.served.clear()
    fetch.download(tmp_path / "out", 1)
    assert len(hub.gets(shard(0))) == 2


def test_published_file_that_is_no_shard(hub: Hub, tmp_path: Path) -> None:
    """A published file that is not a token shard is refused after download."""
    hub.files[shard(0)] = b"<html>sorry</html>" * 100
    with pytest.raises(DataError, match="not a token shard"):
        fetch.download(tmp_path / "out", 1)
    assert not list((tmp_path / "out").rglob("fineweb_train_*.bin"))


def test_local_damage_is_mended(hub: Hub, tmp_path: Path) -> None:
    """A file damaged on disk since is noticed and fetched again."""
    fetch.download(tmp_path / "out", 1)
    path = tmp_path / "out" / "fineweb_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    fetch.download(tmp_path / "out", 1)
    assert path.read_bytes() == hub.files[shard(0)]


def test_missing_file(hub: Hub, tmp_path: Path) -> None:
    """A repository without a needed file, or whose listing is ahead of it, is a clear error."""
    fetched = hub.files.pop(MODEL_PATH)
    with pytest.raises(DataError, match="layout has changed"):
        fetch.download(tmp_path / "out", 1)
    hub.files[MODEL_PATH] = fetched
    tree = hub.tree()
    hub.files.pop(shard(0))
    hub.tree = lambda: tree
    with pytest.raises(DataError, match="no such file"):
        fetch.download(tmp_path / "out", 1)


def test_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is told at once, without trying again."""
    calls = []

    def no_space(*_: object, **__: object) -> str:
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_space)
    with pytest.raises(DataError, match="disk is full"):
        fetch.download(tmp_path / "out", 1)
    assert len(calls) == 1


def test_no_network(tmp_path: Path) -> None:
    """Without a network the command ends with one clear line and no traceback."""
    done = _command("--out", str(tmp_path / "out"), endpoint="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "cannot list the files" in done.stderr
    assert "network connection" in done.stderr
    assert "Traceback" not in done.stderr


def test_command_downloads(hub: Hub, tmp_path: Path) -> None:
    """`python -m trainer.fetch` downloads from the hub that HF_ENDPOINT names, with progress."""
    out = str(tmp_path / "out")
    done = _command("--out", out, "--train-shards", "2", endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert "4 files" in done.stdout
    assert "download" in done.stdout
    assert len(open_folder(tmp_path / "out", 300).train_paths) == 2


def _command(*arguments: str, endpoint: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, time; from trainer import fetch; time.sleep = lambda seconds: None;"
        "sys.exit(fetch.main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "HF_ENDPOINT": endpoint},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"train_shards": 0},
        {"shard_tokens": 0},
        {"val": (Path("v"),)},
        {"tokenizer": Path("t.model")},
        {"from_text": (Path("a"),), "train_shards": 2},
    ],
)
def test_unfit_options(bad: dict[str, object]) -> None:
    """Options that contradict each other are refused before anything is fetched."""
    with pytest.raises(ConfigError):
        fetch.Fetch(out=Path("out"), **bad)  # pyright: ignore[reportArgumentType]


# Text to shards


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=6),
    pack=st.sampled_from([bytes, zst]),
    ascii_only=st.booleans(),
)
def test_json_lines(
    texts: list[str],
    pack: Callable[[bytes], bytes],
    ascii_only: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """JSON lines give back each document exactly, compressed or not, whatever the file's name."""
    lines = [json.dumps({"id": 3, "text": text}, ensure_ascii=ascii_only) for text in texts]
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_bytes(pack("\n".join(lines).encode()))
    assert list(read_documents(path)) == [text for text in texts if text.strip()]


@given(content=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200))
def test_plain_text(content: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A plain text file is one document, kept to the byte."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    content = "x" + content
    path.write_bytes(content.encode())
    assert list(read_documents(path)) == [content]


def test_archives_of_several_frames(tmp_path: Path) -> None:
    """A zstd file of several frames, small and large, is read to its end."""
    parts = ["first\n", "x" * 500_000 + "\n", "last"]
    path = tmp_path / "frames.zst"
    path.write_bytes(b"".join(zst(part.encode()) for part in parts))
    assert list(read_documents(path)) == ["".join(parts)]


def test_long_plain_text_is_cut_at_blank_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long text file is cut at blank lines only, and nothing of it is lost."""
    monkeypatch.setattr(text, "PIECE_CHARS", 20)
    content = "one\n\ntwo two two two two\nthree\n\nfour\n\nfive five five five five\n\n"
    (tmp_path / "long.txt").write_text(content)
    pieces = list(read_documents(tmp_path / "long.txt"))
    assert pieces == [
        "one\n\ntwo two two two two\nthree\n\n",
        "four\n\nfive five five five five\n\n",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\x00bad", "not UTF-8"),
        (zst(b"some text " * 1000)[:-20], "damaged zstd|truncated"),
        (zst(os.urandom(3000))[:500], "damaged zstd|truncated|not UTF-8"),
        (zst(b"one text") + zst(b"another" * 100)[:-3], "ends before its data"),
        (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        (b'{"text": "a"}\n\n{"body": "b"}\n', 'line 3 has no "text"'),
        (b'{"text": "a"}\n[1]\n', 'line 2 has no "text"'),
        (b'{"text": "a"}\n{"text": 5}\n', 'line 2 has no "text"'),
    ],
)
def test_bad_text(content: bytes, reason: str, tmp_path: Path) -> None:
    """Text that is not UTF-8, truncated archives and broken JSON lines are clear errors."""
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        list(read_documents(path))
    with pytest.raises(DataError, match="cannot read"):
        list(read_documents(tmp_path / "absent.txt"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two JSON-lines files of 200 documents each; the second repeats ten of the first."""
    for name, first in (("a", 0), ("b", 190)):
        documents = [f"Document {n}: " + WORDS[n % 300] for n in range(first, first + 200)]
        lines = "".join(json.dumps({"text": doc}) + "\n" for doc in documents)
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zst(lines.encode()))
    return tmp_path


def read_back(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    data = open_folder(folder, tokenizer.vocab_size)
    shards = data.train() if split == "train" else [data.val(1)]
    tokens = np.concatenate(shards)
    starts = np.flatnonzero(tokens == 1)
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, starts[1:])]


def test_text_to_shards(texts: Path, model_bytes: bytes) -> None:
    """Text becomes shards of the asked size that decode to every document, in order, once."""
    model = texts / "given.model"
    model.write_bytes(model_bytes)
    out = texts / "out"
    config = fetch.Fetch(
        out=out,
        from_text=(texts / "a.jsonl.zst",),
        val=(texts / "b.jsonl.zst",),
        tokenizer=model,
        shard_tokens=1000,
    )
    fetch.convert(config)
    tokenizer = Tokenizer(model)
    # The ten documents that are held out as well must not be trained on.
    expected = [f"Document {n}: " + WORDS[n % 300] for n in range(390)]
    assert read_back(out, "train", tokenizer) == expected[:190]
    assert read_back(out, "val", tokenizer) == expected[190:]
    data = open_folder(out, 300)
    assert {len(tokens) for tokens in data.train()[:-1]} == {1000}
    assert 0 < len(data.train()[-1]) <= 1000
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["train"]["tokens"] == sum(map(len, data.train()))
    assert manifest["train"]["documents"] == 190
    assert manifest["train"]["bytes"] == sum(len(doc.encode()) for doc in expected[:190])
    assert manifest["val"]["shards"] == len(data.val_paths)
    assert manifest["train"]["unknown"] == 0
    assert (out / "given.model").read_bytes() == model_bytes
    with pytest.raises(DataError, match="already holds shards"):
        fetch.convert(config)


def test_text_with_a_new_tokenizer(texts: Path) -> None:
    """Without a tokenizer one is trained, and a share of documents is held out by content."""
    both = tuple(texts / f"{name}.jsonl.zst" for name in "ab")
    arguments = ["--out", str(texts / "out"), "--from-text", *map(str, both)]
    assert fetch.main([*arguments, "--vocab-size", "320", "--val-fraction", "0.2"]) == 0
    (model,) = (texts / "out").glob("*.model")
    tokenizer = Tokenizer(model, 320)
    train = read_back(texts / "out", "train", tokenizer)
    val = read_back(texts / "out", "val", tokenizer)
    assert len(train) + len(val) == 400
    assert not set(train) & set(val)
    # Binomial(390, 0.2) within five standard deviations.
    assert abs(len(set(val)) - 78) < 5 * (390 * 0.2 * 0.8) ** 0.5


def test_split_ignores_order_and_spacing() -> None:
    """Documents that differ in white space and case alone fall into the same split."""
    assert document_key("One  two\nThree ") == document_key("one two three")
    assert document_key("one two") != document_key("one twos")
    fractions = np.array([document_key(f"document {n}") / 2**64 for n in range(2000)])
    assert abs(fractions.mean() - 0.5) < 5 * (1 / 12 / 2000) ** 0.5


def test_unfit_text_sources(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing files, an empty split and impossible fractions end in one clear line."""
    out = ["--out", str(texts / "out")]
    assert fetch.main([*out, "--from-text", str(texts / "absent.txt")]) == 1
    assert "no such text file" in capsys.readouterr().err
    one = texts / "one.txt"
    one.write_text("\n".join(WORDS))
    assert fetch.main([*out, "--from-text", str(one), "--vocab-size", "300"]) == 1
    assert "split got no document" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="between 0 and 1"):
        TextSources((one,), val_fraction=1.0)
