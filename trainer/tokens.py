"""How many bytes of text a token stands for, which turns nats per token into bits per byte.

A piece counts the UTF-8 length of its text without the leading-space mark, a byte piece 1, a
control (or unused or unknown) piece 0; a leading-space mark adds 1 unless the previous token is
such a control piece, for then it is the tokenizer's own prefix and not text. That is the
contest's rule. Inner space marks are one space, one byte, each.

Summed over a document after its BOS this is the length of its UTF-8 text, exactly, with a
tokenizer trained by `trainer.tokenizer`. One that folds text (the contest's) gives the length of
the folded text, short of characters that it has no piece for.

Letters: V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.tokenizer import SPACE_MARK, Tokenizer


@dataclass(frozen=True)
class TokenBytes:
    """Tables over the vocabulary, each [V] on one device."""

    plain: Tensor
    """int64: bytes without a leading space."""
    leading_space: Tensor
    """bool: the piece begins with the space mark."""
    control: Tensor
    """bool: the piece stands for no text."""

    def count(self, ids: Tensor, previous_ids: Tensor) -> Tensor:
        """Bytes of each token given the one before it: int64, the shape of `ids` (any integers)."""
        ids, previous_ids = ids.long(), previous_ids.long()
        space = self.leading_space[ids] & ~self.control[previous_ids]
        return self.plain[ids] + space

    def to(self, device: torch.device | str) -> "TokenBytes":
        """The same tables on `device`."""
        return TokenBytes(
            self.plain.to(device), self.leading_space.to(device), self.control.to(device)
        )


def token_bytes(tokenizer: Path, vocab_size: int | None = None) -> TokenBytes:
    """Byte tables of the SentencePiece model at `tokenizer`. Raises DataError."""
    opened = Tokenizer(tokenizer, vocab_size)
    model = opened.model
    plain, leading, control = [], [], []
    for token in range(opened.vocab_size):
        silent = model.is_control(token) or model.is_unused(token) or model.is_unknown(token)
        piece = model.id_to_piece(token)
        text = piece.removeprefix(SPACE_MARK).replace(SPACE_MARK, " ")
        control.append(silent)
        leading.append(not silent and piece.startswith(SPACE_MARK))
        plain.append(0 if silent else 1 if model.is_byte(token) else len(text.encode()))
    return TokenBytes(torch.tensor(plain), torch.tensor(leading), torch.tensor(control))
