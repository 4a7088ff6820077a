"""The record's training step on one GPU, path by path: time, memory, seconds to the first step.

    python -m bench.step_time --out step_time.json

Every path is the same training; they differ in implementations chosen by name. A path is a child
process of its own first, which tells how long a start takes (compilers' caches empty, then full);
then all paths are timed in turn in one process, with real random tokens.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench.paths import PATHS, Choice, unknown
from bench.scale import current
from bench.stopwatch import time_interleaved
from kernels import flash4_package
from trainer import compiling, environment, files
from trainer.average import Averages
from trainer.errors import ConfigError, FairwayError, RunError
from trainer.optim import Optimizer

SETS = 2


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.step_time`."""

    out: Path
    """JSON file for the results."""
    paths: tuple[str, ...] = tuple(name for name, c in PATHS.items() if c.attention != "flash4")
    """Paths to time; without a name, all but those that need a package of their own."""
    rounds: int = 50
    """Measured steps of each."""
    starts: tuple[str, ...] | None = None
    """Those whose time to the first step is measured too, in two processes each; none: all."""


def check(arguments: Arguments) -> None:
    """Raise ConfigError for paths that do not exist or cannot be measured."""
    starts = _starts(arguments)
    if strange := unknown({*arguments.paths, *starts}):
        raise ConfigError(f"no path {', '.join(strange)}; choose of {', '.join(PATHS)}")
    untimed = sorted(set(starts) - set(arguments.paths))
    if untimed:
        raise ConfigError(f"--starts {', '.join(untimed)}: name it in --paths too")
    if arguments.rounds < 2:
        raise ConfigError("--rounds must be at least 2")
    if not torch.cuda.is_available():
        raise ConfigError("bench.step_time needs a CUDA GPU; torch finds none")


def _starts(arguments: Arguments) -> tuple[str, ...]:
    return arguments.paths if arguments.starts is None else arguments.starts


def subjects(path: Choice) -> dict[str, Callable[[int], object]]:
    """Forward and backward of a micro-step; and a whole step with optimizer and EMA."""
    scale = path.scale()
    model = scale.model(scale.config.mlp)
    loss_of: Any = compiling.compiled(model.loss)
    optimizer = Optimizer(model, scale.config.optim, scale.dtype)
    averages = Averages(model, scale.config.train)
    batches = [(scale.ids(scale.windows), scale.ids(scale.windows)) for _ in range(SETS)]

    def forward_backward(number: int) -> None:
        optimizer.zero_grad()
        loss_of(*batches[number % SETS]).backward()

    def whole(number: int) -> None:
        forward_backward(number)
        optimizer.step(0.0, 0.95)
        averages.update_ema(scale.config.train.ema_decay)

    return {"forward+backward": forward_backward, "with optimizer and EMA": whole}


def first_step(path: Choice) -> dict[str, float]:
    """Seconds from here to the end of the first step, and peak memory of three steps."""
    started = time.perf_counter()
    step = subjects(path)["with optimizer and EMA"]
    step(0)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    for number in range(2):
        step(number)
    torch.cuda.synchronize()
    return {"seconds": seconds, "peak_bytes": float(torch.cuda.max_memory_allocated())}


def start(name: str, cache: Path) -> dict[str, float]:
    """`first_step` in a process of its own whose compilers cache under `cache`. Raises RunError."""
    settings = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        flash4_package.CACHE_FOLDER: str(cache / "flash4"),
    }
    command = [sys.executable, "-m", "bench.step_time", "--child", name]
    result = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RunError(f"the start of path {name!r} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(arguments: Arguments) -> dict[str, Any]:
    """All figures, JSON-able. Raises RunError when a path fails to start."""
    results: dict[str, Any] = {name: {} for name in arguments.paths}
    for name in _starts(arguments):
        with tempfile.TemporaryDirectory(prefix="fairway-start-") as folder:
            results[name]["start, caches empty"] = start(name, Path(folder))
            results[name]["start, caches full"] = start(name, Path(folder))
    made = {name: subjects(PATHS[name]) for name in arguments.paths}
    for kind in ("forward+backward", "with optimizer and EMA"):
        times = time_interleaved(
            {name: parts[kind] for name, parts in made.items()},
            rounds=arguments.rounds,
            warm_up_rounds=5,
            device=current().device.type,
        )
        for name, timing in times.items():
            results[name][kind] = timing.as_json()
    return results


def show(results: dict[str, Any]) -> None:
    """The results as a table."""
    table = Table(title="one micro-step of the record, ms")
    headings = ("path", "forward+backward", "p10-p90", "with optimizer", "peak GB", "first start s",
                "second start s")  # fmt: skip
    for heading in headings:
        table.add_column(heading)
    for name, row in results.items():
        step, whole = row["forward+backward"], row["with optimizer and EMA"]
        cold, warm = row.get("start, caches empty"), row.get("start, caches full")
        table.add_row(
            name,
            f"{step['median_ms']:.2f}",
            f"{step['p10_ms']:.2f}-{step['p90_ms']:.2f}",
            f"{whole['median_ms']:.2f}",
            f"{cold['peak_bytes'] / 1e9:.1f}" if cold else "",
            f"{cold['seconds']:.0f}" if cold else "",
            f"{warm['seconds']:.0f}" if warm else "",
        )
    Console(width=140).print(table)


def main() -> int:
    """Measure and print; or, for the child process, print one start's figures."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(first_step(PATHS[sys.argv[2]])))
        return 0
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        check(arguments)
        results = measure(arguments)
        files.write_json(arguments.out, {"environment": environment.describe(), "paths": results})
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
