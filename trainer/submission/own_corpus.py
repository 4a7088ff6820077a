"""What stands for `trainer.embedded` inside the packed script, which holds no corpus."""

from pathlib import Path

from trainer.errors import DataError

VOCAB_SIZE = 1024


def ensure_built() -> Path:
    """Raises DataError: there is nothing to build it from."""
    raise DataError(
        "the packed script holds no corpus: name a folder with shards and their tokenizer "
        "(--data.dir DATA; for trainer.evaluate --data DATA)"
    )
