"""Text from a model: B continuations drawn at once through the KV cache.

Letters: B sequences, P positions of the prompt, N drawn tokens, T positions, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.model import GPT
from trainer.progress import Advance
from trainer.states import KVCache

SPAN = 256
"""Slots of the cache that attention reads come in multiples of this: a step in the first part of a
text does not wait for the empty rest."""


class Sampler:
    """Static buffers of one generation; a step reads and writes only these.

    The weights are cast once, when the sampler is made. On CUDA a step is captured then too, one
    graph for every span of the cache, and replayed from then on.

    Args:
        model: on its device.
        sequences: B, continued at once.
        length: T, prompt and continuation together, at most the model's window.
        temperature: above 0; logits are divided by it.
        top_p: draw only from the likeliest tokens that together have this share; 1 is all.

    Raises:
        ValueError: length outside 1..seq_len, temperature not above 0, top_p outside (0, 1].
    """

    def __init__(
        self, model: GPT, sequences: int, length: int, temperature: float, top_p: float = 1.0
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature {temperature} must be above 0")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p {top_p} must lie above 0 and not above 1")
        device = model.qo_bank.device
        self.model, self.temperature, self.top_p = model, temperature, top_p
        self.cache: KVCache = model.new_cache(sequences, length)
        self.ids_BT = torch.zeros(sequences, length, dtype=torch.int64, device=device)
        self.uniform_TB = torch.zeros(length, sequences, device=device)
        with torch.no_grad():
            self.weights = model.cast_weights()
            self._graphs: dict[int, Callable[[], None]] = {}
            if device.type == "cuda" and length > 1:
                self._graphs = {span: self._captured(span) for span in self._spans(length)}

    @torch.no_grad()
    def extend(self, prompt_BP: Tensor, uniform_NB: Tensor, advance: Advance) -> Tensor:
        """Prompt and its continuation by N tokens, int64 [B, P + N] on the model's device.

        Args:
            prompt_BP: token ids, P >= 1 and P + N <= length.
            uniform_NB: numbers in [0, 1), one for every token to draw. Made on the host, they
                are the same on every device.
            advance: told of every token drawn.
        """
        P, N = prompt_BP.shape[1], len(uniform_NB)
        self.cache.reset()
        self.ids_BT[:, :P] = prompt_BP
        self.uniform_TB[P : P + N] = uniform_NB
        if P > 1:
            self.cache.span = self._span(P - 1)
            self.model.hidden(self.ids_BT[:, : P - 1], cache=self.cache, weights=self.weights)
        for drawn in range(N):
            self._step(self._span(P + drawn))
            advance()
        return self.ids_BT[:, : P + N].clone()

    def _span(self, tokens: int) -> int:
        """Slots to read so that `tokens` fit."""
        return min(self.ids_BT.shape[1], -(-tokens // SPAN) * SPAN)

    def _spans(self, length: int) -> list[int]:
        """Every span a text of `length` tokens needs, the longest first."""
        return sorted({self._span(tokens) for tokens in range(1, length)}, reverse=True)

    def _step(self, span: int) -> None:
        if self._graphs:
            self._graphs[span]()
            return
        self.cache.span = span
        self._draw()

    def _draw(self) -> None:
        """Draw the next token of every sequence by inverting the cumulative distribution."""
        at = self.cache.position.view(1)
        previous = self.ids_BT.index_select(1, at)
        target = at + 1  # before the forward pass moves the position on
        hidden = self.model.hidden(previous, cache=self.cache, weights=self.weights)
        logits = self.model.logits(hidden[:, -1]) / self.temperature
        shares = logits.softmax(-1)
        if self.top_p < 1:
            shares = nucleus(shares, self.top_p)
        cumulative = shares.cumsum(-1)
        uniform = self.uniform_TB.index_select(0, target).view(-1, 1)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        last = self.model.config.vocab_size - 1
        self.ids_BT.index_copy_(1, target, drawn.clamp_max(last))

    def _captured(self, span: int) -> Callable[[], None]:
        """The step as a CUDA graph, after a warm-up that `extend` leaves no trace of."""
        self.cache.span = span
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.cache.reset()
                self._draw()
        torch.cuda.current_stream().wait_stream(stream)
        self.cache.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as trainer/replay.py
            self._draw()
        return graph.replay


def nucleus(shares_BV: Tensor, top_p: float) -> Tensor:
    """Shares of the likeliest tokens whose sum first reaches `top_p`, the others 0; [B, V].

    The likeliest token always stays, and so does one as likely as the last that stays. The rest
    is not scaled up again. Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    ordered = shares_BV.sort(dim=-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    least = ordered.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
    return shares_BV.masked_fill(shares_BV < least, 0.0)
