"""How long do the parts of a training step take?"""

from collections.abc import Callable
from typing import cast

import pytest

from bench import model_cases as cases
from bench import pipeline_cases
from bench.measure import Case
from bench.paths import PATHS
from bench.scale import Scale
from kernels.flash4 import require_flash4
from kernels.mlp import BACKENDS, require_backend
from trainer.config import MlpBackend

Timed = Callable[[Case], None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, scale: Scale) -> MlpBackend:
    """Every MLP backend; those that cannot run here are skipped, with the reason."""
    try:
        require_backend(request.param, scale.device.type)
    except (RuntimeError, ValueError) as error:
        pytest.skip(str(error))
    return cast("MlpBackend", request.param)


def test_mlp_forward(scale: Scale, timed: Timed, backend: MlpBackend) -> None:
    timed(cases.mlp_forward(scale, backend))


def test_mlp_dpre(scale: Scale, timed: Timed, backend: MlpBackend) -> None:
    timed(cases.mlp_dpre(scale, backend))


def test_mlp_both(scale: Scale, timed: Timed, backend: MlpBackend) -> None:
    timed(cases.mlp_both(scale, backend))


def test_attention(scale: Scale, timed: Timed) -> None:
    timed(cases.attention(scale))


def test_block(scale: Scale, timed: Timed, backend: MlpBackend) -> None:
    timed(cases.block(scale, backend))


def test_micro_step(scale: Scale, timed: Timed, backend: MlpBackend) -> None:
    timed(cases.micro_step(scale, backend))


def test_micro_step_flash4(timed: Timed) -> None:
    """The record's fastest path, with a package of its own."""
    chosen = PATHS["with epilogues and flash4"].scale()
    _require(chosen)
    timed(cases.micro_step(chosen, chosen.config.mlp))


def test_training_step(scale: Scale, timed: Timed) -> None:
    """Settings of the preset, its backend included."""
    _require(scale)
    timed(pipeline_cases.training_step(scale, scale.config.mlp))


def _require(scale: Scale) -> None:
    """Skip, with the reason, where the implementations that the scale names cannot run."""
    try:
        require_backend(scale.config.mlp, scale.device.type)
        if scale.config.attention == "flash4":
            require_flash4(scale.device.type)
    except (RuntimeError, ValueError) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("part", ["optimizer_step", "muon", "adamw", "clip", "ema"])
def test_optimizer(scale: Scale, timed: Timed, part: str) -> None:
    timed(getattr(cases, part)(scale))
