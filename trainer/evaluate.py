"""Score an artifact alone: `python -m trainer.evaluate ARTIFACT`.

    python -m trainer.evaluate ARTIFACT [--data DIR | --text FILE] [--slot off context shared]

Only the artifact is read, never the checkpoint it came from. No score is shown without its SLOT
mode, what the causality probe found, and the contest's other rules. How the artifact was made is
known if it still lies in its run folder, with the digest recorded there.

Letters: N tokens.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from trainer import artifact, codesize, corpus, quantize
from trainer.config import AttentionBackend, EvalConfig, MlpBackend, PassesBackend, SlotMode
from trainer.errors import ConfigError, DataError, FairwayError
from trainer.legality import findings, probe_modes
from trainer.model import GPT
from trainer.record import RECORD, SMOKE
from trainer.run import check_implementations, new_model
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
    mlp: MlpBackend | None = None
    """Fused MLP implementation; none: the record's on a GPU, the plain one on a CPU."""
    attention: AttentionBackend | None = None
    """Attention implementation; none: likewise."""
    passes: PassesBackend | None = None
    """What lies between the products; none: likewise."""


def load_artifact(
    path: Path,
    device: torch.device,
    *,
    mlp: MlpBackend | None = None,
    attention: AttentionBackend | None = None,
    passes: PassesBackend | None = None,
) -> GPT:
    """The model of an artifact, float32 weights as decoded, ready to score.

    Args:
        path: the artifact.
        device: where the model is to be; products are in bfloat16 on a GPU, float32 on a CPU.
        mlp, attention, passes: implementations by name; None is the record's on a GPU, the plain
            one on a CPU.

    Raises:
        ArtifactError: the file is missing, damaged or of another version.
        ConfigError: an implementation cannot run here, or not this model.
    """
    packed = artifact.load(path)
    preset = RECORD if device.type == "cuda" else SMOKE
    config = replace(
        preset,
        model=packed.model_config,
        mlp=mlp or preset.mlp,
        attention=attention or preset.attention,
        passes=passes or preset.passes,
    )
    check_implementations(config)
    model = new_model(config, device)
    model.load_state_dict(quantize.dequantize(packed))
    return model.requires_grad_(False)


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
    if not arguments.slot:
        raise ConfigError("--slot: name at least one mode")
    config = EvalConfig(
        stride=arguments.stride,
        batch_windows=arguments.batch_windows,
        max_tokens=arguments.max_tokens,
    )
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    started = time.perf_counter()
    model = load_artifact(
        arguments.artifact,
        device,
        mlp=arguments.mlp,
        attention=arguments.attention,
        passes=arguments.passes,
    )
    load_s = time.perf_counter() - started
    tokens_N, sizes = stream_of(arguments, model)
    table = Table(title=str(arguments.artifact))
    for heading in ("SLOT", "causal (probed)", "nats/token", "bits/byte", "tokens", "seconds"):
        table.add_column(heading)
    verdicts = probe_modes(model, tokens_N, config, arguments.slot)["modes"]
    seconds: dict[SlotMode, float] = {}
    for mode in arguments.slot:
        result = score(
            model, tokens_N, sizes.to(device), config, mode, f"SLOT {mode}", compiled=cuda
        )
        seconds[mode] = load_s + result.score_seconds
        verdict = verdicts[mode]
        table.add_row(
            mode,
            "yes" if verdict["causal"] else f"NO: moved by {verdict['moved']:.1e}",
            f"{result.nats:.5f}",
            f"{result.bpb:.4f}",
            f"{result.tokens:,}",
            f"{result.score_seconds:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(_legality(arguments.artifact, verdicts, seconds))


def _legality(
    path: Path, verdicts: dict[SlotMode, dict[str, Any] | None], seconds: dict[SlotMode, float]
) -> Table:
    table = Table(title="Legality; times are the contest's on 8 x H100 alone")
    for heading in ("rule", "found", "verdict"):
        table.add_column(heading)
    found = findings(verdicts, seconds, path.stat().st_size, codesize.code_bytes(), _made_by(path))
    for finding in found:
        table.add_row(finding.rule, finding.found, finding.verdict)
    return table


def _made_by(path: Path) -> dict[str, dict[str, Any]]:
    """Stage results of the run that made this very artifact; empty if it is not beside them."""
    stages = {p.stem: json.loads(p.read_text()) for p in path.parent.glob("stages/*.json")}
    recorded = stages.get("artifact", {}).get("sha256")
    return stages if recorded == hashlib.sha256(path.read_bytes()).hexdigest() else {}


if __name__ == "__main__":
    sys.exit(main())
