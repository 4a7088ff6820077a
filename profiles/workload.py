"""The step that is profiled, cut into named ranges (NVTX on a GPU).

One rank's share of the record on 8 GPUs: a micro-batch from the loader, forward, backward, the
optimizer and the weight average.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.pipeline_cases import synthetic_loader
from bench.scale import Scale
from trainer import compiling
from trainer.average import Averages
from trainer.config import MlpBackend
from trainer.optim import Optimizer

PHASES = ("data", "forward", "backward", "optimizer", "average")
PREFIX = "fairway."
"""Of range names, so that no library's range is taken for ours."""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A named range for the PyTorch profiler and for Nsight."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.nvtx.range_push(PREFIX + name)
    with torch.profiler.record_function(PREFIX + name):
        yield
    if cuda:
        torch.cuda.nvtx.range_pop()


@dataclass(frozen=True)
class Workload:
    """A step, ready to be called; `close` stops its loader."""

    step: Callable[[], None]
    close: Callable[[], None]


def training_step(scale: Scale, mlp: MlpBackend, compiled: bool) -> Workload:
    """The step; call it a few times first to compile and warm up."""
    model = scale.model(mlp)
    loss_of: Any = compiling.compiled(model.loss) if compiled else model.loss
    optimizer = Optimizer(model, scale.config.optim, scale.dtype)
    averages = Averages(model, scale.config.train)
    loader = synthetic_loader(scale)

    def step() -> None:
        with phase("data"):
            x_BT, y_BT = loader.next()
        with phase("forward"):
            loss = loss_of(x_BT, y_BT)
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            optimizer.step(0.01, 0.95)
            optimizer.zero_grad()
        with phase("average"):
            averages.update_ema(scale.config.train.ema_decay)

    return Workload(step, loader.close)
