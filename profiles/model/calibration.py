"""Is a prediction made with 70 % confidence right 70 % of the time?

Expected calibration error (Guo et al. 2017): guesses are put into 15 bins of equal width by the
probability of the likeliest token; the error is the mean, weighted by the guesses in a bin, of
|share that was right - mean probability|.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Guesses of like confidence."""

    tokens: int
    confidence: float
    """Mean probability of the likeliest token."""
    accuracy: float
    """Share of the guesses that were right."""


@dataclass(frozen=True)
class Calibration:
    """The bins that hold any guess, by ascending confidence."""

    bins: list[Bin]

    @property
    def tokens(self) -> int:
        """Guesses in all bins."""
        return sum(b.tokens for b in self.bins)

    @property
    def error(self) -> float:
        """Expected calibration error, 0..1."""
        gaps = sum(b.tokens * abs(b.accuracy - b.confidence) for b in self.bins)
        return gaps / self.tokens


def calibration(confidence: Tensor, correct: Tensor) -> Calibration:
    """Bin guesses, given their probabilities and whether they were right (any one shape)."""
    confidence, right = confidence.flatten().double(), correct.flatten().double()
    at = (confidence * BINS).long().clamp_max(BINS - 1)
    zeros = torch.zeros(BINS, dtype=torch.float64, device=at.device)
    counts = zeros.index_add(0, at, torch.ones_like(confidence)).tolist()
    probabilities = zeros.index_add(0, at, confidence).tolist()
    hits = zeros.index_add(0, at, right).tolist()
    return Calibration(
        [
            Bin(int(n), p / n, h / n)
            for n, p, h in zip(counts, probabilities, hits, strict=True)
            if n > 0
        ]
    )
