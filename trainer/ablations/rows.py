"""What is run and what is compared, as data.

A run is a run folder of its own; a row compares two scores. The base is trained with both weight
averages kept: its EMA is the base run proper, and its SWA and their mean are rows. Rows about
quantization, SLOT and compression share the base's trained model, and only do what comes after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.config import SIZE_LIMIT_BYTES, ModelConfig

RowName = Literal[
    "mlp-3x",
    "int5",
    "int6",
    "budgeted",
    "measured",
    "lr-floor-0",
    "lzma",
    "slot-context",
    "slot-shared",
    "qat-off",
    "qat-linears",
    "swa",
    "ema-swa",
    "turbo-muon",
]

BASE, BOTH_AVERAGES = "base", "ema-swa"
NO_LIMIT_BYTES = 1 << 40
"""Nothing is pruned, so that sizes compare."""

Metric = Literal["post_ema", "round_trip", "sliding", "slot_context", "slot_shared"]
"""The stage whose score a row compares. `post_ema`: averaged weights before quantization."""


@dataclass(frozen=True)
class Run:
    """One run folder, and what it may take over from another run."""

    name: str
    overrides: tuple[str, ...] = ()
    """Of `python -m trainer`, beside the common ones."""
    source: str | None = None
    """Run whose training it shares; None: it trains."""
    weights: Literal["averaged", "ema", "swa"] = "averaged"
    """Which of the source's averages it takes; `averaged` takes over its calibration as well."""
    seed_offset: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the table: `run`'s score in `metric` against the base's in `base_metric`."""

    name: RowName
    group: str
    label: str
    run: str
    metric: Metric
    base_metric: Metric
    trains: bool
    """Whether the two scores come from two trainings, whose noise is in their difference."""
    baseline_bytes: bool = False
    """Compare the size under the other compressor."""


def runs(model: ModelConfig, limit_bytes: int = SIZE_LIMIT_BYTES) -> dict[str, Run]:
    """Every run by name, sources before those that share with them.

    Args:
        model: of the base run.
        limit_bytes: what artifact and code may weigh in rows that fill a budget.
    """
    slot = ("--eval.slot-modes", "context", "shared")
    limit = ("--quant.limit-bytes", str(limit_bytes))
    every = (
        Run(BOTH_AVERAGES, ("--train.average", "both")),
        Run(BASE, slot, source=BOTH_AVERAGES, weights="ema"),
        Run("swa", ("--train.average", "swa"), source=BOTH_AVERAGES, weights="swa"),
        Run("int5", ("--quant.bits", "int5"), source=BASE),
        Run("int6", ("--quant.bits", "int6"), source=BASE),
        Run("budgeted", ("--quant.bits", "budgeted", *limit), source=BASE),
        Run("measured", ("--quant.bits", "measured", *limit), source=BASE),
        Run("mlp-3x", ("--model.mlp-width", str(3 * model.width))),
        Run("turbo-muon", ("--optim.muon-variant", "turbo")),
        Run("lr-floor-0", ("--train.lr-floor", "0")),
        Run("qat-off", ("--train.late-qat", "off")),
        Run("qat-linears", ("--train.late-qat", "linears")),
    )
    return {run.name: run for run in every}


ROWS: tuple[Row, ...] = (
    Row("mlp-3x", "MLP width", "3.0 x D", "mlp-3x", "post_ema", "post_ema", True),
    Row("int5", "Bits", "uniform int5", "int5", "round_trip", "round_trip", False),
    Row("int6", "Bits", "uniform int6", "int6", "round_trip", "round_trip", False),
    Row("budgeted", "Bits", "budgeted", "budgeted", "round_trip", "round_trip", False),
    Row("measured", "Bits", "measured damage", "measured", "round_trip", "round_trip", False),
    Row("lr-floor-0", "LR floor", "floor 0", "lr-floor-0", "post_ema", "post_ema", True),
    Row("lzma", "Compressor", "LZMA-9", BASE, "round_trip", "round_trip", False, True),
    Row("slot-context", "SLOT", "context", BASE, "slot_context", "sliding", False),
    Row("slot-shared", "SLOT", "shared (not causal)", BASE, "slot_shared", "sliding", False),
    Row("qat-off", "Late QAT", "off", "qat-off", "round_trip", "round_trip", True),
    Row(
        "qat-linears", "Late QAT", "published form", "qat-linears", "round_trip", "round_trip", True
    ),
    Row("swa", "Average", "SWA", "swa", "post_ema", "post_ema", False),
    Row("ema-swa", "Average", "EMA and SWA", BOTH_AVERAGES, "post_ema", "post_ema", False),
    Row("turbo-muon", "Optimizer", "Turbo-Muon", "turbo-muon", "post_ema", "post_ema", True),
)


def seed_runs(seeds: int) -> list[Run]:
    """The base trained anew with each further seed; their spread is the noise."""
    return [Run(f"base-seed+{i}", seed_offset=i) for i in range(1, seeds)]


def needed(every: dict[str, Run], rows: Sequence[Row]) -> list[Run]:
    """The base, and the runs `rows` need with all their sources, in an order that can be run."""
    wanted: set[str] = set()
    todo = [BASE, *(row.run for row in rows)]
    while todo:
        name = todo.pop()
        wanted.add(name)
        if (source := every[name].source) is not None:
            todo.append(source)
    return [run for name, run in every.items() if name in wanted]
