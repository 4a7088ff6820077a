"""The causality probe: change the future and look whether the past's predictions move.

Letters: N tokens, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch

from trainer.config import EvalConfig, SlotMode
from trainer.model import GPT
from trainer.scoring import scored_batches
from trainer.windows import plan_windows


@dataclass(frozen=True)
class Verdict:
    """Result of a probe. `moved` is the largest change of a log-probability, nats."""

    mode: SlotMode
    moved: float
    worst_target: int
    probed: int

    @property
    def causal(self) -> bool:
        """True when nothing moved, to the bit: the same shapes give the same arithmetic."""
        return self.moved == 0.0


def probe(
    model: GPT, tokens_N: np.ndarray, config: EvalConfig, mode: SlotMode, probes: int = 6
) -> Verdict:
    """Replace token t+1 and all after it; the whole distribution predicted at t must not move.

    Probed are targets spread over the first windows: inside the first one, at its end, and in
    the windows after it. Streams are cut to three batches of windows at most.

    Args:
        model: on its device.
        tokens_N: at least two tokens.
        config: windows and SLOT settings, as for scoring.
        mode: SLOT mode to probe.
        probes: number of targets.
    """
    seq_len, vocab = model.config.seq_len, model.config.vocab_size
    cut = min(len(tokens_N), seq_len + 1 + 2 * config.batch_windows * config.stride)
    tokens = tokens_N[:cut].astype(np.int64)
    last = len(tokens) - 2
    spread = np.linspace(0, last, probes).astype(int)
    edges = np.array([min(last, seq_len - 1), min(last, seq_len)])
    generator = np.random.Generator(np.random.PCG64(1))
    before = _log_probabilities(model, tokens, config, mode)
    worst, worst_target = 0.0, 0
    targets = sorted({*spread.tolist(), *edges.tolist()})
    for t in targets:
        changed = tokens.copy()
        shift = generator.integers(1, vocab, len(tokens) - t - 1)
        changed[t + 1 :] = (changed[t + 1 :] + shift) % vocab
        after = _log_probabilities(model, changed, config, mode)
        moved = (after[: t + 1] - before[: t + 1]).abs().max().item()
        if not moved <= worst:
            worst, worst_target = moved, t
    return Verdict(mode, worst, worst_target, len(targets))


def _log_probabilities(
    model: GPT, tokens: np.ndarray, config: EvalConfig, mode: SlotMode
) -> torch.Tensor:
    """Log-probability of every token at every target, float32 [N - 1, V] on the host."""
    windows = plan_windows(len(tokens) - 1, model.config.seq_len, config.stride)
    table = torch.empty(len(tokens) - 1, model.config.vocab_size)
    for batch in scored_batches(model, tokens, windows, config, mode):
        table[batch.target_indices_S.cpu()] = batch.logits_SV.log_softmax(-1).cpu()
    return table
