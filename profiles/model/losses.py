"""Where the loss lies: by class of the token that is predicted, and by position in the window.

Letters: B windows, T positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from profiles.model.subject import Estimate
from trainer.tokenizer import SPACE_MARK, Tokenizer

CLASSES = ("word start", "word continuation", "digit", "punctuation and space", "byte", "control")


@dataclass(frozen=True)
class Part:
    """One class of tokens, or one range of positions."""

    name: str
    tokens: int
    nats: Estimate
    """Mean loss per token of the part; the error is over windows that have any."""
    share_of_loss: float


def token_class(tokenizer: Tokenizer, token: int) -> str:
    """One of CLASSES: by the piece alone.

    A piece with a letter starts a word if it begins with the space mark and else continues one
    (the first word of a line is counted with these); one with a digit and no letter is a digit.
    """
    model = tokenizer.model
    if model.is_byte(token):
        return "byte"
    if model.is_control(token) or model.is_unused(token) or model.is_unknown(token):
        return "control"
    piece = model.id_to_piece(token)
    if any(c.isalpha() for c in piece):
        return "word start" if piece.startswith(SPACE_MARK) else "word continuation"
    return "digit" if any(c.isdigit() for c in piece) else "punctuation and space"


def classes(tokenizer: Tokenizer) -> Tensor:
    """Index into CLASSES of every token, int64 [V]."""
    return torch.tensor(
        [CLASSES.index(token_class(tokenizer, t)) for t in range(tokenizer.vocab_size)]
    )


def by_class(nats_BT: Tensor, targets_BT: Tensor, classes_V: Tensor) -> list[Part]:
    """Loss of every class that occurs among the targets."""
    of_BT = classes_V.to(targets_BT.device)[targets_BT]
    parts = [(name, of_BT == i) for i, name in enumerate(CLASSES)]
    return [_part(name, nats_BT, chosen) for name, chosen in parts if chosen.any()]


def by_position(nats_BT: Tensor) -> list[Part]:
    """Loss of positions 0, 1, 2-3, 4-7 and so on: as many as there are tokens before."""
    T = nats_BT.shape[1]
    positions_T = torch.arange(T, device=nats_BT.device)
    parts, begin = [], 0
    while begin < T:
        end = min(T, max(1, 2 * begin))
        chosen = ((positions_T >= begin) & (positions_T < end)).expand_as(nats_BT)
        name = str(begin) if end == begin + 1 else f"{begin}-{end - 1}"
        parts.append(_part(name, nats_BT, chosen))
        begin = end
    return parts


def _part(name: str, nats_BT: Tensor, chosen_BT: Tensor) -> Part:
    counts_B = chosen_BT.sum(dim=1)
    sums_B = (nats_BT.double() * chosen_BT).sum(dim=1)
    tokens, total = int(counts_B.sum()), sums_B.sum().item()
    mean = total / tokens
    # A ratio of two sums over windows; its error by linearisation.
    residual_B = (sums_B - mean * counts_B) / (tokens / len(counts_B))
    error = Estimate.of(residual_B).error
    return Part(name, tokens, Estimate(mean, error), total / nats_BT.double().sum().item())
