"""How much each token of a text surprises a model, and the text cut where it can be shown.

Letters: N tokens, S scored positions of a batch, V vocabulary.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.config import EvalConfig
from trainer.model import GPT
from trainer.scoring import scored_batches
from trainer.tokenizer import Tokenizer
from trainer.windows import plan_windows

WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class Surprise:
    """What one token cost, given those before it."""

    nats: float
    """-ln of its probability (at temperature 1)."""
    rank: int
    """1: the model's first guess."""


@dataclass(frozen=True)
class Token:
    """One token of a shown text."""

    name: str
    """Its piece in the vocabulary."""
    surprise: Surprise | None
    """None for the first token, which nothing predicts."""


@dataclass(frozen=True)
class Piece:
    """Tokens whose bytes are whole characters only together: mostly one."""

    text: str
    tokens: tuple[Token, ...]
    given: bool
    """Whether it was given to the model, and not written by it."""

    @property
    def nats(self) -> float | None:
        """Surprise of all its tokens together; None where nothing predicts them."""
        known = [token.surprise.nats for token in self.tokens if token.surprise is not None]
        return sum(known) if known else None


def surprises(model: GPT, ids: Sequence[int]) -> list[Surprise]:
    """Surprise of every token after the first, from one pass over whole windows.

    A text beyond the model's window is read through windows that overlap by half, so that every
    token is predicted from at least half a window.

    Raises:
        ConfigError: fewer than two tokens.
    """
    seq_len = model.config.seq_len
    config = EvalConfig(stride=max(1, seq_len // 2), batch_windows=WINDOWS_AT_ONCE)
    windows = plan_windows(len(ids) - 1, seq_len, config.stride)
    nats_N, ranks_N = np.empty(len(ids) - 1), np.empty(len(ids) - 1, dtype=np.int64)
    for batch in scored_batches(model, np.array(ids), windows, config, "off"):
        log_shares_SV = batch.logits_SV.log_softmax(-1)
        own_S1 = log_shares_SV.gather(-1, batch.targets_S.unsqueeze(-1))
        at_S = batch.target_indices_S.cpu().numpy()
        nats_N[at_S] = -own_S1.squeeze(-1).cpu().numpy()
        ranks_N[at_S] = 1 + (log_shares_SV > own_S1).sum(-1).cpu().numpy()
    return [Surprise(float(n), int(r)) for n, r in zip(nats_N, ranks_N, strict=True)]


def mean_nats(pieces: Sequence[Piece], *, given: bool) -> float:
    """Mean surprise of the tokens that were given, or of those that were written; NaN if none."""
    nats = [
        token.surprise.nats
        for piece in pieces
        if piece.given == given
        for token in piece.tokens
        if token.surprise is not None
    ]
    return sum(nats) / len(nats) if nats else float("nan")


def cut(
    tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[Surprise], given: int
) -> list[Piece]:
    """The text of `ids` as pieces of whole characters.

    Args:
        tokenizer: of the ids.
        ids: N tokens.
        found: the surprise of ids[1:], as `surprises` gives it.
        given: how many of the first tokens were given to the model.
    """
    parts = tokenizer.text_bytes(ids)
    names = [tokenizer.model.id_to_piece(token) for token in ids]
    # Control tokens and the tokenizer's own space stand for no text: their names are shown.
    shown = [part or name.encode() for part, name in zip(parts, names, strict=True)]
    known: list[Surprise | None] = [None, *found]
    pieces: list[Piece] = []
    # Given and written tokens never share a piece.
    for begin, end in ((0, given), (given, len(ids))):
        for first, last in whole_characters(shown[begin:end]):
            at = range(begin + first, begin + last)
            text = b"".join(shown[at.start : at.stop]).decode(errors="replace")
            tokens = tuple(Token(names[i], known[i]) for i in at)
            pieces.append(Piece(text, tokens, given=end == given))
    return pieces


def whole_characters(parts: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Ranges first..last-1 of `parts` that are whole characters only together.

    What is broken, or cut off at the end, is a range of its own.
    """
    first = 0
    for i, part in enumerate(parts):
        state = _state(b"".join(parts[first : i + 1]))
        if state == "broken" and i > first:
            yield first, i
            first, state = i, _state(part)
        if state != "open":
            yield first, i + 1
            first = i + 1
    if first < len(parts):
        yield first, len(parts)


def _state(data: bytes) -> Literal["whole", "open", "broken"]:
    """Whether `data` is UTF-8 text, the beginning of such, or neither."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return "broken"
    return "open" if decoder.getstate()[0] else "whole"
