"""Held-out text, behind a gate that is open for scoring alone.

The gate is the only way to it. While a run is under way every opening of a validation
file by Python code of this process, whoever asks for it, passes an audit hook (PEP 578): outside
the stages that score, it is refused and the run stops; the openings of each stage are counted in
its result. The gate keeps no tokens, so that a later stage cannot come by them without opening
the files again. Stage `data` may open them: it reads the number of tokens off their headers.

Letters: N tokens.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import SlotMode
from trainer.corpus import DataFolder
from trainer.errors import DataError, RunError
from trainer.shards import check_header

OPENINGS = "validation_openings"
"""Key of a stage's result: how often it opened a file of the validation split."""

CLOSED_STAGES = ("train", "calibrate", "hessians", "quantize", "artifact")
"""Stages that make the artifact, without a look at held-out text."""

MODE_STAGES: dict[SlotMode, str] = {
    "off": "sliding",
    "context": "slot_context",
    "shared": "slot_shared",
}
"""The stage that scores in each SLOT mode."""

OPEN_STAGES = ("data", "post_ema", "round_trip", *MODE_STAGES.values(), "causality")


class ValidationGate:
    """The only way from a run to its held-out text.

    Args:
        data: of the run; only the headers of its validation shards are read here.
        seq_len: tokens in a window.
        max_tokens: score only the first tokens.

    Raises:
        DataError: damaged headers, or less than one window of `seq_len` + 1 tokens.
    """

    def __init__(self, data: DataFolder, seq_len: int, max_tokens: int | None) -> None:
        self._data, self._seq_len, self._max_tokens = data, seq_len, max_tokens
        held = sum(check_header(path) for path in data.val_paths)
        held = held if max_tokens is None else min(held, max_tokens)
        if held < seq_len + 1:
            raise DataError(
                f"the validation split of {data.dir} has {held} tokens to score, less than one "
                f"window of {seq_len} + 1. Hold out more text, score more tokens or use a smaller "
                "model.seq_len."
            )
        self._files = {_identity(path) for path in data.val_paths}
        self._stage, self._openings = "set-up", 0

    def tokens(self) -> np.ndarray:
        """The held-out tokens, uint16 [N]. Raises DataError; RunError in a stage that may not."""
        return self._data.val(self._seq_len, self._max_tokens)

    def during(self, stage: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Result of `work`, done as stage `stage`, with its count of openings added."""
        self._stage, self._openings = stage, 0
        try:
            return {**work(), OPENINGS: self._openings}
        finally:
            self._stage = "set-up"

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch, and where need be refuse, every opening of the files until the block ends."""
        _install_hook()
        _gates.append(self)
        try:
            yield
        finally:
            _gates.remove(self)

    def note(self, file: object) -> None:
        """Count an opening of `file`, if it is one of ours. Raises RunError: not in this stage."""
        if not isinstance(file, str | bytes | os.PathLike):
            return
        try:
            ours = _identity(Path(os.fsdecode(file))) in self._files
        except (OSError, ValueError):  # no such file: whoever opens it will hear
            return
        if not ours:
            return
        if self._stage not in OPEN_STAGES:
            raise RunError(
                f"stage {self._stage} tried to open held-out text ({os.fsdecode(file)}). "
                "Validation data may be read in scoring stages alone: a run that reads it earlier "
                "has no legal score."
            )
        self._openings += 1


_gates: list[ValidationGate] = []
_hook_installed = False


def _install_hook() -> None:
    """Audit hooks last as long as the process, so one is enough."""
    global _hook_installed
    if not _hook_installed:
        sys.addaudithook(_audit)
        _hook_installed = True


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        for gate in _gates:
            gate.note(arguments[0])


def _identity(path: Path) -> tuple[int, int]:
    """Tells a file whatever it is called: links to it count as well."""
    status = path.stat()
    return status.st_dev, status.st_ino
