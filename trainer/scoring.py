"""Scores: nats per token and bits per byte of a token stream, plain or with SLOT.

The stream lies on the device, and batches of the usual shape read nothing back, so that the GPU
never waits. Compiled on a GPU, such a batch is one CUDA graph: some hundred launches through Python
operators would take the host longer than their work takes the GPU.

Letters: N tokens, B windows, W windows of a whole call, T positions, D width, V vocabulary,
S scored positions of a batch.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer import adapt, compiling
from trainer.config import EvalConfig, SlotMode
from trainer.model import GPT
from trainer.progress import Advance, progress
from trainer.replay import Replayed
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


COMPILED_SCORES = 64
"""Scores that one process may compile: every model, mode and stride compiles `hidden` anew, which
TorchDynamo by default allows eight times."""


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
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, COMPILED_SCORES)
        return cls(
            compiling.compiled(model.hidden, dynamic=False),
            compiling.compiled(adapt.fit_shared, dynamic=False),
            compiling.compiled(adapt.fit_context, dynamic=False),
        )


def bits_per_byte(nats: float, tokens: int, text_bytes: int) -> float:
    """Mean nats per token turned into bits per byte of the text the tokens stand for."""
    return nats / math.log(2) * tokens / text_bytes


class Reader:
    """A model and the stream it reads through windows, both on the model's device.

    The weights are cast once, when the reader is made.

    Args:
        model: on its device.
        tokens_N: integers, N >= 2.
        config: batch and SLOT's settings.
        slot: SLOT mode.
    """

    def __init__(
        self, model: GPT, tokens_N: np.ndarray, config: EvalConfig, slot: SlotMode
    ) -> None:
        self.model, self.config, self.slot = model, config, slot
        self.device = model.qo_bank.device
        self.ids_N = torch.from_numpy(tokens_N.astype(np.int64)).to(self.device)
        self.plain = Programs.of(model, compiled=False)
        with torch.no_grad():
            self.weights = model.cast_weights()

    def places(self, windows: list[Window]) -> tuple[Tensor, Tensor]:
        """First position and number of scored ones of every window, int64 [W] on the device."""
        numbers = np.array([(w.first, w.new) for w in windows], dtype=np.int64)
        first_W, new_W = torch.from_numpy(numbers).to(self.device).unbind(1)
        return first_W.contiguous(), new_W.contiguous()

    @torch.no_grad()
    def tail(
        self, first_B: Tensor, new_B: Tensor, length: int, most: int, programs: Programs
    ) -> ScoredBatch:
        """The last `most` positions of every window; S = B most. Reads nothing back.

        Args:
            first_B: int64, the position each window begins at.
            new_B: int64, how many of its last positions a window scores, `most` at most.
            length: T, of every window.
            most: positions of each window whose logits are wanted.
            programs: those to run.
        """
        steps_T = torch.arange(length, device=self.device)
        at_BT = first_B.unsqueeze(1) + steps_T
        inputs_BT = self.ids_N[at_BT]
        if self.slot == "off":
            last = most if most < length else None
            hidden_BSD = programs.hidden(inputs_BT, last=last, weights=self.weights)
        else:
            hidden_BTD = programs.hidden(inputs_BT, weights=self.weights)
            scored_BT = steps_T >= length - new_B.unsqueeze(1)
            fit = programs.fit_shared if self.slot == "shared" else programs.fit_context
            head_VD, softcap = self.model.tok_emb.weight, self.model.config.logit_softcap
            targets_BT = self.ids_N[at_BT + 1]
            delta = fit(head_VD, hidden_BTD, targets_BT, scored_BT, softcap, self.config)
            hidden_BSD = adapt.shift(hidden_BTD[:, -most:], delta)
        indices_S = at_BT[:, -most:].flatten()
        return ScoredBatch(
            target_indices_S=indices_S,
            logits_SV=self.model.logits(hidden_BSD).flatten(0, 1),
            targets_S=self.ids_N[indices_S + 1],
        )

    def batch(self, windows: list[Window], first_B: Tensor, new_B: Tensor) -> ScoredBatch:
        """Every scored position of any windows of one length, through the plain programs."""
        length, most = windows[0].length, max(w.new for w in windows)
        batch = self.tail(first_B, new_B, length, most, self.plain)
        if all(w.new == most for w in windows):
            return batch
        scored_S = (torch.arange(most, device=self.device) >= most - new_B.unsqueeze(1)).flatten()
        return ScoredBatch(
            batch.target_indices_S[scored_S], batch.logits_SV[scored_S], batch.targets_S[scored_S]
        )


class Scorer:
    """Nats of a stream's targets, batch by batch; they stay on the device.

    Args:
        model: on its device.
        tokens_N: integers, N >= 2.
        config: stride, batch and SLOT's settings.
        slot: SLOT mode.
        compiled: run batches of the usual shape through torch.compile and, on a GPU, as one CUDA
            graph, captured at the first of them.
    """

    def __init__(
        self,
        model: GPT,
        tokens_N: np.ndarray,
        config: EvalConfig,
        slot: SlotMode = "off",
        *,
        compiled: bool = False,
    ) -> None:
        self.reader = Reader(model, tokens_N, config, slot)
        self.programs = Programs.of(model, compiled=compiled)
        self.length = min(model.config.seq_len, len(tokens_N) - 1)
        self.replays = compiled and self.reader.device.type == "cuda"
        self.nats_N = torch.zeros(len(tokens_N) - 1, dtype=torch.float64, device=self.reader.device)
        self._usual: Callable[[Tensor], None] | None = None

    def run(self, windows: list[Window], advance: Advance = lambda amount=1, note="": None) -> None:
        """Score windows into `nats_N`; ranks share the batches.

        Batches of another shape than the usual are few, and run as they are: the first, whose
        first window scores all its positions, and the last.

        Args:
            windows: of one length, as planned for the stream.
            advance: told of the batches done, those of the other ranks included.
        """
        first_W, new_W = self.reader.places(windows)
        size = self.reader.config.batch_windows
        for begin in range(0, len(windows), size)[_rank() :: _world_size()]:
            at = slice(begin, begin + size)
            if self._is_usual(windows[at]):
                self._add_usual(first_W[at])
            else:
                self._add(self.reader.batch(windows[at], first_W[at], new_W[at]))
            advance(_world_size())

    def _is_usual(self, windows: list[Window]) -> bool:
        config = self.reader.config
        return len(windows) == config.batch_windows and all(w.new == config.stride for w in windows)

    def _add_usual(self, first_B: Tensor) -> None:
        if self._usual is None:
            self._usual = Replayed(self.usual, first_B) if self.replays else self.usual
        self._usual(first_B)

    def usual(self, first_B: Tensor) -> None:
        """Score a batch whose windows all score a stride, given where they begin, int64 [B]."""
        stride = self.reader.config.stride
        new_B = torch.full_like(first_B, stride)
        self._add(self.reader.tail(first_B, new_B, self.length, stride, self.programs))

    def _add(self, batch: ScoredBatch) -> None:
        losses_S = F.cross_entropy(batch.logits_SV, batch.targets_S, reduction="none")
        self.nats_N[batch.target_indices_S] = losses_S.double()


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
        compiled: run batches of the usual shape through torch.compile and, on a GPU, as one CUDA
            graph; worth it for many.

    Raises:
        ConfigError: nothing to score, or a stride that does not fit.
    """
    started = time.perf_counter()
    windows = plan_windows(len(tokens_N) - 1, model.config.seq_len, config.stride)
    scorer = Scorer(model, tokens_N, config, slot, compiled=compiled)
    with progress(label, -(-len(windows) // config.batch_windows)) as advance:
        scorer.run(windows, advance)
        nats = _sum_over_ranks(scorer.nats_N)  # waits for the device
    ids_N = scorer.reader.ids_N
    text_bytes = int(sizes.count(ids_N[1:], ids_N[:-1]).sum().item())
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


def scored_batches(
    model: GPT, tokens_N: np.ndarray, windows: list[Window], config: EvalConfig, slot: SlotMode
) -> Iterator[ScoredBatch]:
    """Logits of every scored position, batch by batch, on this rank alone."""
    reader = Reader(model, tokens_N, config, slot)
    first_W, new_W = reader.places(windows)
    for begin in range(0, len(windows), config.batch_windows):
        at = slice(begin, begin + config.batch_windows)
        yield reader.batch(windows[at], first_W[at], new_W[at])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _sum_over_ranks(nats_N: Tensor) -> Tensor:
    """Every rank's targets together, on the host: each target is nonzero on one rank only."""
    if _world_size() > 1:
        dist.all_reduce(nats_N)
    return nats_N.cpu()
