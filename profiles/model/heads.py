"""Where attention heads look: the position before, a repeat, the first position, their own.

Fused attention never writes its probabilities out. They are formed again from the very queries and
keys that the model hands to `scaled_dot_product_attention`, caught on the way by a torch function
mode, so that no part of the forward pass exists twice.

Letters: B sequences, T positions, H query heads, G key/value heads, K head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trainer.errors import RunError
from trainer.model import GPT

SEQUENCES = 4
THRESHOLD = 0.3
"""Least mean attention that gives a head its name; the published threshold is not known."""
THRESHOLDS = (0.2, 0.3, 0.4, 0.5)
"""Thresholds that counts are reported for."""
PATTERNS = ("previous", "induction", "first", "self")


@dataclass(frozen=True)
class Head:
    """Mean attention of one head to each kind of place."""

    layer: int
    head: int
    previous: float
    """From t to t - 1, on held-out text."""
    induction: float
    """On random tokens repeated once: from t to the one that followed t's token the first time."""
    first: float
    """From t > 1 to position 0, on held-out text."""
    self: float
    """From t to t, on held-out text."""

    def name(self, threshold: float = THRESHOLD) -> str:
        """The pattern it attends to most, if at least `threshold`; else `other`."""
        best = max(PATTERNS, key=lambda pattern: getattr(self, pattern))
        return best if getattr(self, best) >= threshold else "other"


@dataclass(frozen=True)
class Heads:
    """All heads, and what repeats are worth to the model."""

    heads: list[Head]
    first_pass_nats: float
    """Loss on random tokens, the first time."""
    repeat_nats: float
    """Loss on the same tokens, the second time."""

    def count(self, pattern: str, threshold: float) -> int:
        """Heads of that name."""
        return sum(head.name(threshold) == pattern for head in self.heads)


class _Catch(TorchFunctionMode):
    """Hands queries and keys of every attention call to `seen`."""

    def __init__(self, seen: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen(args[0], args[1])
        return func(*args, **(kwargs or {}))


def attention_probabilities(q_BHTK: Tensor, k_BGTK: Tensor) -> Tensor:
    """Causal attention probabilities, float32 [B, H, T, T]; query heads share keys in order."""
    q, k = q_BHTK.float(), k_BGTK.float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


@torch.no_grad()
def observe(model: GPT, ids_BT: Tensor, look: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Run the model and look at every layer's attention probabilities.

    Args:
        model: with `sdpa` attention.
        ids_BT: token ids.
        look: from [B, H, T, T] to any tensor.

    Returns:
        What `look` gave, stacked over layers, and the hidden states [B, T, D].

    Raises:
        RunError: the model's attention cannot be caught.
    """
    looks: list[Tensor] = []
    with _Catch(lambda q, k: looks.append(look(attention_probabilities(q, k)))):
        hidden = model.hidden(ids_BT)
    if len(looks) != model.config.layers:
        raise RunError(
            f"{len(looks)} attention calls were seen for {model.config.layers} layers: the model "
            "no longer attends through scaled_dot_product_attention"
        )
    return torch.stack(looks), hidden


def _natural(p_BHTT: Tensor) -> Tensor:
    """Mean attention [3, H] to the previous, the first and the own position."""
    previous = p_BHTT.diagonal(-1, -2, -1).mean(dim=(0, -1))
    first = p_BHTT[..., 2:, 0].mean(dim=(0, -1))
    own = p_BHTT.diagonal(0, -2, -1)[..., 1:].mean(dim=(0, -1))
    return torch.stack((previous, first, own))


def _induction(p_BHTT: Tensor) -> Tensor:
    """Mean attention [H] from the second half to what followed the same token in the first."""
    half = p_BHTT.shape[-1] // 2
    return p_BHTT.diagonal(1 - half, -2, -1)[..., 1:].mean(dim=(0, -1))


def repeated(vocabulary: Tensor, sequences: int, half: int, seed: int) -> Tensor:
    """Random tokens, each sequence twice in a row: int64 [sequences, 2 * half].

    Args:
        vocabulary: int64 ids to draw from.
        sequences: number of rows.
        half: length of what is repeated.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(vocabulary), (sequences, half), generator=generator)
    return vocabulary[drawn.to(vocabulary.device)].repeat(1, 2)


def look_at_heads(model: GPT, text_BT: Tensor, vocabulary: Tensor) -> Heads:
    """Every head's mean attention to each kind of place.

    Args:
        model: on its device, with `sdpa` attention.
        text_BT: held-out windows; the first few are used.
        vocabulary: ids that random sequences are drawn from.

    Raises:
        RunError: the model's attention cannot be caught.
    """
    natural_L3H, _ = observe(model, text_BT[:SEQUENCES], _natural)
    ids_BT = repeated(vocabulary, SEQUENCES, text_BT.shape[1] // 2, seed=0)
    induction_LH, hidden = observe(model, ids_BT, _induction)
    logits = model.logits(hidden[:, :-1].float())
    nats = F.cross_entropy(logits.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    half = ids_BT.shape[1] // 2
    rows = torch.cat((natural_L3H, induction_LH.unsqueeze(1)), dim=1).transpose(1, 2).tolist()
    return Heads(
        heads=[
            Head(i, h, previous, induction, first, own)
            for i, heads in enumerate(rows)
            for h, (previous, first, own, induction) in enumerate(heads)
        ],
        first_pass_nats=nats[:, : half - 1].mean().item(),
        repeat_nats=nats[:, half:].mean().item(),
    )
