"""Do two paths train the same model? Their loss curves, from one seed, on the same batches.

    python -m bench.loss_curves --data DIR --out FILE.json
    python -m bench.loss_curves --steps 200 -- --train.sequences-per-step 96     (trainer overrides)

The old path is plain PyTorch between the products; the new ones are named (`bench/paths.py`). How
far losses may part is told by yardsticks: the old path with its windows permuted within every step,
the same training but for the order of its sums (`bench/agreement.py`).
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import tyro

mpl.use("Agg")  # before pyplot: no display is needed

from matplotlib import pyplot as plt

from bench import launch
from bench.agreement import BLOCK_STEPS, LIMIT, Agreement, compare
from bench.paths import PATHS, unknown
from bench.scaling_worker import Job
from trainer import files
from trainer.errors import ConfigError, FairwayError

OLD = "fused MLP"


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.loss_curves`; trainer overrides come after `--`."""

    steps: int = 200
    """Steps of each run."""
    paths: tuple[str, ...] = ("fused MLP and passes",)
    """New paths, by name; a curve each."""
    yardsticks: int = 1
    """Runs of the old path with permuted windows."""
    data: Path | None = None
    """Folder of shards and tokenizer; none: the embedded corpus."""
    out: Path = Path("runs/loss_curves.json")
    """JSON file for the result; a picture comes beside it."""
    limit_s: float = 420.0
    """Seconds after which the runs are given up."""


def permuted(number: int) -> str:
    """What the curve of a yardstick is called; the first is number 1."""
    return f"{OLD}, windows permuted ({number})"


def runs(arguments: Arguments) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """Overrides of every run, and the permutation of its windows."""
    old = PATHS[OLD].options()
    return {
        OLD: (old, None),
        **{name: (PATHS[name].options(), None) for name in arguments.paths},
        **{permuted(n): (old, n) for n in range(1, arguments.yardsticks + 1)},
    }


def run_all(arguments: Arguments, trainer: list[str], folder: Path) -> dict[str, Any]:
    """All runs side by side on one device; time does not matter here.

    Raises:
        ConfigError: an unknown path, no yardstick, or no GPU, so that all paths would be the plain
            one.
        RunError: a run failed.
    """
    if strange := unknown(set(arguments.paths)):
        raise ConfigError(f"no path {', '.join(strange)}; choose of {', '.join(PATHS)}")
    if arguments.yardsticks < 1:
        raise ConfigError("--yardsticks must be at least 1")
    if not torch.cuda.is_available():
        raise ConfigError("bench.loss_curves needs a CUDA GPU; torch finds none")
    data = [] if arguments.data is None else [f"--data.dir={arguments.data}"]
    results: dict[str, Path] = {}
    children: list[launch.Child] = []
    for number, (name, (overrides, permutation)) in enumerate(runs(arguments).items()):
        results[name] = folder / f"{number}.result.json"
        options = [*launch.default_preset(), *trainer, *data, *overrides]
        job = Job(options, arguments.steps, 1, permutation, str(results[name]))
        files.write_json(folder / f"{number}.job.json", asdict(job))
        command = launch.command(1, "bench.scaling_worker", str(folder / f"{number}.job.json"))
        children.append(launch.Child(name, command, folder / f"{number}.log"))
    launch.run_together(children, arguments.limit_s)
    return {name: json.loads(path.read_text()) for name, path in results.items()}


def picture(path: Path, curves: dict[str, list[float]]) -> None:
    """Left: the curves. Right: how far the other runs part from the old path."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    for name, losses in curves.items():
        style = "--" if name.startswith(f"{OLD}, ") else "-"
        left.plot(range(1, len(losses) + 1), losses, style, linewidth=1, label=name)
        if name != OLD:
            apart = [abs(a - b) for a, b in zip(curves[OLD], losses, strict=True)]
            right.plot(range(1, len(apart) + 1), apart, style, linewidth=1, label=name)
    left.set(xlabel="step", ylabel="loss, nats per token", title="Training loss")
    right.set(xlabel="step", yscale="log", title=f"|loss - loss of {OLD}|, nats")
    left.legend()
    right.legend()
    with files.atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run, compare, draw; exit status 1 if the curves part further than the yardstick allows."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = tyro.cli(Arguments, args=argv[:cut], description=__doc__)
    try:
        found = _main(arguments, argv[cut + 1 :])
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(agreement.holds for agreement in found) else 1


def _main(arguments: Arguments, trainer: list[str]) -> list[Agreement]:
    with tempfile.TemporaryDirectory() as name:
        results = run_all(arguments, trainer, Path(name))
    curves = {name: r["losses"] for name, r in results.items()}
    yardsticks = [curves[permuted(n)] for n in range(1, arguments.yardsticks + 1)]
    found = {name: compare(curves[OLD], yardsticks, curves[name]) for name in arguments.paths}
    document = {
        "environment": results[OLD]["environment"],
        "trainer": trainer,
        "steps": arguments.steps,
        "agreement": {name: {**asdict(a), "limit": LIMIT} for name, a in found.items()},
        "losses": curves,
    }
    files.write_json(arguments.out, document)
    picture(arguments.out.with_suffix(".png"), curves)
    for name, agreement in found.items():
        print(
            f"{name}: {agreement.rms_nats:.2e} nats from the old path (root mean square of "
            f"{arguments.steps} steps), permuted windows {agreement.yardstick_nats:.2e}; largest "
            f"block of {BLOCK_STEPS} steps {agreement.worst:.2f} times the yardstick's, limit "
            f"{LIMIT:.0f}"
        )
    print("last losses: " + ", ".join(f"{name} {c[-1]:.4f}" for name, c in curves.items()))
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())
