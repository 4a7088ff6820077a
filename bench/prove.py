"""Does the gate work here? Ten repeats of the same code must pass, a slowed subject must fail.

    python -m bench.prove [--subjects NAME ...] [--out FILE]

Every subject gets a baseline, then ten judgements of the same code, then one of the subject made
to do four calls where the baseline did three (1.33 x the work).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from bench import gate, model_cases, pipeline_cases
from bench.measure import Case, measure, repeated, warm_up
from bench.scale import Scale, current
from kernels.mlp import require_backend
from trainer import environment, files

REPEATS = 10
BASELINE_MEASUREMENTS = 6
CALLS, SLOWED_CALLS = 3, 4
PAUSES_S = (0.5, 1.0)


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.prove`."""

    subjects: tuple[str, ...] = ("mlp_dpre", "mlp_both", "attention", "muon", "adamw")
    """Subjects to try."""
    budget_s: float = 0.5
    """Seconds of one measurement."""
    out: Path | None = None
    """JSON file for the results."""


def cases(scale: Scale) -> dict[str, Callable[[], Case]]:
    """Subjects that are quick enough to be measured some fifty times."""
    backend = scale.config.mlp
    return {
        "mlp_forward": lambda: model_cases.mlp_forward(scale, backend),
        "mlp_dpre": lambda: model_cases.mlp_dpre(scale, backend),
        "mlp_both": lambda: model_cases.mlp_both(scale, backend),
        "attention": lambda: model_cases.attention(scale),
        "micro_step": lambda: model_cases.micro_step(scale, backend),
        "muon": lambda: model_cases.muon(scale),
        "adamw": lambda: model_cases.adamw(scale),
        "ema": lambda: model_cases.ema(scale),
        "pruning": lambda: pipeline_cases.pruning(scale),
    }


def prove(name: str, case: Case, budget_s: float) -> dict[str, Any]:
    """Baseline, ten judgements of the same code, one of the slowed one; JSON-able."""
    same = repeated(case, CALLS, CALLS)
    slowed = repeated(case, SLOWED_CALLS, CALLS)
    warm_up(same)
    ratios = [measure(same, budget_s).ratio for _ in range(BASELINE_MEASUREMENTS)]
    baseline = gate.Baseline(case.reference_name, (tuple(ratios),))
    verdicts = [
        gate.judge(name, baseline, lambda: measure(same, budget_s), "this run", PAUSES_S)[0]
        for _ in range(REPEATS)
    ]
    verdict, _ = gate.judge(name, baseline, lambda: measure(slowed, budget_s), "this run", PAUSES_S)
    return {
        "baseline": baseline.ratio,
        "margin": baseline.margin,
        "flagged_of_ten": sum(not v.passed for v in verdicts),
        "slowed_caught": not verdict.passed,
        "slowed_message": verdict.message,
    }


def main() -> int:
    """Print the table; exit status 1 if a repeat was flagged or a slowed subject missed."""
    arguments = tyro.cli(Arguments, description=__doc__)
    scale = current()
    require_backend(scale.config.mlp, scale.device.type)
    known = cases(scale)
    unknown = sorted(set(arguments.subjects) - known.keys())
    if unknown:
        print(f"error: no subject {', '.join(unknown)}; choose of {', '.join(known)}")
        return 2
    results = {name: prove(name, known[name](), arguments.budget_s) for name in arguments.subjects}
    table = Table(title="the gate on this machine")
    for heading in ("subject", "margin", "same code flagged", "slowed 1.33x caught"):
        table.add_column(heading)
    for name, r in results.items():
        flagged, caught = f"{r['flagged_of_ten']} of {REPEATS}", str(r["slowed_caught"])
        table.add_row(name, f"{r['margin']:.1%}", flagged, caught)
    Console().print(table)
    if arguments.out is not None:
        document = {"environment": environment.describe(), "results": results}
        files.write_json(arguments.out, document)
    good = all(r["slowed_caught"] and not r["flagged_of_ten"] for r in results.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
