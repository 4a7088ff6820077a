"""The presets. Every number of the record is a default of `trainer/config.py`; its source is the
published record (Parameter Golf, 1.1088 bits per byte in 600 s on 8 H100s)."""

from trainer.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)

RECORD = RunConfig()
"""The record: 29,951,068 parameters, 600 s, CUDA with the fused kernels."""

SMOKE = RunConfig(
    device="cpu",
    compute_dtype="float32",
    mlp="reference",
    attention="sdpa",
    passes="reference",
    compile=False,
    model=ModelConfig(
        seq_len=256,
        width=128,
        layers=5,
        query_heads=4,
        kv_heads=2,
        mlp_width=448,
        rotary_dims=8,
        bigram_dim=32,
        value_embed_layers=(3, 4),
        value_embed_dim=32,
    ),
    data=DataConfig(),
    optim=OptimConfig(),
    train=TrainConfig(
        max_seconds=None,
        max_steps=300,
        sequences_per_step=32,
        priming_steps=0,
        checkpoint_every_s=20.0,
    ),
    quant=QuantConfig(int6_matrices=5),
    eval=EvalConfig(),
)
"""The same pipeline, tiny, on a CPU in a few minutes: every stage, none of the claims."""

PRESETS: dict[str, tuple[str, RunConfig]] = {
    "record": ("The record's settings; needs a CUDA GPU.", RECORD),
    "smoke": ("A tiny model on a CPU, every stage, a few minutes.", SMOKE),
}
