"""The record's ablations, each against one base run at equal steps.

    python -m trainer.ablations --out FOLDER
    python -m trainer.ablations --out FOLDER --rows int5 int6 lzma --seeds 2
    python -m trainer.ablations --out FOLDER --steps 300 --train.sequences-per-step 96 --data.dir D

Options that are not listed go to every run (`python -m trainer PRESET --help` lists them). A run
that is finished is not done again, and one that was stopped goes on: give the same command again.
FOLDER/ablations.md has the table, the picture and what became of the published claims, and is
written anew after every run.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro

from trainer import files
from trainer.ablations.execute import Common, Launch, Result, Stopped, execute, finished, launcher
from trainer.ablations.report import Ablations, write_report
from trainer.ablations.rows import (
    BASE,
    NO_LIMIT_BYTES,
    ROWS,
    RowName,
    Run,
    needed,
    runs,
    seed_runs,
)
from trainer.config import SIZE_LIMIT_BYTES
from trainer.errors import ConfigError, FairwayError
from trainer.progress import log

ALL_ROWS: tuple[RowName, ...] = get_args(RowName)


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m trainer.ablations`."""

    out: Path
    """Folder of the runs, their results and the report."""
    rows: tuple[RowName, ...] = ALL_ROWS
    """Rows to make; the base is always made."""
    preset: Literal["record", "smoke"] = "record" if torch.cuda.is_available() else "smoke"
    """Settings of the base."""
    steps: int = 300
    """Training steps of every run."""
    seed: int = 1337
    """Seed of every run."""
    seeds: int = 1
    """Train the base with this many seeds; two or more give the noise."""
    max_eval_tokens: int = 262_144
    """Held-out tokens scored."""
    limit_bytes: int = SIZE_LIMIT_BYTES
    """Artifact and code, where a row fills a budget."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.seeds < 1:
            raise ConfigError("--steps and --seeds must be at least 1")


def main(argv: list[str] | None = None) -> int:
    """Make the rows and the report; returns the exit status (1: a run failed)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments, overrides = tyro.cli(
            Arguments, args=argv, description=__doc__, return_unknown_args=True
        )
        with launcher(arguments.out) as launch:
            return ablate(arguments, overrides, argv, launch)
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"{stop}; the same command goes on from here", file=sys.stderr)
        return 128 + stop.signal


def ablate(arguments: Arguments, overrides: list[str], argv: list[str], launch: Launch) -> int:
    """Make every run that is needed and not finished; returns the exit status.

    Raises:
        ConfigError: the folder holds ablations with other settings.
        Stopped: a signal came.
    """
    common = Common(
        out=arguments.out,
        preset=arguments.preset,
        seed=arguments.seed,
        overrides=(
            *("--train.max-steps", str(arguments.steps), "--train.max-seconds", "None"),
            *("--train.priming-steps", "0"),
            *("--quant.limit-bytes", str(NO_LIMIT_BYTES)),
            *("--eval.max-tokens", str(arguments.max_eval_tokens)),
            "--eval.slot-modes",
            *overrides,
        ),
    )
    every = runs(common.config(Run(BASE)).model, arguments.limit_bytes)
    _remember(common, arguments.limit_bytes)
    rows = [row for row in ROWS if row.name in arguments.rows]
    repeated = seed_runs(arguments.seeds)
    todo = [*needed(every, rows), *repeated]
    for run in todo:
        common.config(run)  # a wrong override ends here, before any work
    results: dict[str, Result] = {}
    failed: dict[str, str] = {}
    command = "python -m trainer.ablations " + shlex.join(argv)
    for number, run in enumerate(todo, 1):
        log(f"\nrun {number} of {len(todo)}: {run.name}")
        if run.source in failed:
            failed[run.name] = f"not done: `{run.source}` failed"
        elif result := finished(common, run) or execute(common, run, launch):
            results[run.name] = result
        else:
            failed[run.name] = "failed"
        bases = [results[r.name] for r in (every[BASE], *repeated) if r.name in results]
        write_report(arguments.out, Ablations(command, rows, results, bases, failed))
    log(f"\nReport: {arguments.out / 'ablations.md'}")
    for name, reason in failed.items():
        log(f"{name}: {reason}")
    return 1 if failed else 0


def _remember(common: Common, limit_bytes: int) -> None:
    """Store what all runs of a folder must have alike. Raises ConfigError when it was otherwise."""
    settings = {
        "preset": common.preset,
        "seed": common.seed,
        "overrides": list(common.overrides),
        "limit_bytes": limit_bytes,
    }
    path = common.out / "settings.json"
    if not path.exists():
        files.write_json(path, settings)
    elif (known := json.loads(path.read_text())) != settings:
        changed = ", ".join(key for key in settings if known.get(key) != settings[key])
        raise ConfigError(
            f"{common.out} holds ablations with other settings ({changed}); its rows would not "
            f"compare. Give the settings in {path}, or use another --out."
        )


if __name__ == "__main__":
    sys.exit(main())
