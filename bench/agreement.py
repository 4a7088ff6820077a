"""Do the losses of two world sizes agree? Judged by what the order of sums alone does. Pure.

Another world size adds the same gradients in another order. In bfloat16 that is a fresh rounding
of every sum, and training amplifies it from step to step, so no fixed tolerance holds for all
steps. The yardstick is a run on one GPU whose windows come in another order within every step:
the same mean gradient, other roundings, the same amplification.
"""

import math
from dataclasses import dataclass

BLOCK_STEPS = 10
"""Differences are compared as root mean squares over so many steps: single ones cross zero."""
LIMIT = 6.0
"""Times the yardstick's difference.

Several ranks round more often: each rank's mean and each partial sum on its way through the ring
(for 8 ranks up to 3.3 squared roundings where one GPU has 1.1), which makes the difference at
most sqrt((3.3 + 1.1) / (2 x 1.1)) = 1.4 times the yardstick's. The rest, 4.2, is chance: a block
of an amplified difference is worth about five independent values, and two root mean squares of
five values differ by more than that once in 300 times (F distribution with 5 and 5 degrees).
Tried on a tiny model in bfloat16: 60 pairings of permuted runs reached at most 3.1, two ranks
against them 1.1 to 2.9."""
LOSS_ROUNDINGS = 16
"""Single-precision roundings in the mean of a step's losses: the finest difference that counts."""


@dataclass(frozen=True)
class Agreement:
    """How far a run's losses lie from those of the plain run on one GPU.

    Attributes:
        rms_nats: root mean square of the differences over all steps.
        yardstick_nats: the same of the yardstick runs.
        worst: the largest block's difference, in units of the yardstick's up to there.
        first_nats: difference at the first step, where weights are still equal.
    """

    rms_nats: float
    yardstick_nats: float
    worst: float
    first_nats: float

    @property
    def holds(self) -> bool:
        """Within LIMIT everywhere."""
        return self.worst <= LIMIT


def compare(base: list[float], yardsticks: list[list[float]], losses: list[float]) -> Agreement:
    """Losses (nats, one a step) of a run against those of the plain run on one GPU.

    Args:
        base: the plain run on one GPU.
        yardsticks: runs on one GPU with their windows in other orders; at least one.
        losses: the run to judge.
    """
    finest = LOSS_ROUNDINGS * 2**-24 * base[0]
    allowed = finest
    worst = 0.0
    for first in range(0, len(base), BLOCK_STEPS):
        block = slice(first, first + BLOCK_STEPS)
        # Amplification grows: what an earlier block allowed, a later one does too.
        allowed = max(allowed, *(_rms(base[block], run[block]) for run in yardsticks))
        worst = max(worst, _rms(base[block], losses[block]) / allowed)
    return Agreement(
        rms_nats=_rms(base, losses),
        yardstick_nats=max(_rms(base, run) for run in yardsticks),
        worst=worst,
        first_nats=abs(losses[0] - base[0]),
    )


def _rms(a: list[float], b: list[float]) -> float:
    """Root mean square of the differences."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))
