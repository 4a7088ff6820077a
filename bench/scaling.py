"""How does training scale with GPUs, and do all world sizes train the same model?

    python -m bench.scaling --worlds 1 2 4 8 --data DIR --out FILE.json
    python -m bench.scaling --worlds 1 2 -- --train.sequences-per-step 96     (trainer overrides)

Every world size trains the preset on the same global batches from the same seed. Besides the
plain run on one GPU, one with permuted windows gives the yardstick of how far losses may differ
(`bench/agreement.py`). Communication is read from a profile of each run's last steps.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import tyro
from rich.console import Console
from rich.table import Table

mpl.use("Agg")  # before pyplot: no display is needed

from matplotlib import pyplot as plt

from bench import launch
from bench.agreement import LIMIT, Agreement, compare
from bench.scaling_worker import Job
from trainer import files
from trainer.config import MICRO_BATCHES
from trainer.errors import ConfigError, FairwayError
from trainer.progress import progress


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.scaling`; trainer overrides come after `--`."""

    worlds: tuple[int, ...] = (1, 2)
    """World sizes, 1 among them."""
    steps: int = 50
    """Steps of each run."""
    warm_up_steps: int = 8
    """First steps, left out of the timing."""
    traced_steps: int = 3
    """Last steps, profiled and left out of the timing."""
    yardsticks: int = 1
    """Runs on one GPU with permuted windows."""
    data: Path | None = None
    """Folder of shards and tokenizer; none: the embedded corpus."""
    out: Path = Path("runs/scaling.json")
    """JSON file for the result; a picture comes beside it."""
    limit_s: float = 420.0
    """Seconds after which a run is given up."""


@dataclass(frozen=True)
class Run:
    """One run: how many ranks, and in which order it reads a step's windows."""

    world_size: int
    permutation: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        order = f", permuted windows {self.permutation}" if self.permutation else ""
        return f"{self.world_size} rank(s){order}"


def plan(arguments: Arguments) -> list[list[Run]]:
    """Runs in groups: those of a group share the machine, a GPU each.

    Runs on one GPU go side by side as far as there are GPUs; a CPU has no neighbours to spare.
    """
    singles = [Run(1), *(Run(1, n + 1) for n in range(arguments.yardsticks))]
    side_by_side = max(1, torch.cuda.device_count())
    groups = [singles[i : i + side_by_side] for i in range(0, len(singles), side_by_side)]
    return groups + [[Run(w)] for w in sorted(set(arguments.worlds)) if w > 1]


def check(arguments: Arguments) -> None:
    """Raise ConfigError for options that cannot give a table."""
    unfit = [w for w in arguments.worlds if w < 1 or MICRO_BATCHES % w]
    gpus = torch.cuda.device_count()
    if unfit:
        raise ConfigError(f"--worlds {unfit}: only 1, 2, 4 and 8 ranks divide a step")
    if 1 not in arguments.worlds:
        raise ConfigError("--worlds must contain 1: everything is compared with one GPU")
    if gpus and max(arguments.worlds) > gpus:
        raise ConfigError(f"--worlds {max(arguments.worlds)}: this machine has {gpus} GPU(s)")
    if arguments.yardsticks < 1:
        raise ConfigError("--yardsticks must be at least 1: it tells how far losses may differ")
    if arguments.warm_up_steps < 0 or arguments.traced_steps < 1:
        raise ConfigError("--warm-up-steps must be at least 0, and --traced-steps at least 1")
    if arguments.steps < arguments.warm_up_steps + arguments.traced_steps + 2:
        raise ConfigError("--steps must leave two steps between the warm-up and the traced ones")


def run_group(runs: list[Run], arguments: Arguments, trainer: list[str], folder: Path) -> None:
    """Run a group to its end; each run leaves its result in `folder`. Raises RunError."""
    trainer = [*launch.default_preset(), *trainer]
    if arguments.data is not None:
        trainer.append(f"--data.dir={arguments.data}")
    children: list[launch.Child] = []
    for gpu, run in enumerate(runs):
        job = _file(folder, run, "job.json")
        out = str(_file(folder, run, "result.json"))
        content = Job(trainer, arguments.steps, arguments.traced_steps, run.permutation, out)
        files.write_json(job, asdict(content))
        command = launch.command(run.world_size, "bench.scaling_worker", str(job))
        visible = str(gpu) if len(runs) > 1 else None
        children.append(launch.Child(run.name, command, _file(folder, run, "log"), visible))
    launch.run_together(children, arguments.limit_s)


def _file(folder: Path, run: Run, ending: str) -> Path:
    return folder / f"world{run.world_size}-{run.permutation or 0}.{ending}"


def row(result: dict[str, Any], single_ms: float, arguments: Arguments) -> dict[str, Any]:
    """One line of the table, JSON-able. `single_ms` is the step of one GPU."""
    timed = _timed(result, arguments)
    ms = statistics.median(timed)
    deciles = statistics.quantiles(timed, n=10, method="inclusive")
    return {
        "world_size": result["world_size"],
        "ms_per_step": ms,
        "p10_ms": deciles[0],
        "p90_ms": deciles[-1],
        "tokens_per_s": 1000 * result["tokens_per_step"] / ms,
        "efficiency": single_ms / ms / result["world_size"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        **_communication(result["overlaps"]),
    }


def _timed(result: dict[str, Any], arguments: Arguments) -> list[float]:
    return result["times_ms"][arguments.warm_up_steps : -arguments.traced_steps]


def _communication(overlaps: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares, as means over ranks; None where no GPU was traced.

    `least_communication_ms` is the rank that waits least for its peers: what the transfers cost.
    """
    if not overlaps:
        return dict.fromkeys(
            ("communication_share", "hidden_share", "least_communication_ms", "busy_share", "kinds")
        )
    window = statistics.fmean(o["window_ms"] for o in overlaps)
    total = statistics.fmean(o["communication"]["ms"] for o in overlaps)
    hidden = statistics.fmean(o["communication"]["hidden_ms"] for o in overlaps)
    kinds = {
        kind: {
            "ms": statistics.fmean(o["kinds"][kind]["ms"] for o in overlaps),
            "hidden_ms": statistics.fmean(o["kinds"][kind]["hidden_ms"] for o in overlaps),
        }
        for kind in overlaps[0]["kinds"]
    }
    return {
        "communication_share": total / window,
        "hidden_share": hidden / total if total else None,
        "least_communication_ms": min(o["communication"]["ms"] for o in overlaps),
        "busy_share": statistics.fmean(o["busy_ms"] for o in overlaps) / window,
        "kinds": kinds,
    }


def report(
    results: dict[Run, dict[str, Any]], arguments: Arguments
) -> tuple[list[dict[str, Any]], dict[int, Agreement]]:
    """Table rows and, for every world size above 1, how its losses agree with one GPU's."""
    base = results[Run(1)]
    single_ms = statistics.median(_timed(base, arguments))
    worlds = [results[Run(w)] for w in sorted(set(arguments.worlds))]
    rows = [row(result, single_ms, arguments) for result in worlds]
    yardsticks = [r["losses"] for run, r in results.items() if run.permutation is not None]
    agreements = {
        r["world_size"]: compare(base["losses"], yardsticks, r["losses"])
        for r in worlds
        if r["world_size"] > 1
    }
    return rows, agreements


def show(rows: list[dict[str, Any]], agreements: dict[int, Agreement], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for heading in (
        *("GPUs", "ms/step (p10-p90)", "tokens/s", "efficiency", "communication", "hidden"),
        *("busy", "loss difference", f"of yardstick (limit {LIMIT:.0f})"),
    ):
        table.add_column(heading, justify="right")
    for r in rows:
        found = agreements.get(r["world_size"])
        table.add_row(
            str(r["world_size"]),
            f"{r['ms_per_step']:.1f} ({r['p10_ms']:.1f}-{r['p90_ms']:.1f})",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['efficiency']:.1%}",
            _percent(r["communication_share"]),
            _percent(r["hidden_share"]),
            _percent(r["busy_share"]),
            "-" if found is None else f"{found.rms_nats:.1e} nats",
            "-" if found is None else f"{found.worst:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for r in rows:
        for kind, part in (r["kinds"] or {}).items():
            hidden = part["hidden_ms"] / part["ms"] if part["ms"] else 0.0
            console.print(
                f"{r['world_size']} GPUs, {kind}: {part['ms']:.3f} ms a step, {hidden:.0%} hidden"
            )


def picture(results: dict[Run, dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """Left: tokens per second against the ideal. Right: how far losses part from one GPU's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    worlds = [r["world_size"] for r in rows]
    speeds = [r["tokens_per_s"] for r in rows]
    left.plot(worlds, [w * speeds[0] for w in worlds], "--", color="grey", label="ideal")
    left.plot(worlds, speeds, "o-", label="measured")
    for r in rows:
        at = (r["world_size"], r["tokens_per_s"])
        left.annotate(f"{r['efficiency']:.0%}", at, textcoords="offset points", xytext=(-18, -16))
    left.set(xlabel="GPUs", ylabel="tokens/s", xticks=worlds, ylim=(0, None))
    base = results[Run(1)]["losses"]
    for run, result in results.items():
        if run != Run(1):
            pairs = zip(base, result["losses"], strict=True)
            apart = [max(abs(a - b), 1e-7) for a, b in pairs]  # a logarithm has no place for 0
            style = "--" if run.permutation else "-"
            right.plot(range(1, len(base) + 1), apart, style, label=run.name)
    right.set(xlabel="step", ylabel="|loss - loss of one GPU|, nats", yscale="log")
    left.legend()
    right.legend()
    with files.atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def main(argv: list[str] | None = None) -> int:
    """Run everything and print the table; exit status 1 if losses disagree."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = tyro.cli(Arguments, args=argv[:cut], description=__doc__)
    try:
        return _main(arguments, argv[cut + 1 :])
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(arguments: Arguments, trainer: list[str]) -> int:
    check(arguments)
    groups = plan(arguments)
    results: dict[Run, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name, progress("runs", len(groups)) as advance:
        folder = Path(name)
        for runs in groups:
            started = time.monotonic()
            print(f"{', '.join(run.name for run in runs)}: started", flush=True)
            run_group(runs, arguments, trainer, folder)
            results.update(
                {run: json.loads(_file(folder, run, "result.json").read_text()) for run in runs}
            )
            print(f"done in {time.monotonic() - started:.0f} s", flush=True)
            advance()
    rows, agreements = report(results, arguments)
    environment = results[Run(1)]["environment"]
    document = {
        "environment": environment,
        "arguments": {**asdict(arguments), "data": str(arguments.data), "out": str(arguments.out)},
        "trainer": trainer,
        "table": rows,
        "agreement": {w: {**asdict(a), "limit": LIMIT} for w, a in agreements.items()},
        "runs": [
            {"name": run.name, "losses": r["losses"], "times_ms": r["times_ms"]}
            for run, r in results.items()
        ],
    }
    files.write_json(arguments.out, document)
    title = f"{environment['device']}, {arguments.steps} steps, {results[Run(1)]['dtype']}"
    show(rows, agreements, title)
    picture(results, rows, arguments.out.with_suffix(".png"))
    print(f"figures: {arguments.out}, {arguments.out.with_suffix('.png')}")
    apart = [w for w, a in agreements.items() if not a.holds]
    if apart:
        print(f"losses disagree at world size {', '.join(map(str, apart))}", file=sys.stderr)
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
