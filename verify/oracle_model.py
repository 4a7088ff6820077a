"""The GPT once more, in plain numpy float64 and explicit loops: the oracle of the model's checks.

It shares no code with `trainer`. `weights` are arrays by `state_dict` name.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]


def normalised(x: Array) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.finfo(np.float32).eps)


def signed_32(value: int) -> int:
    """Two's complement wrap of a Python integer to 32 bits."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def bigram_bucket(ids: list[int], t: int, buckets: int) -> int:
    if t == 0:
        return buckets - 1
    mixed = signed_32(36313 * ids[t]) ^ signed_32(27191 * ids[t - 1])
    return mixed % (buckets - 1)


def rotated(vector: Array, position: int, rotary_dims: int, seq_len: int, config: Any) -> Array:
    stretch = seq_len / config.rotary_native_len
    base = config.rotary_base
    if stretch > 1:
        base = base * stretch ** (rotary_dims / (rotary_dims - 2))
    out = vector.copy()
    half = rotary_dims // 2
    for j in range(half):
        angle = position / base ** (2 * j / rotary_dims)
        a, b = vector[j], vector[j + half]
        out[j] = a * math.cos(angle) + b * math.sin(angle)
        out[j + half] = b * math.cos(angle) - a * math.sin(angle)
    return out


def embedded(ids: list[int], w: Weights, config: Any) -> Array:
    rows = []
    for t, token in enumerate(ids):
        bucket = bigram_bucket(ids, t, config.bigram_buckets)
        bigram = w["bigram.proj.weight"] @ w["bigram.embed.weight"][bucket]
        rows.append(w["tok_emb.weight"][token] + bigram * w["bigram.scale"])
    x = normalised(np.stack(rows))
    gate = 1 / (1 + np.exp(-w["smear.gate"]))
    smeared = x.copy()
    for t in range(len(ids)):
        before = x[t - 1] if t else np.zeros_like(x[0])
        smeared[t] = (1 - gate) * x[t] + gate * before
    return smeared


def attended(i: int, x: Array, ids: list[int], w: Weights, config: Any) -> Array:
    L, K = config.layers, config.width // config.query_heads
    group_of = [h // (config.query_heads // config.kv_heads) for h in range(config.query_heads)]
    q, k = x @ w["qo_bank"][i].T, x @ w["kv_bank"][i].T
    v = x @ w["kv_bank"][L + i].T
    if i in config.value_embed_layers:
        n = config.value_embed_layers.index(i)
        table = w["ve_shared.embed.weight"][ids] @ w["ve_shared.proj.weight"].T
        v = v + table * w["ve_shared.scale"] * w[f"ve_layer_scales.{n}"]
    T = len(ids)
    out = np.zeros((T, config.width))
    for h, g in enumerate(group_of):
        qs = [
            rotated(normalised(q[t, h * K : (h + 1) * K]), t, config.rotary_dims, config.seq_len,
                    config) * w[f"blocks.{i}.attn.q_gain"][h]
            for t in range(T)
        ]  # fmt: skip
        ks = [
            rotated(normalised(k[t, g * K : (g + 1) * K]), t, config.rotary_dims, config.seq_len,
                    config)
            for t in range(T)
        ]  # fmt: skip
        for t in range(T):
            scores = np.array([qs[t] @ ks[s] / math.sqrt(K) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            y = sum(weights[s] * v[s, g * K : (g + 1) * K] for s in range(t + 1))
            own = v[t, g * K : (g + 1) * K]
            unit = own / np.linalg.norm(own)
            out[t, h * K : (h + 1) * K] = y - (y @ unit) * unit
    return out @ w["qo_bank"][L + i].T


def perceptron(i: int, x: Array, w: Weights) -> Array:
    pre = x @ w["mlp_up_bank"][i].T
    leaky = np.where(pre > 0, pre, 0.5 * pre)
    return leaky**2 @ w["mlp_down_bank"][i].T


def logits(ids: list[int], w: Weights, config: Any) -> Array:
    """Next-token logits [T, V] of one window."""
    L = config.layers
    x0 = embedded(ids, w, config)
    x = x0
    outputs: list[Array] = []
    for i in range(L):
        first_half = i < L // 2
        if not first_half and i - L // 2 < L // 2:
            j = i - L // 2
            x = x + w["skip_weights"][j] * outputs[L // 2 - 1 - j]
        mix = w[f"blocks.{i}.resid_mix"]
        u = mix[0] * x + mix[1] * x0
        y = attended(i, normalised(u) / math.sqrt(i + 1), ids, w, config)
        x = u + w[f"blocks.{i}.attn_scale"] * y
        z = perceptron(i, normalised(x) / math.sqrt(i + 1), w)
        x = x + w[f"blocks.{i}.mlp_scale"] * z
        outputs.append(x)
    cap = config.logit_softcap
    return cap * np.tanh(normalised(x) @ w["tok_emb.weight"].T / cap)
