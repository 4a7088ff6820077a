"""Bytes of code that count towards the contest's limit: those of the script to be submitted.

Inside that script `trainer/submission/own_size.py` takes this module's place.
"""

import contextlib

from trainer import files
from trainer.errors import RunError
from trainer.submission import pack

CACHE = pack.ROOT / ".cache" / "code-bytes"


def code_bytes() -> int:
    """Size in bytes of the script packed from the present sources.

    Packing takes seconds; sizes are kept by the hash of what decides them.
    """
    record = CACHE / pack.source_digest()
    if record.is_file():
        return int(record.read_text())
    size = len(pack.packed_script())
    with contextlib.suppress(RunError):  # only speed is lost where nothing can be kept
        files.write_text(record, str(size))
    return size
