"""Paths through the record's training step: the same training, by different implementations."""

from dataclasses import dataclass, replace

from bench.scale import Scale, current
from trainer.config import AttentionBackend, MlpBackend, PassesBackend


@dataclass(frozen=True)
class Choice:
    """Implementations of one path, by name."""

    mlp: MlpBackend
    passes: PassesBackend
    attention: AttentionBackend = "cudnn"

    def options(self) -> tuple[str, ...]:
        """The trainer's options that choose them."""
        return (f"--mlp={self.mlp}", f"--passes={self.passes}", f"--attention={self.attention}")

    def scale(self) -> Scale:
        """The record's shapes with these implementations."""
        base = current()
        chosen = replace(base.config, mlp=self.mlp, passes=self.passes, attention=self.attention)
        return Scale(chosen, base.device)


PATHS = {
    "plain": Choice("reference", "reference"),
    "fused MLP": Choice("cutlass", "reference"),
    "fused MLP and passes": Choice("cutlass", "triton"),
    "with flash4": Choice("cutlass", "triton", "flash4"),
    "with epilogues": Choice("cutlass", "epilogue"),
    "with epilogues and flash4": Choice("cutlass", "epilogue", "flash4"),
}
"""Each further from the published formulation than the one before; flash4 is a package apart."""


def unknown(names: set[str]) -> list[str]:
    """Those of the names that are no path's."""
    return sorted(names - PATHS.keys())
