"""Scores: nats per token and bits per byte of a token stream, plain or with SLOT.

The stream lies on the device, and batches of the usual shape read nothing back, so that the GPU
never waits.

Letters: N tokens, B windows, T positions, D width, V vocabulary, S scored positions of a batch.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
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
    """Logits of the positions a batch scores, and the targets they belong to; on the device."""

    target_indices_S: Tensor
    logits_SV: Tensor
    targets_S: Tensor
    previous_S: Tensor


@dataclass(frozen=True)
class Programs:
    """The programs that do nearly all the work of scoring."""

    hidden: Callable[..., Tensor]
    fit_shared: adapt.Fit = adapt.fit_shared
    fit_context: adapt.Fit = adapt.fit_context

    @classmethod
    def of(cls, model: GPT, *, compiled: bool) -> "Programs":
        """Those of `model`, as they are or through torch.compile."""
        if not compiled:
            return cls(model.hidden)
        return cls(
            torch.compile(model.hidden, fullgraph=True, dynamic=False),
            torch.compile(adapt.fit_shared, fullgraph=True, dynamic=False),
            torch.compile(adapt.fit_context, fullgraph=True, dynamic=False),
        )


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
    compiled: bool = False,
) -> Score:
    """Score every target of a stream once, through sliding windows; ranks share the batches.

    Args:
        model: on its device.
        tokens_N: integers, N >= 2.
        sizes: bytes each token stands for, on the model's device.
        config: stride, batch and SLOT's settings.
        slot: SLOT mode.
        label: what the progress display says.
        compiled: run full batches through torch.compile; worth it for many.

    Raises:
        ConfigError: nothing to score, or a stride that does not fit.
    """
    started = time.perf_counter()
    device = model.qo_bank.device
    nats = torch.zeros(len(tokens_N) - 1, dtype=torch.float64, device=device)
    text_bytes = torch.zeros((), dtype=torch.float64, device=device)
    windows = plan_windows(len(tokens_N) - 1, model.config.seq_len, config.stride)
    batches = -(-len(windows) // config.batch_windows)
    programs = Programs.of(model, compiled=compiled)
    with progress(label, batches) as advance:
        for batch in scored_batches(model, tokens_N, windows, config, slot, programs):
            losses = F.cross_entropy(batch.logits_SV, batch.targets_S, reduction="none")
            nats[batch.target_indices_S] = losses.double()
            text_bytes += sizes.count(batch.targets_S, batch.previous_S).sum()
            advance(_world_size())
        nats, total_bytes = _sum_over_ranks(nats, text_bytes)  # waits for the device
    mean = nats.mean().item()
    return Score(
        mode=slot,
        causal=slot != "shared",
        nats=mean,
        bpb=bits_per_byte(mean, len(nats), total_bytes),
        tokens=len(nats),
        bytes=total_bytes,
        stride=config.stride,
        score_seconds=time.perf_counter() - started,
        target_nats=nats.numpy(),
    )


def full_windows(config: EvalConfig, seq_len: int) -> EvalConfig:
    """Settings that score whole windows side by side, the cheap score used between stages."""
    return dataclasses.replace(config, stride=seq_len)


@torch.no_grad()
def scored_batches(
    model: GPT,
    tokens_N: np.ndarray,
    windows: list[Window],
    config: EvalConfig,
    slot: SlotMode,
    programs: Programs | None = None,
    shared_out: bool = True,
) -> Iterator[ScoredBatch]:
    """Logits of every scored position, batch by batch.

    `shared_out`: this rank's batches only; else all of them, on this rank alone.
    """
    device = model.qo_bank.device
    plain = Programs.of(model, compiled=False)
    stream_N = torch.from_numpy(tokens_N.astype(np.int64)).to(device)
    first_W, new_W = (
        torch.from_numpy(np.fromiter(numbers, np.int64, len(windows))).to(device)
        for numbers in ((w.first for w in windows), (w.new for w in windows))
    )
    steps_T = torch.arange(windows[0].length, device=device)
    begins = range(0, len(windows), config.batch_windows)
    for begin in begins[_rank() :: _world_size()] if shared_out else begins:
        at = slice(begin, begin + config.batch_windows)
        batch = windows[at]
        # Batches of another shape are few: the first, whose first window scores all, and the last.
        usual = len(batch) == config.batch_windows and batch[0].new == config.stride
        chosen = programs if programs is not None and usual else plain
        at_BT = first_W[at].unsqueeze(1) + steps_T
        scored_BT = steps_T >= len(steps_T) - new_W[at].unsqueeze(1)
        # Scored positions are a window's last ones; the head is wanted for these alone.
        most = max(w.new for w in batch)
        inputs_BT = stream_N[at_BT]
        if slot == "off":
            hidden_BSD = chosen.hidden(inputs_BT, last=most if most < len(steps_T) else None)
        else:
            hidden_BTD = chosen.hidden(inputs_BT)
            fit = chosen.fit_shared if slot == "shared" else chosen.fit_context
            head_VD, softcap = model.tok_emb.weight, model.config.logit_softcap
            delta = fit(head_VD, hidden_BTD, stream_N[at_BT + 1], scored_BT, softcap, config)
            hidden_BSD = adapt.shift(hidden_BTD[:, -most:], delta)
        logits_SV = model.logits(hidden_BSD).flatten(0, 1)
        indices_S = at_BT[:, -most:].flatten()
        if any(w.new < most for w in batch):
            scored_S = scored_BT[:, -most:].flatten()
            logits_SV, indices_S = logits_SV[scored_S], indices_S[scored_S]
        yield ScoredBatch(
            target_indices_S=indices_S,
            logits_SV=logits_SV,
            targets_S=stream_N[indices_S + 1],
            previous_S=stream_N[indices_S],
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _sum_over_ranks(nats_N: Tensor, text_bytes: Tensor) -> tuple[Tensor, int]:
    """Every rank's targets together, on the host: each target is nonzero on one rank only."""
    packed = torch.cat((nats_N, text_bytes.view(1)))
    if _world_size() > 1:
        dist.all_reduce(packed)
    packed = packed.cpu()
    return packed[:-1], int(packed[-1].item())
