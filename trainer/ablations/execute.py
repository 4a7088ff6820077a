"""Runs, one after another, each as its own `python -m trainer`.

A process each, because the command in the table is then the very one that was executed, memory
and compiled state of one run cannot touch the next, and a run that dies takes nothing with it.
What a process costs over a shared one is start-up: compiled kernels lie in torch's cache on disk,
which equal shapes find again either way (in one process, torch.compile would trace every new
model anew as well).
"""

import fcntl
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer import files
from trainer.__main__ import parse
from trainer.ablations.rows import Run
from trainer.ablations.share import take_over
from trainer.config import RunConfig
from trainer.errors import ConfigError, RunError
from trainer.folder import RunFolder
from trainer.progress import log

Launch = Callable[[list[str]], int]
"""Runs `python -m trainer` with arguments; returns the exit status."""

Result = dict[str, Any]
"""Of a finished run: name, command, seed, and stage results by name, without long lists."""


class Stopped(Exception):  # noqa: N818 - not an error: the same command goes on
    """A signal stopped the run in progress."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@dataclass(frozen=True)
class Common:
    """What all runs of a folder have alike."""

    out: Path
    preset: str
    seed: int
    overrides: tuple[str, ...]

    def arguments(self, run: Run) -> list[str]:
        """Arguments of the `python -m trainer` that makes `run` alone, sharing nothing.

        Later overrides win: the user's over the common ones, the run's over both.
        """
        seed = str(self.seed + run.seed_offset)
        return [self.preset, "--seed", seed, *self.overrides, *run.overrides]

    def folder(self, name: str) -> RunFolder:
        """The run folder of a run."""
        return RunFolder(self.out / "runs" / name)

    def config(self, run: Run) -> RunConfig:
        """Settings of `run`, in its folder. Raises ConfigError; tyro ends a wrong override."""
        _, config = parse(self.arguments(run))
        return replace(config, out=self.out / "runs", name=run.name)


def finished(common: Common, run: Run) -> Result | None:
    """The stored result of a run; None when it has to be done."""
    path = _result_path(common, run)
    return json.loads(path.read_text()) if path.exists() else None


def execute(common: Common, run: Run, launch: Launch) -> Result | None:
    """Bring `run` to its end, from wherever an earlier try left it, and store its result.

    Returns:
        The result; None when the run failed (it has said why).

    Raises:
        Stopped: a signal came.
        RunError: its folder cannot be written.
    """
    folder = common.folder(run.name)
    if not (folder.path / "config.json").exists() and run.source is not None:
        take_over(common.folder(run.source), run, common.config(run), common.preset)
    if (folder.path / "config.json").exists():
        arguments = ["--resume", str(folder.path)]
    else:
        where = ["--out", str(folder.path.parent), "--name", run.name]
        arguments = [*common.arguments(run), *where]
    log(f"\n=== {run.name}: python -m trainer {shlex.join(arguments)}")
    if launch(arguments) != 0:
        return None
    result = {
        "name": run.name,
        "command": "python -m trainer " + shlex.join(common.arguments(run)),
        "seed": common.seed + run.seed_offset,
        "source": run.source,
        "environment": json.loads((folder.path / "environment.json").read_text()),
        "stages": _stage_results(folder),
    }
    files.write_json(_result_path(common, run), result)
    return result


def _result_path(common: Common, run: Run) -> Path:
    return common.out / "results" / f"{run.name}.json"


def _stage_results(folder: RunFolder) -> dict[str, dict[str, Any]]:
    paths = sorted((folder.path / "stages").glob("*.json"))
    read = {path.stem: json.loads(path.read_text()) for path in paths}
    return {
        stage: {k: v for k, v in values.items() if not isinstance(v, list | dict)}
        for stage, values in read.items()
    }


@contextmanager
def launcher(out: Path) -> Iterator[Launch]:
    """Launches runs as processes, alone in `out`: a run that outlived its harness counts too.

    SIGINT and SIGTERM go on to the run, which writes a checkpoint if it is training.

    Raises:
        ConfigError: another harness, or a run that it left behind, is at work in `out`.
        RunError: `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise RunError(f"cannot write into {out}: {error.strerror}. Use another --out.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another harness, or a run it left behind, is at work in {out}. Wait for it, end "
                "it, or use another --out."
            ) from error

        def launch(arguments: list[str]) -> int:
            # The run inherits the lock, and holds it should this process be killed.
            process = subprocess.Popen(
                [sys.executable, "-m", "trainer", *arguments],
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )
            return _wait(process)

        yield launch


def _wait(process: "subprocess.Popen[bytes]") -> int:
    received = 0

    def forward(number: int, frame: object) -> None:
        nonlocal received
        received = number
        process.send_signal(number)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise Stopped(received)
    return status
