"""Where a run's tokens come from: a folder of shards and a tokenizer, fetched or embedded.

Letters: N tokens.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer import embedded
from trainer.errors import DataError
from trainer.shards import Split, check_header, find_shards, read_shard
from trainer.tokenizer import Tokenizer

ENTROPY_TOKENS = 100_000_000


@dataclass(frozen=True)
class DataFolder:
    """Shards of both splits and the tokenizer they were written with."""

    dir: Path
    name: str
    train_paths: tuple[Path, ...]
    val_paths: tuple[Path, ...]
    tokenizer: Path
    vocab_size: int

    def train(self) -> list[np.ndarray]:
        """Mapped tokens of each training shard, uint16 [N]. Raises DataError."""
        return load_split(self, "train")

    def val(self, seq_len: int, max_tokens: int | None = None) -> np.ndarray:
        """The validation split as one array, uint16 [N], cut after `max_tokens` if given.

        Raises:
            DataError: damaged shards, or less than one window of `seq_len` + 1 tokens.
        """
        shards = load_split(self, "val")
        tokens_N = shards[0] if len(shards) == 1 else np.concatenate(shards)
        if max_tokens is not None:
            tokens_N = tokens_N[:max_tokens]
        if len(tokens_N) < seq_len + 1:
            raise DataError(
                f"the validation split of {self.dir} has {len(tokens_N)} tokens, less than one "
                f"window of {seq_len} + 1. Hold out more text, score more tokens or use a smaller "
                "model.seq_len."
            )
        return tokens_N

    def describe(self) -> dict[str, Any]:
        """Figures for the report: counts of shards and tokens, unigram entropy in nats."""
        train = self.train()
        return {
            "name": self.name,
            "dir": str(self.dir),
            "tokenizer": self.tokenizer.name,
            "train_shards": len(train),
            "train_tokens": sum(len(tokens) for tokens in train),
            "val_tokens": sum(check_header(path) for path in self.val_paths),
            "unigram_nats": unigram_entropy_nats(train, self.vocab_size),
        }


def open_data(folder: Path | None, vocab_size: int) -> DataFolder:
    """The data of a run: `folder`, or the embedded corpus when there is none. Raises DataError."""
    return embedded_corpus(vocab_size) if folder is None else open_folder(folder, vocab_size)


def open_folder(folder: Path, vocab_size: int) -> DataFolder:
    """Find shards and tokenizer in `folder`; tokens are checked when a split is loaded.

    Raises:
        DataError: no shards of a split, not exactly one tokenizer, or one of another size.
    """
    train, val = find_shards(folder, "train"), find_shards(folder, "val")
    tokenizer = find_tokenizer(folder)
    Tokenizer(tokenizer, vocab_size)
    return DataFolder(
        dir=folder,
        name=folder.name,
        train_paths=tuple(train),
        val_paths=tuple(val),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
    )


def find_tokenizer(folder: Path | None) -> Path:
    """The tokenizer in `folder`, or the embedded corpus's. Raises DataError: not exactly one."""
    folder = embedded.ensure_built() if folder is None else folder
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        found = ", ".join(path.name for path in models) or "none"
        raise DataError(
            f"{folder} must hold exactly one tokenizer (*.model); found {found}. "
            f"`python -m trainer.fetch --out {folder}` brings it."
        )
    return models[0]


def embedded_corpus(vocab_size: int = embedded.VOCAB_SIZE) -> DataFolder:
    """The built-in English corpus, built on first use and cached. Raises DataError, RunError."""
    return replace(open_folder(embedded.ensure_built(), vocab_size), name="embedded")


def load_split(data: DataFolder, split: Split) -> list[np.ndarray]:
    """Mapped and checked tokens of every shard of a split, uint16 [N] each. Raises DataError."""
    paths = data.train_paths if split == "train" else data.val_paths
    return [read_shard(path, data.vocab_size) for path in paths]


def unigram_entropy_nats(shards: list[np.ndarray], vocab_size: int) -> float:
    """Entropy of single tokens in nats, over the first 100 million tokens of `shards`.

    The loss of a model that knows token frequencies and nothing of context.
    """
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    left = ENTROPY_TOKENS
    for tokens_N in shards:
        if left <= 0:
            break
        part = tokens_N[:left]
        counts_V += np.bincount(part, minlength=vocab_size)
        left -= len(part)
    share_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(share_V * np.log(share_V)).sum())
