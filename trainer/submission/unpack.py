"""What the packed script does once started: it unpacks its sources and runs the command.

The sources are unpacked once, into a hidden folder beside the script: Triton, torch.compile and
the CUDA compiler all want to read them.
"""

import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from trainer.submission.mixing import decode


def unpack(script: Path, archive: bytes, name: str) -> Path:
    """The folder of unpacked sources, named after `name`. The first time takes some seconds.

    Several ranks may come here at once.

    Raises:
        OSError: nothing can be written beside the script.
    """
    folder = script.parent / f".fairway-{name}"
    if folder.is_dir():
        return folder
    partial = Path(tempfile.mkdtemp(prefix=".fairway-", dir=script.parent))
    fields = decode(archive).split("\0")
    for target, text in zip(fields[::2], fields[1::2], strict=True):
        path = partial / target
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


def start(script: Path, archive: bytes, name: str) -> int:
    """Unpack, then run the command; returns its exit status."""
    try:
        folder = unpack(script, archive, name)
    except OSError as error:
        sys.exit(f"error: {script.name} unpacks beside itself, which failed ({error}). Copy it to "
                 "a folder that can be written.")  # fmt: skip
    sys.path.insert(0, str(folder))
    os.environ.setdefault("FAIRWAY_COMMIT", f"packed-{name}")
    module = "trainer.__main__"
    if sys.argv[1:2] == ["-m"] and len(sys.argv) > 2:
        module = sys.argv[2]
        del sys.argv[1:3]
    setattr(importlib.import_module("trainer.codesize"), "SCRIPT", script)  # noqa: B010 - own_size
    return importlib.import_module(module).main()
