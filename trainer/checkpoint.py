"""Training state on disk: one safetensors file, written whole or not at all.

Tensors are named `model.*`, `optim.*` and `average.*`; counters lie as JSON in the metadata.
"""

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer import files
from trainer.errors import RunError

FORMAT = "1"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by group and the JSON-able counters of a moment in training."""

    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    average: dict[str, Tensor]
    counters: dict[str, Any]


GROUPS = ("model", "optim", "average")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Raises RunError when it cannot be written."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.atomic_path(path) as partial:
        try:
            save_file(contiguous, str(partial), metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path` atomically. Raises RunError."""
    tensors = {
        f"{group}.{name}": tensor
        for group in GROUPS
        for name, tensor in getattr(checkpoint, group).items()
    }
    counters = json.dumps(checkpoint.counters)
    save_tensors(path, tensors, {"format": FORMAT, "counters": counters})


def load(path: Path) -> Checkpoint:
    """Read a checkpoint back.

    Raises:
        RunError: it is missing, damaged or of another format.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise RunError(
            f"{path} has checkpoint format {metadata.get('format')}, this code reads {FORMAT}; "
            "start the run anew"
        )
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    return Checkpoint(**groups, counters=json.loads(metadata["counters"]))


class BackgroundWriter:
    """Writes checkpoints on a thread, so that training waits only for the copy to the host."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(self, checkpoint: Checkpoint) -> None:
        """Copy the tensors to the host and start writing. Raises an earlier write's RunError."""
        self.wait()
        host = Checkpoint(
            *({k: _to_host(v) for k, v in getattr(checkpoint, group).items()} for group in GROUPS),
            counters=checkpoint.counters,
        )
        self._thread = threading.Thread(target=self._write, args=(host,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last write is on disk. Raises its RunError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            save(self.path, checkpoint)
        except Exception as error:  # raised again in the training thread, by wait()
            self._error = error


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the host that later training steps do not change."""
    return tensor.detach().to("cpu", copy=True) if tensor.is_cuda else tensor.detach().clone()
