"""Small models with random weights, for every check that needs one."""

import torch

from trainer.config import ModelConfig
from trainer.model import GPT

TINY = ModelConfig(
    vocab_size=64,
    seq_len=24,
    width=32,
    layers=5,
    query_heads=4,
    kv_heads=2,
    mlp_width=48,
    rotary_dims=4,
    rotary_native_len=16,
    bigram_buckets=97,
    bigram_dim=8,
    value_embed_layers=(1, 4),
    value_embed_dim=8,
)
"""Odd depth, stretched rotary base, two value-embedding layers: every branch of the model."""

TINY_RUN = (
    "--model.seq-len=32",
    "--model.width=32",
    "--model.layers=3",
    "--model.query-heads=2",
    "--model.kv-heads=1",
    "--model.mlp-width=48",
    "--model.bigram-dim=8",
    "--model.value-embed-layers=2",
    "--model.value-embed-dim=8",
    "--eval.stride=8",
)
"""Overrides of the smoke preset: a run that trains in seconds."""


def random_model(
    config: ModelConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float32
) -> GPT:
    """A GPT whose every parameter is random: the initial zeros would hide faults."""
    torch.manual_seed(seed)
    model = GPT(config, compute_dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p.shape[-1] if p.ndim > 1 else 1
            spread = 0.3 if "embed" in name or "tok_emb" in name else 1 / fan_in**0.5
            centre = 1.0 if p.ndim <= 1 and "gate" not in name else 0.0
            p.copy_(centre + (0.3 if p.ndim <= 1 else spread) * torch.randn_like(p))
        for i in range(config.layers):
            block = model.block(i)
            block.resid_mix.copy_(torch.rand_like(block.resid_mix) + 0.5)
        model.skip_weights.copy_(torch.rand_like(model.skip_weights) + 0.5)
    return model.requires_grad_(False)
