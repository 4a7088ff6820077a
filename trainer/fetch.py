"""`python -m trainer.fetch`: a folder of shards and a tokenizer, downloaded or made from text.

Without options it brings the contest's data into data/: every FineWeb shard (200 MB each) and the
tokenizer, each checked against its published SHA-256. A dropped connection goes on where it
stopped; a stopped command, run again, keeps every finished shard.

With `--from-text FILES...` it turns text or JSON lines (one {"text": ...} a line), plain or
zstd-compressed, into shards, with a given tokenizer or a newly trained one.
"""

import dataclasses
import errno
import fnmatch
import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import huggingface_hub
import tyro
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

from trainer import files, text
from trainer.errors import ConfigError, DataError, FairwayError
from trainer.progress import log, progress
from trainer.shards import check_header
from trainer.tokenizer import Tokenizer

T = TypeVar("T")
REPO = "willdepueoai/parameter-golf"
TRAIN_FILES = "datasets/datasets/fineweb10B_sp1024/fineweb_train_*.bin"
VAL_FILES = "datasets/datasets/fineweb10B_sp1024/fineweb_val_*.bin"
TOKENIZER_FILE = "datasets/tokenizers/fineweb_1024_bpe.model"
ATTEMPTS = 4
FIRST_WAIT_S = 2.0
# The hub's client has changed its HTTP library twice; this is whichever library's base error.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Fetch:
    """Where data comes from and where it goes."""

    out: Path = Path("data")
    """Folder for shards, tokenizer and manifest.json."""
    train_shards: int | None = None
    """Training shards to download; none: all."""
    from_text: tuple[Path, ...] = ()
    """Text files to turn into shards instead of downloading."""
    val: tuple[Path, ...] = ()
    """Text files to hold out; none: a share of --from-text."""
    val_fraction: float = 0.05
    """Share of documents held out, by the hash of their text."""
    tokenizer: Path | None = None
    """SentencePiece model for --from-text; none: train one."""
    vocab_size: int = 1024
    """Pieces of a newly trained tokenizer."""
    shard_tokens: int = 10_000_000
    """Tokens in a shard made from text (the official ones have 100 million)."""

    def __post_init__(self) -> None:
        if self.train_shards is not None and self.train_shards < 1:
            raise ConfigError(f"train_shards {self.train_shards} must be at least 1")
        if self.shard_tokens < 1:
            raise ConfigError(f"shard_tokens {self.shard_tokens} must be at least 1")
        if not self.from_text and (self.val or self.tokenizer):
            raise ConfigError("--val and --tokenizer go with --from-text FILES...")
        if self.from_text and self.train_shards is not None:
            raise ConfigError(
                "--train-shards is for downloads; with --from-text use --shard-tokens"
            )


@dataclass(frozen=True)
class RemoteFile:
    """One file of the dataset repository."""

    path: str
    size_bytes: int
    sha256: str | None

    @property
    def name(self) -> str:
        """Name without its folders."""
        return PurePosixPath(self.path).name


def download(out: Path, train_shards: int | None) -> None:
    """Bring the official shards and tokenizer into `out`; what is there and whole stays.

    Raises:
        DataError: no connection, a file missing from the repository, a download that differs
            from its published checksum, a disk that is full.
    """
    wanted = _wanted(_listing(), train_shards)
    total_bytes = sum(remote.size_bytes for remote in wanted)
    log(f"{len(wanted)} files, {total_bytes / 1e9:.2f} GB, from {REPO} into {out}")
    with progress("download (bytes)", total_bytes) as advance:
        for remote in wanted:
            if not _is_whole(out / remote.name, remote):
                _bring(remote, out)
            advance(remote.size_bytes, remote.name)
    shutil.rmtree(_partial_folder(out), ignore_errors=True)
    files.write_json(
        out / "manifest.json",
        {"source": REPO, "files": [dataclasses.asdict(remote) for remote in wanted]},
    )


def convert(config: Fetch) -> None:
    """Turn text into shards, a tokenizer and a manifest. Raises DataError, RunError."""
    started = time.monotonic()
    stale = sorted(config.out.glob("*.bin"))
    if stale:
        raise DataError(
            f"{config.out} already holds shards ({stale[0].name}, ...). Choose another --out or "
            "delete them, so that old and new text do not mix."
        )
    sources = text.TextSources(config.from_text, config.val, config.val_fraction)
    sources.total_bytes  # noqa: B018 - a missing file is told before anything is written
    target = config.out / (
        config.tokenizer.name if config.tokenizer else f"text_{config.vocab_size}_bpe.model"
    )
    if config.tokenizer:
        Tokenizer(config.tokenizer)
        files.write_bytes(target, config.tokenizer.read_bytes())
    else:
        log(f"training a tokenizer of {config.vocab_size} pieces")
        text.write_tokenizer(sources, target, config.vocab_size)
    tokenizer = Tokenizer(target)
    counts = text.write_shards(sources, tokenizer, config.out, config.shard_tokens)
    seconds = time.monotonic() - started
    splits = {split: dataclasses.asdict(count) for split, count in counts.items()}
    files.write_json(
        config.out / "manifest.json",
        {"tokenizer": target.name, "vocab_size": tokenizer.vocab_size, **splits},
    )
    for split, count in counts.items():
        log(
            f"{split}: {count.documents:,} documents, {count.tokens:,} tokens in {count.shards} "
            f"shards, {count.bytes:,} bytes, {count.bytes / count.tokens:.4f} bytes per token, "
            f"{count.unknown:,} unknown"
        )
    log(f"{seconds:.1f} s")


def _listing() -> list[RemoteFile]:
    """Every file of the dataset repository, in order of path."""
    api = huggingface_hub.HfApi(endpoint=_endpoint())

    def list_tree() -> list[RemoteFile]:
        tree = api.list_repo_tree(REPO, "datasets", recursive=True, repo_type="dataset")
        return [
            RemoteFile(item.path, item.size, item.lfs.sha256 if item.lfs else None)
            for item in tree
            if isinstance(item, huggingface_hub.hf_api.RepoFile)
        ]

    # One attempt: the hub's client already tries listings again by itself.
    return sorted(_retried(list_tree, "list the files", attempts=1), key=lambda remote: remote.path)


def _wanted(remote: list[RemoteFile], train_shards: int | None) -> list[RemoteFile]:
    def matching(pattern: str) -> list[RemoteFile]:
        found = [item for item in remote if fnmatch.fnmatchcase(item.path, pattern)]
        if not found:
            raise DataError(f"{REPO} has no {pattern}; its layout has changed")
        return found

    train = matching(TRAIN_FILES)
    if train_shards is not None and train_shards > len(train):
        raise DataError(f"{REPO} has {len(train)} training shards, not {train_shards}")
    return matching(TOKENIZER_FILE) + matching(VAL_FILES) + train[:train_shards]


def _bring(remote: RemoteFile, out: Path) -> None:
    """Download one file, check it, and only then put it in its place."""
    partial = _partial_folder(out)

    def get() -> Path:
        return Path(
            huggingface_hub.hf_hub_download(
                REPO, remote.path, repo_type="dataset", local_dir=partial, endpoint=_endpoint()
            )
        )

    fetched = _retried(get, f"download {remote.path}")
    try:
        if not _is_whole(fetched, remote):
            raise DataError(
                f"{remote.path} arrived damaged: its SHA-256 or size is not the published one. "
                "Run the command again; finished files are kept."
            )
        if remote.name.endswith(".bin"):
            check_header(fetched)
    except DataError:
        fetched.unlink(missing_ok=True)
        raise
    fetched.replace(out / remote.name)


def _is_whole(path: Path, remote: RemoteFile) -> bool:
    """True if `path` is there with the published size and checksum."""
    if not path.is_file() or path.stat().st_size != remote.size_bytes:
        return False
    if remote.sha256 is None:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == remote.sha256


def _partial_folder(out: Path) -> Path:
    return out / ".download"


def _retried(action: Callable[[], T], what: str, attempts: int = ATTEMPTS) -> T:
    """`action()`, tried again with growing waits while the network fails."""
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except RepositoryNotFoundError as error:
            raise DataError(f"{REPO} is not on {_endpoint()}, or is not public") from error
        except (OSError, HTTP_ERROR) as error:
            _give_up_if_final(error, what)
            if attempt == attempts:
                raise DataError(
                    f"cannot {what} from {_endpoint()} (tried {attempts} x): {error}. Check "
                    "the network connection and run the command again; finished files are kept."
                ) from error
            wait_s = FIRST_WAIT_S * 2 ** (attempt - 1)
            log(f"could not {what} ({type(error).__name__}); trying again in {wait_s:.0f} s")
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _give_up_if_final(error: Exception, what: str) -> None:
    """Raise DataError for failures that another attempt cannot mend."""
    if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
        raise DataError(f"cannot {what}: {REPO} has no such file") from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DataError(
            f"cannot {what}: the disk is full. Free some space and run the command again; "
            "finished files are kept."
        ) from error
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
        raise DataError(f"cannot {what}: {error}. Choose a writable --out.") from error


def _endpoint() -> str:
    return huggingface_hub.constants.ENDPOINT


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        config = tyro.cli(Fetch, args=arguments, description=__doc__)
        convert(config) if config.from_text else download(config.out, config.train_shards)
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
