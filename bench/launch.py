"""Processes that the multi-GPU benches start: one a rank, under torchrun."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
QUIET_END_S = 60.0
"""Patience for processes that were asked to end."""
TICK_S = 0.5


@dataclass(frozen=True)
class Child:
    """A process to run.

    Attributes:
        name: for people.
        command: as `command` makes it.
        log: file for its output.
        visible_gpus: CUDA_VISIBLE_DEVICES, if not all.
    """

    name: str
    command: list[str]
    log: Path
    visible_gpus: str | None = None


def command(world_size: int, *arguments: str) -> list[str]:
    """`python -m ARGUMENTS` on `world_size` ranks of this machine."""
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", "-m")
    return [sys.executable, "-m", *(launcher if world_size > 1 else ()), *arguments]


def start(
    command: list[str], log: Path, visible_gpus: str | None = None
) -> "subprocess.Popen[bytes]":
    """Start `command` in a session of its own; everything it prints goes to `log`.

    Args:
        command: as `command` makes it.
        log: file for its output; earlier content is kept.
        visible_gpus: CUDA_VISIBLE_DEVICES, if not all.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    # As many host threads in every process, however many there are: torchrun would choose.
    environment.setdefault("OMP_NUM_THREADS", "1")
    if visible_gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible_gpus
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run_together(children: Sequence[Child], limit_s: float) -> None:
    """Run processes side by side to their ends.

    Raises:
        RunError: not all are done after `limit_s`, or one failed (with the last lines of its log).
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for child in children:
            processes.append(start(child.command, child.log, child.visible_gpus))
        started = time.monotonic()
        while any(process.poll() is None for process in processes):
            time.sleep(TICK_S)
            if time.monotonic() - started > limit_s:
                names = ", ".join(child.name for child in children)
                raise RunError(f"{names}: not done in {limit_s:.0f} s")
    finally:
        for process in processes:
            stop(process)
    for child, process in zip(children, processes, strict=True):
        if process.returncode:
            status = f"{child.name} ended with status {process.returncode}"
            raise RunError(f"{status}:\n{tail(child.log)}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process that `start` started, and its ranks, which are in other sessions."""
    if process.poll() is not None:
        return
    for pid in [*_children(process), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpgid(pid), signal.SIGKILL)
    process.wait(QUIET_END_S)


def _children(process: "subprocess.Popen[bytes]") -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def rank_pid(process: "subprocess.Popen[bytes]", world_size: int, rank: int) -> int:
    """Process id of a rank. Raises RunError when it cannot be found."""
    if world_size == 1:
        return process.pid
    for pid in _children(process):
        if f"LOCAL_RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise RunError(f"torchrun (process {process.pid}) has no child that is rank {rank}")


def wait(process: "subprocess.Popen[bytes]", limit_s: float) -> float:
    """Seconds until `process` has ended. Raises RunError after `limit_s`, and ends it."""
    started = time.monotonic()
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired as error:
        stop(process)
        raise RunError(f"{process.args} did not end within {limit_s:.0f} s") from error
    return time.monotonic() - started


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def default_preset() -> list[str]:
    """The preset that suits this machine, without the second compilation of late QAT."""
    if torch.cuda.is_available():
        return ["record", "--train.late-qat=off", "--train.priming-steps=3"]
    return ["smoke"]
