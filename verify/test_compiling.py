"""Claims about compilation: TorchInductor knows the project's operators before it meets them."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import compiling

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("fairway::only_in_a_test", "elsewhere::only_in_a_test")


def _doubling(name: str, strides: list[tuple[int, ...]]) -> Any:
    """A new operator that notes the strides it is given."""

    @torch.library.custom_op(name, mutates_args=())
    def operator(x: Tensor) -> Tensor:
        strides.append(x.stride())
        return 2 * x

    @operator.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    return operator


def test_operators_are_declared_before_they_are_met(caplog: pytest.LogCaptureFixture) -> None:
    """Ours never take the way on which torch 2.11 prints what leads to them; all else is alike."""
    from torch._inductor import lowering
    from torch._inductor.utils import fresh_cache

    strides: list[tuple[int, ...]] = []
    made: list[Any] = []

    def both(x: Tensor) -> Tensor:
        ours, foreign = made
        return ours(foreign(x.t()))

    program = compiling.compiled(both)
    made += [_doubling(name, strides) for name in NAMES]  # imported after `compiled`
    x = torch.randn(3, 5)
    with fresh_cache(), caplog.at_level(logging.INFO, "torch._inductor.graph"):
        got = program(x)
    assert torch.equal(got, 4 * x.t())
    assert strides == [(1, 5), (1, 5)]
    (met,) = [m for m in caplog.messages if "implicit fallback" in m]
    assert "target: elsewhere" in met
    ours, foreign = (lowering.maybe_layout_constraints(op._opoverload) for op in made)
    assert ours is foreign is not None


def test_a_run_that_compiles_nothing_does_not_load_the_compiler() -> None:
    """TorchInductor, which takes seconds to import, stays out of runs without it."""
    script = (
        "import sys, trainer.scoring, trainer.train\n"
        "sys.exit('torch._inductor.lowering' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
