"""Does a set of seeds beat an earlier record? Welch's test, and the published figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from trainer.errors import ConfigError

RECORD_NATS = (1.87174, 1.87187, 1.87306)
"""The record's nats per token with SLOT `shared`; seeds 314, 999, 1337."""

PREVIOUS_RECORD_NATS = (1.8798, 1.8800, 1.8820)
"""The record before it, per seed."""

MARGIN_NATS = 0.005
"""A new record must be better by this much."""

ALPHA = 0.01
"""... at this significance."""


@dataclass(frozen=True)
class Welch:
    """Welch's unequal-variances t-test of two samples."""

    t: float
    df: float
    p: float
    """One-sided: the chance of so low a mean, were the two alike."""
    difference_nats: float

    @property
    def clears_bar(self) -> bool:
        """Whether the contest would count the first sample as a new record."""
        return -self.difference_nats >= MARGIN_NATS and self.p < ALPHA


def welch(new: Sequence[float], old: Sequence[float]) -> Welch:
    """Test that `new` has a lower mean than `old` (nats per token of each seed).

    Source: Welch 1947, through scipy.stats.ttest_ind.

    Raises:
        ConfigError: fewer than two seeds on a side.
    """
    if min(len(new), len(old)) < 2:
        raise ConfigError("a significance test needs at least two seeds on each side")
    result: Any = stats.ttest_ind(new, old, equal_var=False, alternative="less")
    difference = sum(new) / len(new) - sum(old) / len(old)
    return Welch(float(result.statistic), float(result.df), float(result.pvalue), difference)
