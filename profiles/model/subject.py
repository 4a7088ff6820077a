"""The model that is looked into, and the held-out windows it is looked at with.

Letters: B windows, T positions, N tokens, V vocabulary.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import checkpoint, corpus
from trainer.config import RunConfig
from trainer.corpus import DataFolder
from trainer.damage import precise_logits
from trainer.errors import RunError
from trainer.folder import RunFolder
from trainer.model import GPT

BATCH_TOKENS = 1 << 15
"""Tokens of one forward pass; their logits take 128 MB on the record's model."""


@dataclass(frozen=True)
class Subject:
    """A finished run, opened: tensors lie on the model's device."""

    path: Path
    config: RunConfig
    model: GPT
    """The averaged weights, before quantization; plain PyTorch, bfloat16 products on a GPU."""
    hessians: dict[str, Tensor]
    calibration_BT: Tensor
    """The text that the model wrote itself."""
    data: DataFolder
    inputs_BT: Tensor
    """Held-out windows side by side, int64."""
    targets_BT: Tensor

    def first(self, tokens: int) -> "Subject":
        """The same with as many windows as `tokens` fill, two at least."""
        windows = max(2, tokens // self.inputs_BT.shape[1])
        return replace(
            self, inputs_BT=self.inputs_BT[:windows], targets_BT=self.targets_BT[:windows]
        )


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error.

    The error is that of the mean over windows: tokens of one window are not independent.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values_B: Tensor) -> "Estimate":
        """From one value a window."""
        values_B = values_B.double()
        spread = values_B.std().item() if len(values_B) > 1 else float("nan")
        return cls(values_B.mean().item(), spread / len(values_B) ** 0.5)

    def __str__(self) -> str:
        return f"{self.mean:+.5f} ± {self.error:.5f}"


@dataclass(frozen=True)
class Predictions:
    """What the unquantized model says of every held-out target; [B, T] on the device."""

    nats_BT: Tensor
    confidence_BT: Tensor
    """Probability of the likeliest token."""
    correct_BT: Tensor
    """Whether that token is the target."""


def open_subject(run: Path, data: Path | None, device: torch.device, max_tokens: int) -> Subject:
    """Open a run folder and the first `max_tokens` held-out tokens, in whole windows.

    Args:
        run: folder of a run that got past its Hessians.
        data: folder of shards and tokenizer; none: the run's own.
        device: where to work.
        max_tokens: targets to score, at least two windows.

    Raises:
        RunError: not a run folder, or one that lacks weights, Hessians or calibration text.
        DataError: no data, or less of it than two windows.
    """
    folder, config = RunFolder.open(run)
    for path in (folder.model, folder.hessians, folder.calibration):
        if not path.exists():
            raise RunError(
                f"{run} has no {path.name}: its stages up to `hessians` must be finished. "
                f"Continue it with `python -m trainer --resume {run}`."
            )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = GPT(config.model, compute_dtype=dtype)
    model.load_state_dict(checkpoint.load_tensors(folder.model)[0])
    hessians, _ = checkpoint.load_tensors(folder.hessians)
    calibration, _ = checkpoint.load_tensors(folder.calibration)
    opened = corpus.open_data(data or config.data.dir, config.model.vocab_size)
    T = config.model.seq_len
    tokens_N = opened.val(2 * T, max(max_tokens, 2 * T) + 1)
    windows = (len(tokens_N) - 1) // T
    stream = torch.from_numpy(tokens_N[: windows * T + 1].astype(np.int64)).to(device)
    return Subject(
        path=run,
        config=config,
        model=model.to(device).requires_grad_(False),
        hessians={name: h.to(device) for name, h in hessians.items()},
        calibration_BT=calibration["ids_BT"].to(device),
        data=opened,
        inputs_BT=stream[:-1].view(windows, T),
        targets_BT=stream[1:].view(windows, T),
    )


def batches(subject: Subject) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets, BATCH_TOKENS at a time."""
    size = max(1, BATCH_TOKENS // subject.inputs_BT.shape[1])
    return list(zip(subject.inputs_BT.split(size), subject.targets_BT.split(size), strict=True))


@torch.no_grad()
def window_nats(subject: Subject) -> Tensor:
    """Mean nats per token of every window with the model as it now is; float64 [B]."""
    found = []
    for inputs, targets in batches(subject):
        logits_NV = precise_logits(subject.model, inputs).flatten(0, 1)
        nats = F.cross_entropy(logits_NV, targets.flatten(), reduction="none")
        found.append(nats.view(targets.shape).double().mean(dim=1))
    return torch.cat(found)


@torch.no_grad()
def predict(subject: Subject) -> Predictions:
    """Losses and best guesses of the unquantized model."""
    nats, confidence, correct = [], [], []
    for inputs, targets in batches(subject):
        log_p = precise_logits(subject.model, inputs).log_softmax(-1)
        nats.append(-log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
        best, guess = log_p.max(dim=-1)
        confidence.append(best.exp())
        correct.append(guess == targets)
    return Predictions(torch.cat(nats), torch.cat(confidence), torch.cat(correct))
