"""Does a set of seeds beat an earlier result? Welch's test, and the published figures.

Two results are compared only if both are causal or both are not, and only on the same text: nats
per token differ more between two texts than between a record and the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from trainer.config import SlotMode
from trainer.errors import ConfigError

RECORD_NATS = (1.87174, 1.87187, 1.87306)
"""The record's nats per token with SLOT `shared`; seeds 314, 999, 1337."""

PREVIOUS_RECORD_NATS = (1.8798, 1.8800, 1.8820)
"""The record before it, per seed: plain sliding windows."""

MARGIN_NATS = 0.005
"""A new record must be better by this much."""

ALPHA = 0.01
"""... at this significance."""

PUBLISHED_WINDOW = 2048
"""The published code scores whole windows of this many targets and drops the rest of the text."""


@dataclass(frozen=True)
class Text:
    """The scored text. Texts with a digest are told apart by it, others by their length alone."""

    name: str
    tokens: int
    """Scored tokens and the first one, which is only read."""
    sha256: str | None = None
    """Of the tokens; None: not published."""

    def same_as(self, other: "Text") -> bool:
        """Whether both are one text, as far as can be told."""
        if self.sha256 is not None and other.sha256 is not None:
            return self.sha256 == other.sha256
        a, b = ((text.tokens - 1) // PUBLISHED_WINDOW for text in (self, other))
        return a == b


FINEWEB = Text("FineWeb validation split, sp1024", 62_021_632 + 1)
"""The contest's held-out text; the length is in the logs published with every submission."""


@dataclass(frozen=True)
class Result:
    """Nats per token of several seeds, and what must be known to compare them."""

    name: str
    mode: SlotMode
    causal: bool
    nats: tuple[float, ...]
    text: Text
    hardware: str

    @property
    def mean_nats(self) -> float:
        """Mean over the seeds."""
        return sum(self.nats) / len(self.nats)


PUBLISHED = (
    Result("published-previous", "off", True, PREVIOUS_RECORD_NATS, FINEWEB, "8 x H100"),
    Result("published-record", "shared", False, RECORD_NATS, FINEWEB, "8 x H100"),
)
"""The published results. Their own comparison, t = -9.98, set a non-causal score against a causal
one; the authors later withdrew the non-causal one."""


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
        ConfigError: fewer than two seeds on a side, or no spread on either.
    """
    if min(len(new), len(old)) < 2:
        raise ConfigError("a significance test needs at least two seeds on each side")
    if len(set(new)) == len(set(old)) == 1:
        raise ConfigError(
            "neither side has any spread, so significance has no meaning: are the seeds different?"
        )
    result: Any = stats.ttest_ind(new, old, equal_var=False, alternative="less")
    difference = sum(new) / len(new) - sum(old) / len(old)
    return Welch(float(result.statistic), float(result.df), float(result.pvalue), difference)


def obstacle(new: Result, old: Result) -> str | None:
    """Why the two must not be compared; None: they may."""
    if new.causal != old.causal:
        causal, other = (new, old) if new.causal else (old, new)
        return (
            f"{causal.name} (SLOT {causal.mode}) is causal, {other.name} (SLOT {other.mode}) is "
            "not: a score that saw its own targets says nothing about one that did not"
        )
    if not new.text.same_as(old.text):
        return (
            f"{new.name} was scored on other text ({_described(new.text)}) than {old.name} "
            f"({_described(old.text)}): their nats per token have no common scale"
        )
    return None


def _described(text: Text) -> str:
    digest = "" if text.sha256 is None else f", SHA-256 {text.sha256[:12]}"
    return f"{text.name}, {text.tokens:,} tokens{digest}"
