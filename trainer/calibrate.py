"""Calibration: the model writes its own text, and every matrix's input statistics are collected.

No training or validation data is touched after training.

Letters: B sequences, T positions, C columns of a matrix, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.model import GPT, KVCache
from trainer.progress import progress

HESSIAN_BATCH = 8
"""Sequences in one forward pass of Hessian collection."""


@torch.no_grad()
def generate(model: GPT, sequences: int, length: int, temperature: float, seed: int) -> Tensor:
    """Sample `sequences` texts of `length` tokens: int64 [B, T] on the model's device.

    The first token is uniform over the vocabulary, the others are drawn at `temperature`
    through the KV cache, all sequences at once; on CUDA one captured step is replayed.

    Raises:
        ValueError: length outside 1..seq_len, or a temperature that is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    device = model.qo_bank.device
    generator = torch.Generator().manual_seed(seed)
    sampler = _Sampler(model, sequences, length, temperature, generator)
    step = sampler.captured() if device.type == "cuda" else sampler.step
    with progress("calibration text", length) as advance:
        advance()
        for _ in range(length - 1):
            step()
            advance()
    return sampler.ids_BT


class _Sampler:
    """Static buffers of one generation; `step` reads and writes only these."""

    def __init__(
        self,
        model: GPT,
        sequences: int,
        length: int,
        temperature: float,
        generator: torch.Generator,
    ) -> None:
        device = model.qo_bank.device
        self.model, self.temperature = model, temperature
        self.cache: KVCache = model.new_cache(sequences, length)
        first = torch.randint(model.config.vocab_size, (sequences,), generator=generator)
        self.ids_BT = torch.zeros(sequences, length, dtype=torch.int64, device=device)
        self.ids_BT[:, 0] = first.to(device)
        # Drawn on the host before the first step: the same numbers on every device.
        self.uniform_TB = torch.rand(length, sequences, generator=generator).to(device)

    def step(self) -> None:
        """Draw the next token of every sequence by inverting the cumulative distribution."""
        at = self.cache.position.view(1)
        previous = self.ids_BT.index_select(1, at)
        target = at + 1  # before the forward pass moves the position on
        hidden = self.model.hidden(previous, cache=self.cache)
        logits = self.model.logits(hidden[:, -1]) / self.temperature
        cumulative = logits.softmax(-1).cumsum(-1)
        uniform = self.uniform_TB.index_select(0, target).view(-1, 1)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        last = self.model.config.vocab_size - 1
        self.ids_BT.index_copy_(1, target, drawn.clamp_max(last))

    def captured(self) -> Callable[[], None]:
        """The step as a CUDA graph, warmed up without leaving a trace."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.cache.reset()
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.cache.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.cache.reset()
        return graph.replay


@torch.no_grad()
def collect_hessians(model: GPT, ids_BT: Tensor) -> dict[str, Tensor]:
    """H = sum over positions of x x^T per matrix, averaged over sequences; float32 [C, C].

    The product is formed once for matrices that read the same input (q, k and v of a layer).

    Args:
        model: on its device.
        ids_BT: calibration text.
    """
    sums: dict[tuple[str, ...], Tensor] = {}

    def observe(names: tuple[str, ...], x_BTC: Tensor) -> None:
        x = x_BTC.flatten(0, 1).float()
        product = x.T @ x
        sums[names] = product if names not in sums else sums[names].add_(product)

    sequences = len(ids_BT)
    with progress("Hessians", sequences) as advance:
        for batch in ids_BT.split(HESSIAN_BATCH):
            model.hidden(batch, observe=observe)
            advance(len(batch))
    hessians: dict[str, Tensor] = {}
    for names, total in sums.items():
        mean = total / sequences
        hessians.update({name: mean.clone() for name in names})
    return hessians
