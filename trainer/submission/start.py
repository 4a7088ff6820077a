"""How the packed `train_gpt.py` starts; `trainer.submission.pack` fills in the three constants.

Arguments are those of `python -m trainer`; with `-m MODULE` in front, those of another command of
ours.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import brotli

PROGRAM = ""
"""Source of `trainer.submission.unpack` and what it needs, by Brotli, as the digits of a number."""
ARCHIVE = ""
"""All sources, as `trainer.submission.coding` encodes them, as the digits of a number."""
DIGEST = ""
"""SHA-256 of PROGRAM and ARCHIVE in Latin-1."""
DIGITS = [chr(code) for code in range(256) if code not in b"\0\n\r\\'"]
"""Characters of Latin-1 that may stand in a string literal as they are."""


def number(digits: str) -> bytes:
    """The bytes of a number, highest first, from its digits."""
    values = {digit: value for value, digit in enumerate(DIGITS)}
    total = 0
    for digit in digits:
        total = total * len(DIGITS) + values[digit]
    return total.to_bytes((total.bit_length() + 7) // 8, "big")


def program() -> dict[str, Any]:
    """Names of PROGRAM, loaded. Exits if this file is not the one that was packed."""
    if hashlib.sha256((PROGRAM + ARCHIVE).encode("latin-1")).hexdigest() != DIGEST:
        sys.exit(f"error: {__file__} was changed on its way here; copy it again, byte by byte")
    names: dict[str, Any] = {}
    exec(brotli.decompress(number(PROGRAM)), names)
    return names


if __name__ == "__main__":
    sys.exit(program()["start"](Path(__file__).resolve(), number(ARCHIVE), DIGEST[:16]))
