"""A function of tensors as one CUDA graph: captured once, then replayed on new values."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 3
"""Runs before the capture, in which compilers, libraries and their workspaces get ready."""


class Replayed:
    """`work(*inputs)` without its launches: one launch of a graph, whatever `work` consists of.

    Args:
        work: takes tensors of one GPU and leaves its results in tensors that it holds; returns
            nothing, reads nothing back, and may be run again on the same inputs without harm.
        inputs: values for the warm-up runs; later ones have their shapes and types.

    Raises:
        RuntimeError: `work` does what cannot be captured.
    """

    def __init__(self, work: Callable[..., None], *inputs: Tensor) -> None:
        self._inputs = tuple(t.clone() for t in inputs)
        self._work = work  # a graph replays on addresses: what `work` holds must live as long
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                work(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Of this thread alone: NCCL's watchdog asks for events from a thread of its own, which a
        # capture of the whole process would forbid.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            work(*self._inputs)

    def __call__(self, *inputs: Tensor) -> None:
        """Run the work on these values, on the current stream."""
        for own, new in zip(self._inputs, inputs, strict=True):
            own.copy_(new)
        self._graph.replay()
