"""Several seeds of one run, their table, and whether they beat an earlier result.

    python -m trainer.seeds --seeds 314 999 1337                        the default preset
    python -m trainer.seeds --seeds 314 999 1337 smoke --train.max-steps 100
    python -m trainer.seeds --seeds 314 999 1337 --nproc-per-node 8 record --data.dir DATA
    python -m trainer.seeds --runs FOLDERS --against earlier/seeds.json

From the name of a preset on, arguments go to `python -m trainer`. Each seed runs in OUT/seed-N
with its output in OUT/seed-N.log. The same command again reads finished runs and resumes stopped
ones. OUT/seeds.md holds the table, OUT/seeds.json the same for programs
(`trainer/seed_tables.py`) and for a later --against.

Without --against, results are set against the published ones, where they may be: causal with
causal, on the same text. One that is asked for and may not be compared is an error.
"""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import tyro

from trainer import collect, seed_tables
from trainer.__main__ import parse
from trainer.collect import Comparison
from trainer.config import RunConfig, SlotMode
from trainer.errors import ConfigError, FairwayError, RunError
from trainer.folder import RunFolder
from trainer.progress import log
from trainer.record import PRESETS
from trainer.statistics import PUBLISHED, Result

OWN = ("--seed", "--name", "--out", "--resume")
"""Arguments of `python -m trainer` that are set here."""


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m trainer.seeds`."""

    seeds: tuple[int, ...] = ()
    """Seeds to run."""
    runs: tuple[Path, ...] = ()
    """Or finished run folders to collect."""
    out: Path = Path("runs/seeds")
    """Folder of the runs and of the table; its name is the name of the result."""
    nproc_per_node: int | None = None
    """Start each run through torchrun with so many ranks; none: one process."""
    modes: tuple[SlotMode, ...] = ()
    """SLOT modes to compare; none: all that were scored."""
    against: tuple[str, ...] = ()
    """Earlier results: `published-record`, `published-previous`, or a seeds.json."""


def main(argv: list[str] | None = None) -> int:
    """Run or collect, print and store; returns the exit status."""
    own, passed_on = split(sys.argv[1:] if argv is None else argv)
    arguments = tyro.cli(Arguments, args=own, description=__doc__)
    try:
        _main(arguments, passed_on)
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments before the name of a preset, and from it on."""
    at = next((i for i, word in enumerate(arguments) if word in PRESETS), len(arguments))
    return arguments[:at], arguments[at:]


def _main(arguments: Arguments, passed_on: list[str]) -> None:
    if bool(arguments.seeds) == bool(arguments.runs):
        raise ConfigError("give either --seeds to run or --runs to collect")
    earlier = [named(name) for name in arguments.against]  # a wrong name costs no training
    if arguments.seeds:
        paths = _run_all(arguments, passed_on)
    elif passed_on:
        raise ConfigError(f"--runs only reads; it has no use for {' '.join(passed_on)}")
    else:
        paths = list(arguments.runs)
    found = collect.collect(arguments.out.resolve().name, paths)
    absent = [mode for mode in arguments.modes if mode not in found.modes]
    if absent:
        raise ConfigError(f"the runs were not scored in SLOT mode {', '.join(absent)}")
    modes = list(arguments.modes) or found.modes
    groups = [collect.comparisons(found, modes, old) for old in earlier or [list(PUBLISHED)]]
    shown = [
        c for group in groups for c in group if c.earlier.causal == found.result(c.mode).causal
    ]
    print(seed_tables.write(found, shown, arguments.out))
    print(f"Written: {arguments.out / 'seeds.md'}, {arguments.out / 'seeds.json'}")
    if earlier:
        _require_answers(arguments.against, groups)


def named(name: str) -> list[Result]:
    """The published result of that name, or those of a seeds.json, one a mode.

    Raises:
        ConfigError: neither.
    """
    published = [result for result in PUBLISHED if result.name == name]
    if published:
        return published
    if not Path(name).is_file():
        names = ", ".join(result.name for result in PUBLISHED)
        raise ConfigError(f"--against {name}: give one of {names}, or the path of a seeds.json")
    stored = seed_tables.read(Path(name))
    return [stored.result(mode) for mode in stored.modes]


def _require_answers(names: tuple[str, ...], groups: list[list[Comparison]]) -> None:
    """An earlier result that was asked for must have been compared in some mode."""
    for name, group in zip(names, groups, strict=True):
        if all(c.test is None for c in group):
            reasons = dict.fromkeys(str(c.obstacle) for c in group)
            raise ConfigError(f"no comparison with {name}: {'; '.join(reasons)}")


# Running.


def _run_all(arguments: Arguments, passed_on: list[str]) -> list[Path]:
    """The run folders of every seed, each finished."""
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ConfigError(f"a seed occurs twice among {' '.join(map(str, arguments.seeds))}")
    taken = [word for word in passed_on if word.split("=")[0] in OWN]
    if taken:
        raise ConfigError(f"{' '.join(taken)} cannot be passed on: --seeds and --out decide it")
    preset, config = parse(passed_on)
    absent = set(arguments.modes) - {"off", *config.eval.slot_modes}
    if absent:
        raise ConfigError(
            f"--modes {' '.join(sorted(absent))}: the runs will not be scored so; add it to "
            "--eval.slot-modes"
        )
    paths: list[Path] = []
    for number, seed in enumerate(arguments.seeds, 1):
        log(f"seed {seed} ({number} of {len(arguments.seeds)})")
        start = [preset, *passed_on[1:], f"--seed={seed}", f"--out={arguments.out}"]
        path = arguments.out / f"seed-{seed}"
        _run_seed(path, config, [*start, f"--name={path.name}"], arguments.nproc_per_node)
        paths.append(path)
    return paths


def _run_seed(path: Path, config: RunConfig, start: list[str], ranks: int | None) -> None:
    """Run `path` to its end, unless it is there already."""
    command = start
    if (path / "config.json").exists():
        folder, stored = RunFolder.open(path)
        if collect.shared_settings(stored) != collect.shared_settings(config):
            raise ConfigError(
                f"{path} was started with other settings. Choose another --out, or delete it."
            )
        if collect.unfinished(folder, stored) is None:
            log(f"already finished: {path}")
            return
        command = ["--resume", str(path)]
    status = launch(command, path.with_name(f"{path.name}.log"), ranks)
    if status != 0:
        raise RunError(
            f"{path.name} ended with status {status}; its output is in {path}.log. Mend the cause "
            "and give the same command again: finished seeds are read, stopped ones resumed."
        )


def trainer_command(arguments: list[str], ranks: int | None) -> list[str]:
    """The command line of `python -m trainer`, through torchrun when `ranks` are given."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [sys.executable, "-m", *([] if ranks is None else torchrun), "trainer", *arguments]


def launch(arguments: list[str], log_file: Path, ranks: int | None) -> int:
    """Run `python -m trainer` with `arguments`, its output shown and added to `log_file`.

    Args:
        arguments: of the trainer.
        log_file: made if need be.
        ranks: processes of torchrun on this machine; None: one process without it.

    Returns:
        The exit status.

    Raises:
        RunError: the log cannot be written.
    """
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file = log_file.open("a")
    except OSError as error:
        raise RunError(f"cannot write {log_file}: {error.strerror}") from error
    with (
        file,
        subprocess.Popen(
            trainer_command(arguments, ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as child,
    ):
        previous = signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
        try:
            _show(child, file)
        except KeyboardInterrupt:  # the terminal sent it to the run too, which saves itself
            _show(child, file)
        finally:
            signal.signal(signal.SIGTERM, previous)
        return child.wait()


def _show(child: "subprocess.Popen[str]", file: IO[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        print(line, end="", flush=True)
        file.write(line)
        file.flush()


if __name__ == "__main__":
    sys.exit(main())
