"""Tensors a forward pass carries: weights as cast, the stream between blocks, generation's cache.

Letters: B batch, T positions, L layers, D width, H query heads, G key/value heads, K head size,
F MLP width.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class KVCache:
    """Static buffers for generation, filled in place so that a CUDA graph can replay a step."""

    k_LBTGK: Tensor
    v_LBTGK: Tensor
    position: Tensor
    """Number of tokens seen, 0-dim int64 on the device."""
    last_ids_B1: Tensor
    last_x_B1D: Tensor
    """Normalised embedding of the last token, before SmearGate."""
    span: int
    """Slots that attention reads, from the first; the tokens of a step must lie within."""

    def reset(self) -> None:
        """Forget everything, in place."""
        for buffer in (self.k_LBTGK, self.v_LBTGK, self.last_x_B1D):
            buffer.zero_()
        self.position.zero_()
        self.last_ids_B1.zero_()


@dataclass(frozen=True)
class CastWeights:
    """The matrices of one forward pass, in the compute dtype (fake-quantized in late QAT).

    A block's scales of its two branches are folded into the rows of `out` and `down`: one rounding
    of a weight as before, and neither branch is touched again before it is added.
    """

    qkv: Tensor
    """[L, (H + 2 G) K, D]: queries, keys and values in one product."""
    out: Tensor
    """[L, D, D]."""
    up: Tensor
    """[L, F, D]."""
    down: Tensor
    """[L, D, F]."""
    bigram_proj: Tensor
    ve_proj: Tensor


@dataclass(frozen=True)
class Stream:
    """The residual stream between two blocks: [B, T, D], with a sum still to be made.

    The next kernel that reads `x` adds `branch` on the way, so that the sum costs no pass.
    """

    x: Tensor
    branch: Tensor | None = None
    skips: tuple[Tensor, ...] = ()
    """Outputs of earlier blocks that wait to be added to later ones, innermost last."""
