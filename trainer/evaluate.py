"""Score an artifact alone: `python -m trainer.evaluate ARTIFACT`.

    python -m trainer.evaluate ARTIFACT [--data DIR | --text FILE] [--slot off context shared]

Only the artifact is read, never the checkpoint it came from. No score is shown without its SLOT
mode and what the causality probe found.

Letters: N tokens.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from trainer import artifact, corpus, quantize
from trainer.causality import probe
from trainer.config import EvalConfig, SlotMode
from trainer.errors import ConfigError, DataError, FairwayError
from trainer.model import GPT
from trainer.scoring import score
from trainer.tokenizer import Tokenizer
from trainer.tokens import TokenBytes, token_bytes


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m trainer.evaluate`."""

    artifact: tyro.conf.Positional[Path]
    """The artifact to score."""
    data: Path | None = None
    """Folder of shards and tokenizer; none: the embedded corpus."""
    text: Path | None = None
    """Score this UTF-8 text file instead of the validation split (the tokenizer is --data's)."""
    slot: tuple[SlotMode, ...] = ("off", "context", "shared")
    """Modes to score in."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    max_tokens: int | None = None
    """Score only the first tokens."""
    stride: int = EvalConfig.stride
    """Tokens a sliding window moves on."""
    batch_windows: int = EvalConfig.batch_windows
    """Windows in one batch."""


def load_artifact(path: Path, device: torch.device) -> GPT:
    """The model of an artifact, float32 weights as decoded, ready to score.

    Raises:
        ArtifactError: the file is missing, damaged or of another version.
    """
    packed = artifact.load(path)
    cuda = device.type == "cuda"
    model = GPT(
        packed.model_config,
        compute_dtype=torch.bfloat16 if cuda else torch.float32,
    )
    model.load_state_dict(quantize.dequantize(packed))
    return model.to(device).requires_grad_(False)


def stream_of(arguments: Arguments, model: GPT) -> tuple[np.ndarray, TokenBytes]:
    """Tokens to score and the bytes they stand for. Raises DataError."""
    data = corpus.open_data(arguments.data, model.config.vocab_size)
    sizes = token_bytes(data.tokenizer, model.config.vocab_size)
    if arguments.text is None:
        return data.val(model.config.seq_len, arguments.max_tokens), sizes
    ids = Tokenizer(data.tokenizer, model.config.vocab_size).encode(read_text(arguments.text))
    return np.array(ids[: arguments.max_tokens], dtype=np.uint16), sizes


def read_text(path: Path) -> str:
    """A UTF-8 text file's content. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Score an artifact in every mode asked for; returns the exit status."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    try:
        _main(arguments)
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _main(arguments: Arguments) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA GPU; use --device cpu")
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    model = load_artifact(arguments.artifact, device)
    tokens_N, sizes = stream_of(arguments, model)
    config = EvalConfig(stride=arguments.stride, batch_windows=arguments.batch_windows)
    table = Table(title=str(arguments.artifact))
    for heading in ("SLOT", "causal (probed)", "nats/token", "bits/byte", "tokens", "seconds"):
        table.add_column(heading)
    for mode in arguments.slot:
        result = score(
            model, tokens_N, sizes.to(device), config, mode, f"SLOT {mode}", compiled=cuda
        )
        verdict = probe(model, tokens_N, config, mode)
        table.add_row(
            mode,
            "yes" if verdict.causal else f"NO: moved by {verdict.moved:.1e}",
            f"{result.nats:.5f}",
            f"{result.bpb:.4f}",
            f"{result.tokens:,}",
            f"{result.score_seconds:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
