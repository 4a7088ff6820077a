"""SentencePiece tokenizers: opening, training, text <-> tokens.

Tokenizers trained here keep text as it is (no normalisation, no dropped spaces, bytes for what
has no piece; one space goes before each document and is taken off again), so that every Unicode
text can be encoded and decoded exactly. The contest's tokenizer folds text first (NFKC, runs of
spaces) and has an unknown piece: what it encodes is exact for the folded text only.
"""

import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import sentencepiece

from trainer.errors import DataError

SPACE_MARK = "\u2581"
"""SentencePiece writes a space as this character."""

_PRIVATE_USE = range(0xE000, 0xF900)


class Tokenizer:
    """A SentencePiece model.

    Args:
        path: the `.model` file.
        vocab_size: pieces it must have; None takes any.

    Raises:
        DataError: missing or damaged model, another size, no BOS piece, ids beyond 16 bits.
    """

    def __init__(self, path: Path, vocab_size: int | None = None) -> None:
        if not path.is_file():
            raise DataError(
                f"no tokenizer at {path}. `python -m trainer.fetch --out {path.parent}` brings it."
            )
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{path} is not a SentencePiece model ({error}). Delete it and fetch it again."
            ) from error
        self.path = path
        self.vocab_size: int = self.model.get_piece_size()
        self.bos_id: int = self.model.bos_id()
        if vocab_size is not None and self.vocab_size != vocab_size:
            raise DataError(
                f"{path} has {self.vocab_size} pieces, the model expects {vocab_size}. Set "
                f"model.vocab_size to {self.vocab_size} or use another tokenizer and its shards."
            )
        if self.bos_id < 0 or self.vocab_size > 1 << 16:
            raise DataError(
                f"{path} has {self.vocab_size} pieces and BOS {self.bos_id}; shards need a BOS "
                "piece and at most 65,536 pieces. Train a tokenizer with them."
            )

    def encode_documents(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """BOS and the tokens of each text; `threads` texts at once.

        Raises:
            DataError: a text holds a lone surrogate, which UTF-8 cannot express.
        """
        try:
            return self._encode(texts, threads)
        except UnicodeEncodeError as error:
            raise DataError(
                f"text with a lone surrogate ({error.object[error.start]!r}) is not Unicode text. "
                "Replace it in the source."
            ) from error

    def encode(self, text: str) -> list[int]:
        """BOS and the tokens of one text. Raises DataError."""
        return self.encode_documents([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Control pieces give nothing; broken UTF-8 gives U+FFFD.

        A space right after a control piece is the tokenizer's own prefix and left out.
        """
        return b"".join(self.text_bytes(ids)).decode(errors="replace")

    def text_bytes(self, ids: Iterable[int]) -> list[bytes]:
        """The UTF-8 bytes each token adds to the text; a byte piece adds part of a character."""
        parts: list[bytes] = []
        at_start = False
        for token in ids:
            surface = self._surfaces[token]
            parts.append(surface.removeprefix(b" ") if at_start else surface)
            at_start = self.model.is_control(token)
        return parts

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        # A space mark in the text itself would be taken for a space. It goes through as a
        # character without a piece, whose byte pieces are then exchanged for the mark's own.
        if not self._mark_bytes or not any(SPACE_MARK in text for text in texts):
            utf8 = [text.encode() for text in texts]
            return self.model.encode(utf8, add_bos=True, num_threads=threads)
        return [self._encode_marked(text) for text in texts]

    def _encode_marked(self, text: str) -> list[int]:
        present = set(text)
        stand_in = next(chr(code) for code in _PRIVATE_USE if chr(code) not in present)
        ids = self.model.encode(text.replace(SPACE_MARK, stand_in).encode(), add_bos=True)
        wanted = self._byte_ids(stand_in)
        out: list[int] = []
        for token in ids:
            out.append(token)
            if out[-len(wanted) :] == wanted:
                out[-len(wanted) :] = self._mark_bytes
        return out

    @cached_property
    def _mark_bytes(self) -> list[int]:
        """Byte pieces of the space mark; empty in a model without byte pieces."""
        return self._byte_ids(SPACE_MARK)

    def _byte_ids(self, character: str) -> list[int]:
        ids = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
        return ids if all(self.model.is_byte(token) for token in ids) else []

    @cached_property
    def _surfaces(self) -> list[bytes]:
        return [self._surface(token) for token in range(self.vocab_size)]

    def _surface(self, token: int) -> bytes:
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self.model.is_control(token) or self.model.is_unused(token):
            return b""
        if self.model.is_unknown(token):
            return "\N{REPLACEMENT CHARACTER}".encode()
        return piece.replace(SPACE_MARK, " ").encode()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-fallback BPE model on `texts`; returns the model file's bytes.

    One thread and no sampling: same texts, same model. Pieces 0-3 are pad, BOS, EOS and unknown,
    as in the contest's tokenizer.

    Raises:
        DataError: too little text for so many pieces.
    """
    lines = (line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9999,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            max_sentence_length=1 << 16,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"cannot train a tokenizer of {vocab_size} pieces on this text ({error}). "
            "Give more text or a smaller vocabulary."
        ) from error
    return model.getvalue()
