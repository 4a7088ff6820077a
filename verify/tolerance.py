"""The one error budget. No check picks its own tolerance by hand.

A kernel in a low precision may err, against a float32 reference on the same rounded inputs, at
most twice as much as plain PyTorch in that precision, plus one rounding of the result. Pure
rounding bounds are unit roundoff times the number of operations that round.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Listener = Callable[[str, float, float], None]
listeners: list[Listener] = []
"""Called with (what, error, allowed) on every check; the proof sheet listens."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to `dtype` (half of machine epsilon)."""
    return torch.finfo(dtype).eps / 2


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """||actual - reference|| / ||reference|| in float64; infinite if `actual` is not finite.

    A zero reference demands an exactly zero result (then 0, else infinity).
    """
    difference = torch.linalg.vector_norm(actual.double() - reference.double()).item()
    if not math.isfinite(difference):
        return math.inf
    norm = torch.linalg.vector_norm(reference.double()).item()
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def kernel_budget(plain: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    """Relative error allowed to a kernel: twice that of `plain` PyTorch, plus one rounding."""
    return 2 * relative_error(plain, reference) + unit_roundoff(dtype)


def rounding_budget(operations: int, dtype: torch.dtype) -> float:
    """Relative error allowed to a chain of `operations` roundings in `dtype` (Higham's gamma_n).

    Raises:
        ValueError: so many operations that the bound means nothing.
    """
    product = operations * unit_roundoff(dtype)
    if product >= 1:
        raise ValueError(f"{operations} roundings in {dtype} leave no correct digit")
    return product / (1 - product)


def check(what: str, error: float, allowed: float) -> None:
    """Require error <= allowed; the failure names both. NaN fails."""
    for listener in listeners:
        listener(what, error, allowed)
    if not error <= allowed:
        raise AssertionError(f"{what}: error {error:.3e} exceeds the allowed {allowed:.3e}")
