"""Bits per matrix by sensitivity or measured damage, and the search for the most that fits.

A size counts only if it is exact; because Brotli-11 takes long on the record's model, a cheap
size, rescaled by what was learnt, brackets the answer first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trainer.config import QuantConfig

WIDTHS = (4, 4.5, 5, 5.5, 6, 7, 8)
"""Bits that `measured` chooses among: fineness of the step, since once the codes are compressed
their entropy counts and not their range. Half a bit is a step of 2^0.5."""

BUDGETS = 1 << 14
"""Budgets that the knapsack tells apart: about 1 kB each on the record's model."""

ESTIMATED_TRIES, EXACT_TRIES = 4, 12
"""Most exact sizes taken in one search; those after the first few bisect, whatever the cheap size
says."""


def sensitivity(hessians: dict[str, Tensor]) -> dict[str, float]:
    """trace(H) of every matrix: the squared size of its inputs, by which its errors grow."""
    return {name: h.diagonal().sum().item() for name, h in hessians.items()}


def ranked(sensitivities: dict[str, float]) -> list[str]:
    """Names by descending sensitivity; by name where they tie."""
    return sorted(sensitivities, key=lambda name: (-sensitivities[name], name))


def bits_with(order: list[str], int6_matrices: int) -> dict[str, float]:
    """int6 for the first `int6_matrices` of `order`, int5 for the rest."""
    return {name: 6 if i < int6_matrices else 5 for i, name in enumerate(order)}


def fixed_count(config: QuantConfig, matrices: int) -> int:
    """int6 matrices under `int5`, `int6` and `mixed`."""
    return {"int5": 0, "int6": matrices, "mixed": min(config.int6_matrices, matrices)}[config.bits]


class Knapsack:
    """The least total damage for every budget of bytes, one width for each matrix.

    A multiple-choice knapsack solved by dynamic programming over the matrices (Kellerer, Pferschy
    and Pisinger 2004, ch. 11): exact but for sizes rounded to a BUDGETS-th of their range.

    Args:
        damage: nats per token, by name, then bits.
        sizes: bytes, likewise.
    """

    def __init__(
        self, damage: dict[str, dict[float, float]], sizes: dict[str, dict[float, float]]
    ) -> None:
        self._options: dict[str, list[tuple[float, int]]] = {}
        """(bits, units above the smallest) of every matrix, by ascending size."""
        unit = sum(max(s.values()) - min(s.values()) for s in sizes.values()) / BUDGETS or 1.0
        for name, by_bits in sizes.items():
            least = min(by_bits.values())
            ordered = sorted(by_bits, key=lambda bits: by_bits[bits])
            self._options[name] = [(b, round((by_bits[b] - least) / unit)) for b in ordered]
        self.highest = sum(options[-1][1] for options in self._options.values())
        """The budget at which every matrix has its largest width; 0: all have their smallest."""
        least_damage = np.zeros(self.highest + 1)
        self._choices: list[np.ndarray] = []
        """Of each matrix, the option to take at every budget left for it and those before it."""
        for name, options in self._options.items():
            tried = np.full((len(options), self.highest + 1), np.inf)
            for i, (bits, units) in enumerate(options):
                left = least_damage[: self.highest + 1 - units]
                tried[i, units:] = left + damage[name][bits]
            self._choices.append(tried.argmin(axis=0).astype(np.int8))
            least_damage = tried.min(axis=0)

    def bits(self, budget: int) -> dict[str, float]:
        """Bits of every matrix at a budget of 0..highest."""
        chosen: dict[str, float] = {}
        for (name, options), choice in reversed(
            list(zip(self._options.items(), self._choices, strict=True))
        ):
            bits, units = options[choice[budget]]
            chosen[name] = bits
            budget -= units
        return {name: chosen[name] for name in self._options}


@dataclass(frozen=True)
class Sizer:
    """Compressed size in bytes of a candidate: exact, and cheap but proportional to it."""

    exact: Callable[[int], int]
    cheap: Callable[[int], float]


def most_that_fits(
    sizer: Sizer,
    highest: int,
    limit_bytes: int,
    slack_bytes: int = 0,
    known: dict[int, int] | None = None,
) -> int:
    """Largest n in 0..highest whose exact size fits, sizes growing with n; -1 if none does.

    Bisects the cheap size, confirms by the exact one and corrects the cheap one to pass through
    every exact size known; at most EXACT_TRIES times. Stops early at a count that fits with
    `slack_bytes` or less to spare.

    Args:
        sizer: the sizes.
        highest: largest count that exists.
        limit_bytes: what fits.
        slack_bytes: room that may stay unused.
        known: exact sizes already taken, by count.
    """
    ratios = {n: size / sizer.cheap(n) for n, size in (known or {}).items()}
    low, high = -1, highest + 1  # low fits (or is -1), high does not
    for tried in range(EXACT_TRIES):
        if high - low <= 1:
            break
        if tried < ESTIMATED_TRIES:
            aim = limit_bytes - slack_bytes / 2
            guess = _boundary(lambda n: _corrected(sizer.cheap(n), n, ratios), low, high, aim)
        else:
            guess = (low + high) // 2
        size = sizer.exact(guess)
        ratios[guess] = size / sizer.cheap(guess)
        if size > limit_bytes:
            high = guess
            continue
        low = guess
        if limit_bytes - size <= slack_bytes:
            break
    return low


def _corrected(cheap: float, n: int, ratios: dict[int, float]) -> float:
    """Cheap size times exact / cheap, interpolated between the counts where that is known."""
    if not ratios:
        return cheap
    counts = sorted(ratios)
    return cheap * float(np.interp(n, counts, [ratios[c] for c in counts]))


def _boundary(size: Callable[[int], float], low: int, high: int, limit: float) -> int:
    """Largest n strictly between low and high whose size fits; low + 1 if none does."""
    first, last = low + 1, high - 1
    while first < last:
        middle = (first + last + 1) // 2
        if size(middle) <= limit:
            first = middle
        else:
            last = middle - 1
    return first
