"""How the packed `train_gpt.py` starts; `trainer.submission.pack` fills in the two constants.

The sources are unpacked once, into a hidden folder beside the script: Triton, torch.compile and
the CUDA compiler all want to read them. Arguments are those of `python -m trainer`; with
`-m MODULE` in front, those of another command of ours.
"""

import hashlib
import importlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import brotli

PAYLOAD = ""
"""Compressed archive, as the digits of a number."""
DIGEST = ""
"""SHA-256 of PAYLOAD in Latin-1."""
DIGITS = [chr(code) for code in range(256) if code not in b"\0\n\r\\'"]
"""Characters of Latin-1 that may stand in a string literal as they are."""


def codes() -> list[str]:
    """What stands for a frequent word: one or two characters from the upper half of Latin-1."""
    upper = [chr(code) for code in range(128, 256)]
    return upper[:-3] + [first + second for first in upper[-3:] for second in upper]


def number(digits: str) -> bytes:
    """The bytes of a number, highest first, from its digits."""
    values = {digit: value for value, digit in enumerate(DIGITS)}
    total = 0
    for digit in digits:
        total = total * len(DIGITS) + values[digit]
    return total.to_bytes((total.bit_length() + 7) // 8, "big")


def restore(data: bytes) -> str:
    """The text of which `trainer.submission.words` made `data`."""
    words, _, text = data.partition(b"\xff")
    table = dict(zip(codes(), words.decode().split(" "), strict=False))
    return re.sub("[\x80-\xfc]|[\xfd-\xff].", lambda m: table[m[0]], text.decode("latin-1"))


def unpack(script: Path) -> Path:
    """The folder of unpacked sources. Several ranks may come here at once. Raises OSError."""
    if hashlib.sha256(PAYLOAD.encode("latin-1")).hexdigest() != DIGEST:
        sys.exit(f"error: {script} was changed on its way here; copy it again, byte by byte")
    folder = script.parent / f".fairway-{DIGEST[:16]}"
    if folder.is_dir():
        return folder
    partial = Path(tempfile.mkdtemp(prefix=".fairway-", dir=script.parent))
    fields = restore(brotli.decompress(number(PAYLOAD))).split("\0")
    for name, text in zip(fields[::2], fields[1::2], strict=True):
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    partial.chmod(0o755)
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
        if not folder.is_dir():  # another rank was not simply faster
            raise
    return folder


def start() -> int:
    """Unpack, then run the command; returns its exit status."""
    script = Path(__file__).resolve()
    try:
        folder = unpack(script)
    except OSError as error:
        sys.exit(f"error: {script.name} unpacks beside itself, which failed ({error}). Copy it to "
                 "a folder that can be written.")  # fmt: skip
    sys.path.insert(0, str(folder))
    os.environ.setdefault("FAIRWAY_COMMIT", f"packed-{DIGEST[:16]}")
    module = "trainer.__main__"
    if sys.argv[1:2] == ["-m"] and len(sys.argv) > 2:
        module = sys.argv[2]
        del sys.argv[1:3]
    setattr(importlib.import_module("trainer.codesize"), "SCRIPT", script)  # noqa: B010 - own_size
    return importlib.import_module(module).main()


if __name__ == "__main__":
    sys.exit(start())
