"""Bits per matrix under a budget of bytes: every width is made once, only compression is repeated.

`budgeted` promotes matrices from int5 to int6 in the order of trace(H). `measured` chooses 4 to 8
bits for each, for the least measured damage in the bytes there are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from trainer import artifact, estimate
from trainer.allocate import Sizer, most_that_fits
from trainer.artifact import Compressor
from trainer.config import QuantConfig
from trainer.model import GPT
from trainer.quantize import QuantizedMatrix, QuantizedModel, quantize_matrices, with_matrices

Bits = Mapping[str, float]
"""Bits of every matrix, by name."""


@dataclass(frozen=True)
class Made:
    """Every matrix at several widths, and what they would take in an artifact."""

    rest: QuantizedModel
    """The artifact without its matrices."""
    matrices: dict[float, dict[str, QuantizedMatrix]]
    """By bits, then name."""
    errors: dict[float, dict[str, float]]
    """Hessian-weighted errors, likewise."""
    sizes: dict[str, dict[float, float]]
    """Estimated compressed bytes, by name, then bits."""
    rest_bytes: float
    """Estimated compressed bytes of `rest`."""

    def chosen(self, bits: Bits) -> QuantizedModel:
        """The quantized model with these bits."""
        return replace(self.rest, matrices={n: self.matrices[b][n] for n, b in bits.items()})

    def chosen_errors(self, bits: Bits) -> dict[str, float]:
        """Hessian-weighted error of every matrix at these bits."""
        return {n: self.errors[b][n] for n, b in bits.items()}

    def packed_bytes(self, bits: Bits, compressor: Compressor) -> int:
        """Exact size of the artifact with these bits; Brotli-11 takes its time."""
        return len(artifact.pack(self.chosen(bits), compressor))

    def estimated_bytes(self, bits: Bits) -> float:
        """Estimated compressed bytes of `chosen(bits)`."""
        return self.rest_bytes + sum(self.sizes[n][b] for n, b in bits.items())


def make(
    model: GPT,
    hessians: dict[str, Tensor],
    widths: Iterable[float],
    quant: QuantConfig,
    *,
    even: bool = False,
) -> Made:
    """Quantize every matrix at every width, with one step a matrix if `even`.

    Raises:
        RunError: a Hessian cannot be used.
    """
    weights = model.matrices()
    made = {
        bits: quantize_matrices(weights, hessians, dict.fromkeys(weights, bits), quant, even=even)
        for bits in widths
    }
    matrices = {bits: made[bits][0] for bits in made}
    rest = with_matrices(model, {})
    return Made(
        rest=rest,
        matrices=matrices,
        errors={bits: made[bits][1] for bits in made},
        sizes={n: {b: estimate.matrix_bytes(matrices[b][n]) for b in made} for n in weights},
        rest_bytes=estimate.packed_bytes(rest),
    )


def largest_fit(
    made: Made,
    candidate: Callable[[int], Bits],
    highest: int,
    limit_bytes: int,
    exact_bytes: Callable[[Bits], int],
    *,
    slack_bytes: int = 0,
    ratio: float = 1.0,
) -> Bits:
    """Bits of the largest of candidates 0..highest whose exact artifact fits; 0's if none does.

    Args:
        made: the matrices.
        candidate: bits of a candidate; their bytes grow with its number.
        highest: the last candidate.
        limit_bytes: limit on the artifact.
        exact_bytes: size of the artifact with these bits, as `Made.packed_bytes` gives it.
        slack_bytes: room that may stay unused.
        ratio: exact over estimated bytes, if known: spares tries.
    """
    sizer = Sizer(
        lambda n: exact_bytes(candidate(n)),
        lambda n: ratio * made.estimated_bytes(candidate(n)),
    )
    found = most_that_fits(sizer, highest, limit_bytes, slack_bytes)
    return candidate(max(0, found))
