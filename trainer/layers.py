"""The parts of a block, as functions of tensors, and the small embedding modules.

Letters: B batch, T positions, S cached positions, D width, H query heads, G key/value heads,
K head size, R rotary dims, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import flash4, passes
from trainer.config import AttentionBackend, ModelConfig, PassesBackend


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, both float32 [seq_len, R/2].

    The base is stretched for contexts longer than `rotary_native_len` (NTK-aware scaling), and
    depends on the configured context alone: a shorter input must see the same angles, or cached
    generation would disagree with the full forward.
    """
    stretch = max(1.0, config.seq_len / config.rotary_native_len)
    dims = config.rotary_dims
    base = config.rotary_base * stretch ** (dims / (dims - 2))
    frequency = base ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angle = torch.outer(torch.arange(config.seq_len, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def damp(i: int) -> float:
    """Factor on the norms of block i."""
    return 1 / math.sqrt(i + 1)


def attend_heads(
    qkv_BTW: Tensor,
    value_embed: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    factor_BT: Tensor | None = None,
    *,
    attention: AttentionBackend,
    backend: PassesBackend,
) -> Tensor:
    """Attention [B, T, H, K] between the heads of a joint projection, XSA included.

    Args:
        qkv_BTW, value_embed, gain_H, kv_heads, cos, sin: those of `kernels.passes.split_heads`.
        factor_BT: what its rows are still to be multiplied by, if anything.
        attention: implementation, by name; errors are those of `causal_attention`.
        backend: implementation of the passes, by name.
    """
    heads = (qkv_BTW, value_embed, gain_H, kv_heads, cos, sin)
    q, k, v, own_v = passes.split_heads(*heads, factor_BT, backend=backend)
    y = causal_attention(q, k, v, attention)
    return passes.exclude_self(y, own_v, backend=backend)


def causal_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, backend: AttentionBackend
) -> Tensor:
    """Causal grouped-query attention, scale 1/sqrt(K); returns [B, T, H, K].

    Raises:
        ValueError: `flash4` was named and cannot take these inputs.
        RuntimeError: `cudnn` was named and cuDNN cannot run these inputs, or `flash4` and its
            package or a Hopper GPU is missing.
    """
    if backend == "flash4":
        return flash4.attention(q_BTHK, k_BTGK, v_BTGK)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    if backend == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def cached_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, positions_T: Tensor) -> Tensor:
    """Attention of few queries to S slots; slot s counts if s <= the query's position.

    The query heads that share a key head are laid side by side as queries of one head, so that
    keys are not repeated.
    """
    groups = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.unflatten(2, (groups, -1))
    repeats = q_BTGRK.shape[3]
    q = q_BTGRK.permute(0, 2, 3, 1, 4).flatten(2, 3)
    slots_S = torch.arange(k_BSGK.shape[1], device=k_BSGK.device)
    seen_TS = slots_S[None, :] <= positions_T[:, None]
    y = F.scaled_dot_product_attention(
        q, k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2), attn_mask=seen_TS.repeat(repeats, 1)
    )
    return y.unflatten(2, (repeats, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class SmearGate(nn.Module):
    """Mix each position with the one before it: (1-g) x_t + g x_{t-1}, g = sigmoid(gate)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTD: Tensor, before_B1D: Tensor) -> Tensor:
        """`before_B1D` is the position before the first one; zeros at the start of a window."""
        previous = torch.cat((before_B1D, x_BTD[:, :-1]), dim=1)
        g = torch.sigmoid(self.gate).to(x_BTD.dtype)
        return (1 - g) * x_BTD + g * previous


class ProjectedEmbedding(nn.Module):
    """A narrow table, a projection to the model's width, and a learned scale."""

    def __init__(self, rows: int, dim: int, width: int, scale: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, dim)
        self.proj = nn.Linear(dim, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(scale))
        nn.init.orthogonal_(self.proj.weight)

    def forward(self, rows_BT: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed int64 rows [B, T] to [B, T, width]; `weight` is `proj.weight`, cast to `dtype`."""
        projected = F.linear(self.embed(rows_BT).to(dtype), weight)
        return projected * self.scale.to(dtype)


def bigram_buckets(ids_BT: Tensor, before_B1: Tensor, positions_T: Tensor, buckets: int) -> Tensor:
    """Hash of each token and the one before it, int64 [B, T] in 0..buckets-1.

    ((36313 id_t) xor (27191 id_{t-1})) mod (buckets-1) in int32 arithmetic; position 0 has no
    predecessor and takes the last bucket. Source: the published record.

    Args:
        ids_BT: token ids.
        before_B1: the id before the first one (any value at position 0).
        positions_T: position of every column of `ids_BT`.
        buckets: rows of the table.
    """
    ids = ids_BT.int()
    previous = torch.cat((before_B1.int(), ids[:, :-1]), dim=1)
    mixed = torch.bitwise_xor(36313 * ids, 27191 * previous) % (buckets - 1)
    return torch.where(positions_T == 0, buckets - 1, mixed.long())
