"""How the packed `train_gpt.py` starts; `trainer.submission.pack` fills in the two constants.

The sources are unpacked once, into a hidden folder beside the script: Triton, torch.compile and
the CUDA compiler all want to read them. Arguments are those of `python -m trainer`; with
`-m MODULE` in front, those of another command of ours.
"""

import hashlib
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import brotli

PAYLOAD = ""
"""Brotli-compressed archive, a character a byte."""
DIGEST = ""
"""SHA-256 of the archive."""


def unpack(script: Path) -> Path:
    """The folder of unpacked sources. Several ranks may come here at once. Raises OSError."""
    data = PAYLOAD.encode("latin-1")
    if hashlib.sha256(data).hexdigest() != DIGEST:
        sys.exit(f"error: {script} was changed on its way here; copy it again, byte by byte")
    folder = script.parent / f".fairway-{DIGEST[:16]}"
    if folder.is_dir():
        return folder
    partial = Path(tempfile.mkdtemp(prefix=".fairway-", dir=script.parent))
    fields = brotli.decompress(data).decode().split("\0")
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
