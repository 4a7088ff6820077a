"""Text with a short code for each frequent word, which Brotli would pay a longer pointer for."""

import re
from collections import Counter

from trainer.submission.start import codes

CODED = 400
"""Words with a code; from 300 to 500 the size hardly changes."""
_WORD = re.compile(r"[^\W\d]\w*|[^\x00-\x7f]", re.ASCII)


def shorten(text: str) -> bytes:
    """The coded words, a byte 0xFF (never in UTF-8), and `text` in their terms.

    Codes are the bytes beyond ASCII, so every other character must be a word of its own.

    Raises:
        ValueError: more words and characters need a code than there are codes.
    """
    counts = Counter(_WORD.findall(text))
    foreign = [word for word in counts if not word.isascii()]
    gains = {word: (len(word) - 1) * n for word, n in counts.items() if word.isascii()}
    best = sorted((word for word in gains if len(word) > 2), key=lambda word: -gains[word])
    chosen = sorted([*foreign, *best[: CODED - len(foreign)]], key=lambda word: -counts[word])
    table = dict(zip(chosen, codes(), strict=False))
    if len(table) < len(chosen):
        raise ValueError(f"{len(chosen)} words and characters, but codes for {len(table)} only")
    coded = _WORD.sub(lambda match: table.get(match[0], match[0]), text)
    return " ".join(chosen).encode() + b"\xff" + coded.encode("latin-1")
