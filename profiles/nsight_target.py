"""The script that runs under Nsight Compute; started by `profiles.nsight.collect` alone.

FAIRWAY_NSIGHT holds what to run as JSON: `kind` "step" or "kernel", its arguments, metrics, and the
prefix of the report.
"""

import importlib.metadata
import inspect
import json
import os
from collections.abc import Callable
from typing import Any

# Before torch touches the GPU: nsight-python 1.x injects its library when it is imported.
import nsight as installed_nsight  # pyright: ignore[reportMissingImports]
import torch

from bench.scale import current
from profiles import kernels, workload

WARM_UP_CALLS = 4
nsight: Any = installed_nsight


def subject(request: dict[str, Any]) -> Callable[[], object]:
    """What is profiled, not yet warmed up."""
    if request["kind"] == "step":
        scale = current(request["passes"], request["attention"])
        return workload.training_step(scale, request["mlp"], request["compiled"]).step
    case = kernels.case(current(), request["name"], request["mlp"])
    return lambda: case.subject(0)


def options(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `nsight.analyze.kernel`, in the spelling of the generation at hand."""
    known = inspect.signature(nsight.analyze.kernel).parameters
    chosen: dict[str, Any] = {
        "metrics": request["metrics"],
        "runs": 1,
        "clock_control": "none",
        "cache_control": "none",
        "combine_kernel_metrics": lambda x, y: x + y,
        "output_prefix": request["prefix"],
        "thermal_mode": "off",
        "thermal_control": False,
    }
    return {name: value for name, value in chosen.items() if name in known}


def main() -> None:
    """Warm up outside the range, then profile one call."""
    request = json.loads(os.environ["FAIRWAY_NSIGHT"])
    relaunches = int(importlib.metadata.version("nsight-python").split(".")[0]) < 1
    # A range counts the kernels of its own thread: the backward pass must not leave it.
    torch.autograd.set_multithreading_enabled(False)
    call: Callable[[], object] = lambda: None  # noqa: E731
    # In 0.9 the outer process only starts the inner one, which alone needs the GPU.
    if not relaunches or "NSPY_NCU_PROFILE" in os.environ:
        call = subject(request)
        for _ in range(WARM_UP_CALLS):
            call()
        torch.cuda.synchronize()

    @nsight.analyze.kernel(**options(request))
    def profiled(number: int) -> None:
        with nsight.annotate("subject"):
            call()
            torch.cuda.synchronize()

    profiled(0)


if __name__ == "__main__":
    main()
