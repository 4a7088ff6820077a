"""Everything that was found about one model, and its JSON form."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from profiles.model.allocator import PointOnFrontier, Scheme
from profiles.model.calibration import Calibration
from profiles.model.heads import THRESHOLD, Heads
from profiles.model.losses import Part
from profiles.model.ranks import Rank
from profiles.model.sensitivity import Agreement, ByMatrix
from profiles.model.subject import Estimate


@dataclass(frozen=True)
class Text:
    """The held-out text that the model was looked at with."""

    name: str
    windows: int
    sweep_windows: int
    """The first of them, on which each matrix alone was tried."""
    seq_len: int

    @property
    def tokens(self) -> int:
        """Targets scored."""
        return self.windows * self.seq_len


@dataclass(frozen=True)
class Findings:
    """One analysis."""

    run: str
    device: str
    commit: str
    text: Text
    loss: Estimate
    """Held-out loss of the unquantized model."""
    ranks: dict[str, Rank]
    held_out: dict[float, dict[str, Estimate]]
    """Change of the held-out loss when one matrix is quantized, by bits, then matrix."""
    held_out_by_kind: dict[float, dict[str, Estimate]]
    """The same, summed over layers; also MLP, attention and all."""
    expected: dict[str, dict[float, float]]
    """Expected damage on the model's own text, by matrix, then bits."""
    sizes: dict[str, dict[float, float]]
    """Estimated compressed bytes, likewise."""
    trace: ByMatrix
    agreements: list[Agreement]
    heads: Heads
    by_class: list[Part]
    by_position: list[Part]
    calibration: Calibration
    schemes: list[Scheme]
    frontier: list[PointOnFrontier]
    limit_bytes: int
    """What the artifact may take: the run's limit less the code."""
    seconds: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the figures that the summary derives from them."""
        plain = dataclasses.asdict(self)
        for head, row in zip(self.heads.heads, plain["heads"]["heads"], strict=True):
            row["name"] = head.name()
        plain["heads"]["threshold"] = THRESHOLD
        plain["calibration"]["error"] = self.calibration.error
        return plain
