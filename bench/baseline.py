"""Make this machine's baseline from several processes: `python -m bench.baseline`.

    python -m bench.baseline [--processes 3] [--budget-s 0.25] [--subjects EXPRESSION]

Each process is a `pytest bench` of its own, because processes differ as wholes. Every subject is
stored as soon as it is measured, so a run that is cut short keeps what it has; --extend goes on
from there.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.baseline`."""

    processes: int = 3
    """Processes to measure in."""
    budget_s: float = 0.25
    """Seconds of one measurement of one subject (at least two rounds are made)."""
    subjects: str | None = None
    """Only subjects that match, as for pytest's -k."""
    extend: bool = False
    """Add the processes to the baseline there is, instead of replacing it."""


def command(arguments: Arguments, number: int) -> list[str]:
    """The pytest call of process `number`; the first one replaces the old baseline."""
    mode = "--extend-baseline" if arguments.extend or number else "--update-baseline"
    chosen = [] if arguments.subjects is None else ["-k", arguments.subjects]
    quiet = ("-q", "--benchmark-disable-gc", "--benchmark-columns=median", "-p", "no:cacheprovider")
    pytest = (sys.executable, "-m", "pytest", "bench")
    return [*pytest, *quiet, mode, f"--budget-s={arguments.budget_s}", *chosen]


def main(argv: list[str] | None = None) -> int:
    """Measure in one process after the other; exit status 1 if any of them failed."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    if arguments.processes < 1:
        print("error: --processes must be at least 1", file=sys.stderr)
        return 2
    failed: list[int] = []
    started = time.monotonic()
    for number in range(arguments.processes):
        print(f"process {number + 1} of {arguments.processes}", flush=True)
        if subprocess.run(command(arguments, number), cwd=ROOT, check=False).returncode:
            failed.append(number + 1)
        print(f"{time.monotonic() - started:.0f} s so far", flush=True)
    if failed:
        numbers = ", ".join(map(str, failed))
        print(f"error: process {numbers} failed; what it measured is kept", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
