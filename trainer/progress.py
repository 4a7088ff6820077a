"""Progress of long work: a bar with an ETA on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
PLAIN_LINE_EVERY_S = 10.0


class Advance(Protocol):
    """Callback that moves a progress display on."""

    def __call__(self, amount: float = 1, note: str = "") -> None:
        """Add `amount` of work done; `note` is shown beside the bar."""
        ...


def is_main_process() -> bool:
    """True on rank 0 and in runs without ranks."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def log(message: str) -> None:
    """Print one line, on rank 0 only."""
    if is_main_process():
        print(message, flush=True)


@contextmanager
def progress(label: str, total: float) -> Iterator[Advance]:
    """Show the progress of `total` units of work called `label`; yields the callback.

    Silent on ranks other than 0.
    """
    if not is_main_process():
        yield lambda amount=1, note="": None
    elif sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _Lines(label, total)


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield `items` while showing how many of `total` are done."""
    with progress(label, total) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def _bar(label: str, total: float) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, note="")

        def advance(amount: float = 1, note: str = "") -> None:
            bar.advance(task, amount)
            if note:
                bar.update(task, note=note)

        yield advance


class _Lines:
    """Plain-text progress: one line at most every ten seconds, and one at the end."""

    def __init__(self, label: str, total: float) -> None:
        self.label, self.total = label, total
        self.done = 0.0
        self.started = self.printed = time.monotonic()

    def __call__(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        finished = self.done >= self.total
        if not finished and now - self.printed < PLAIN_LINE_EVERY_S:
            return
        self.printed = now
        elapsed_s = now - self.started
        eta_s = elapsed_s * (self.total - self.done) / self.done if self.done else float("nan")
        state = (
            f"done in {elapsed_s:.1f} s" if finished else f"{elapsed_s:.0f} s, eta {eta_s:.0f} s"
        )
        print(
            f"{self.label}: {self.done:.0f}/{self.total:.0f} ({state}) {note}".rstrip(), flush=True
        )
