"""Scores: nats per token and bits per byte of a token stream, plain or with SLOT.

Letters: N tokens, B windows, T positions, D width, V vocabulary, S scored positions of a batch.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer import adapt
from trainer.config import EvalConfig, SlotMode
from trainer.model import GPT
from trainer.progress import progress
from trainer.tokens import TokenBytes
from trainer.windows import Window, plan_windows


@dataclass(frozen=True)
class Score:
    """One score, with the mode it was made in."""

    mode: SlotMode
    causal: bool
    nats: float
    """Mean nats per token."""
    bpb: float
    """Bits per byte of text."""
    tokens: int
    bytes: int
    stride: int
    score_seconds: float
    target_nats: np.ndarray = dataclasses.field(repr=False, compare=False)
    """float64 [N - 1]: nats of every target."""

    def summary(self) -> dict[str, object]:
        """The score without its per-target array, JSON-able."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "target_nats"
        }


@dataclass(frozen=True)
class ScoredBatch:
    """Logits of the positions a batch scores, and the targets they belong to."""

    target_indices: np.ndarray
    logits_SV: Tensor
    targets_S: Tensor
    previous_S: Tensor


def bits_per_byte(nats: float, tokens: int, text_bytes: int) -> float:
    """Mean nats per token turned into bits per byte of the text the tokens stand for."""
    return nats / math.log(2) * tokens / text_bytes


def score(
    model: GPT,
    tokens_N: np.ndarray,
    sizes: TokenBytes,
    config: EvalConfig,
    slot: SlotMode = "off",
    label: str = "scoring",
) -> Score:
    """Score every target of a stream once, through sliding windows; ranks share the batches.

    Args:
        model: on its device.
        tokens_N: integers, N >= 2.
        sizes: bytes each token stands for, on the model's device.
        config: stride, batch and SLOT's settings.
        slot: SLOT mode.
        label: what the progress display says.

    Raises:
        ConfigError: nothing to score, or a stride that does not fit.
    """
    started = time.perf_counter()
    nats = torch.zeros(len(tokens_N) - 1, dtype=torch.float64)
    text_bytes = 0
    windows = plan_windows(len(tokens_N) - 1, model.config.seq_len, config.stride)
    batches = -(-len(windows) // config.batch_windows)
    with progress(label, batches) as advance:
        for batch in scored_batches(model, tokens_N, windows, config, slot):
            losses = F.cross_entropy(batch.logits_SV, batch.targets_S, reduction="none")
            nats[torch.from_numpy(batch.target_indices)] = losses.double().cpu()
            text_bytes += int(sizes.count(batch.targets_S, batch.previous_S).sum())
            advance(_world_size())
    nats, text_bytes = _sum_over_ranks(nats, text_bytes, model.qo_bank.device)
    mean = nats.mean().item()
    return Score(
        mode=slot,
        causal=slot != "shared",
        nats=mean,
        bpb=bits_per_byte(mean, len(nats), text_bytes),
        tokens=len(nats),
        bytes=text_bytes,
        stride=config.stride,
        score_seconds=time.perf_counter() - started,
        target_nats=nats.numpy(),
    )


def full_windows(config: EvalConfig, seq_len: int) -> EvalConfig:
    """Settings that score whole windows side by side, the cheap score used between stages."""
    return dataclasses.replace(config, stride=seq_len)


@torch.no_grad()
def scored_batches(
    model: GPT, tokens_N: np.ndarray, windows: list[Window], config: EvalConfig, slot: SlotMode
) -> Iterator[ScoredBatch]:
    """Logits of every scored position, batch by batch; this rank's batches only."""
    device = model.qo_bank.device
    batches = [
        windows[at : at + config.batch_windows]
        for at in range(0, len(windows), config.batch_windows)
    ]
    for batch in batches[_rank() :: _world_size()]:
        at = np.stack([np.arange(w.first, w.first + w.length) for w in batch])
        inputs_BT = torch.from_numpy(tokens_N[at].astype(np.int64)).to(device)
        targets_BT = torch.from_numpy(tokens_N[at + 1].astype(np.int64)).to(device)
        scored = np.stack([np.arange(w.length) >= w.length - w.new for w in batch])
        scored_BT = torch.from_numpy(scored).to(device)
        hidden_BTD = model.hidden(inputs_BT)
        if slot == "shared":
            delta = adapt.fit_shared(model, hidden_BTD, targets_BT, config)
        elif slot == "context":
            delta = adapt.fit_context(model, hidden_BTD, targets_BT, scored_BT, config)
        else:
            delta = None
        # The head is wanted for the scored positions alone: 64 of 2048 in the record.
        hidden_SD = hidden_BTD[scored_BT]
        if delta is not None:
            hidden_SD = adapt.shift(hidden_SD, delta.expand(hidden_BTD.shape)[scored_BT])
        yield ScoredBatch(
            target_indices=at[scored],
            logits_SV=model.logits(hidden_SD),
            targets_S=targets_BT[scored_BT],
            previous_S=inputs_BT[scored_BT],
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _sum_over_ranks(nats: Tensor, text_bytes: int, device: torch.device) -> tuple[Tensor, int]:
    """Every rank's targets together: each target is nonzero on one rank only."""
    if _world_size() == 1:
        return nats, text_bytes
    packed = torch.cat((nats, torch.tensor([float(text_bytes)], dtype=torch.float64))).to(device)
    dist.all_reduce(packed)
    packed = packed.cpu()
    return packed[:-1], int(packed[-1].item())
