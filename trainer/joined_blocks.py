"""Blocks of whole windows whose sums and norms live in the epilogues of their products.

The same blocks as the model's own, by kernels/epilogue.py and, with attention `flash4`,
kernels/joined_attention.py. What ends a block enters the next one in the same product.

Letters: B windows, T positions, D width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import epilogue, joined_attention
from trainer import layers
from trainer.layers import damp
from trainer.states import CastWeights, Stream

if TYPE_CHECKING:
    from trainer.model import GPT


@dataclass(frozen=True)
class _Entry:
    """What the entry of a block mixes into the stream, and the skips that wait for later ones."""

    mix_2D: Tensor
    skip: Tensor | None
    skip_weight_D: Tensor | None
    keep: bool
    """The stream itself waits for a later block, too."""
    waiting: tuple[Tensor, ...]


def run(
    model: "GPT",
    count: int,
    x0: Tensor,
    weights: CastWeights,
    rotary: tuple[Tensor, Tensor],
    value_embeds: dict[int, Tensor],
) -> Stream:
    """The first `count` blocks, at least one, of windows that begin with `x0`, [B, T, D]."""
    entry = _entry(model, 0, ())
    entered = epilogue.enter(x0, x0, entry.mix_2D, damp(0))
    for i in range(count):
        u, rows, factor_BT, kept = entered
        waiting = entry.waiting if kept is None else (*entry.waiting, kept)
        t, squares = _attention_half(model, i, u, rows, factor_BT, weights, rotary, value_embeds)
        half = (t, squares, weights.up[i], weights.down[i], damp(i))
        if i + 1 == count:
            return Stream(epilogue.mlp_half(*half), None, waiting)
        entry = _entry(model, i + 1, waiting)
        entered = epilogue.mlp_enter(
            *half, x0, entry.mix_2D, damp(i + 1),
            skip=entry.skip, skip_weight_D=entry.skip_weight_D, keep=entry.keep,
        )  # fmt: skip
    raise ValueError(f"{count} blocks to run: there must be at least one")


def _entry(model: "GPT", i: int, waiting: tuple[Tensor, ...]) -> _Entry:
    joins, skip, weight_D = i - model.encoder_layers, None, None
    mix_2D = model.block(i).resid_mix
    if joins == 0 and i > 0:
        # The innermost skip is the stream itself: x + w x is x with another factor.
        mix_2D = torch.stack((mix_2D[0] * (1 + model.skip_weights[0]), mix_2D[1]))
    elif joins > 0 and waiting:
        skip, weight_D, waiting = waiting[-1], model.skip_weights[joins], waiting[:-1]
    return _Entry(mix_2D, skip, weight_D, 0 < i < model.encoder_layers, waiting)


def _attention_half(
    model: "GPT",
    i: int,
    u: Tensor,
    rows: Tensor,
    factor_BT: Tensor,
    weights: CastWeights,
    rotary: tuple[Tensor, Tensor],
    value_embeds: dict[int, Tensor],
) -> tuple[Tensor, Tensor]:
    """u with attention's branch added, and partial sums of the squares of its rows."""
    gain_H, kv_heads = model.block(i).attn.q_gain, model.config.kv_heads
    heads = (value_embeds.get(i), gain_H, kv_heads, *rotary)
    if model.attention_backend == "flash4":
        return joined_attention.attention_half(
            rows, weights.qkv[i], factor_BT, *heads, weights.out[i], u
        )
    qkv = F.linear(rows, weights.qkv[i])
    attended = layers.attend_heads(
        qkv, *heads, factor_BT, attention=model.attention_backend, backend="epilogue"
    )
    return epilogue.linear_add(attended.flatten(2), weights.out[i], u)
