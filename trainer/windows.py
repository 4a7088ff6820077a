"""The plan of sliding windows: which positions of which window are scored. Pure.

A stream of N tokens has N - 1 targets; target j is token j + 1, predicted at input j. The first
window scores all its positions. Every later one ends `stride` inputs further on and scores only
those new ones, with the rest as context. The last window ends at the last input, so it may score
fewer, and is as long as the others: each target is scored exactly once.
"""

from dataclasses import dataclass

from trainer.errors import ConfigError


@dataclass(frozen=True)
class Window:
    """Inputs first..first+length-1, of which the last `new` positions are scored."""

    first: int
    length: int
    new: int

    @property
    def first_scored(self) -> int:
        """Index of the first target this window scores."""
        return self.first + self.length - self.new


def plan_windows(targets: int, seq_len: int, stride: int) -> list[Window]:
    """Windows that score `targets` targets once each, in order.

    Raises:
        ConfigError: no target, or a stride outside 1..seq_len.
    """
    if targets < 1:
        raise ConfigError("there is nothing to score: give at least two tokens")
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"eval.stride {stride} must lie in 1..{seq_len} (model.seq-len)")
    length = min(seq_len, targets)
    windows = [Window(0, length, length)]
    end = length
    while end < targets:
        new = min(stride, targets - end)
        end += new
        windows.append(Window(end - length, length, new))
    return windows
