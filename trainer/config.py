"""The settings of a run, as frozen dataclasses. Values and their sources: `trainer/record.py`.

The text under each field is what `python -m trainer --help` prints.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.errors import ConfigError

MICRO_BATCHES = 8
"""Micro-batches in a step, all ranks together (the record: one on each of 8 GPUs)."""

RECORD_STEPS = 6819
"""Steps of the published record (mean of three seeds). Step counts in settings refer to it."""

SIZE_LIMIT_BYTES = 16_000_000
"""The contest's limit on artifact plus code, decimal."""

MlpBackend = Literal["reference", "triton", "cutlass"]
AttentionBackend = Literal["sdpa", "cudnn", "flash4"]
PassesBackend = Literal["reference", "triton", "epilogue"]
SlotMode = Literal["off", "context", "shared"]
"""off: plain scoring."""
SlotVariant = Literal["context", "shared"]
BitScheme = Literal["mixed", "int5", "int6", "budgeted", "measured"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the GPT. Defaults are the record's 29,951,068 parameters."""

    vocab_size: int = 1024
    """V: pieces in the tokenizer."""
    seq_len: int = 2048
    """T: positions in a window; also fixes the rotary base."""
    width: int = 512
    """D: channels of the residual stream."""
    layers: int = 11
    """L: transformer blocks."""
    query_heads: int = 8
    """H: query heads; D/H is the head size K."""
    kv_heads: int = 4
    """G: key/value heads; must divide H."""
    mlp_width: int = 1792
    """F: hidden channels of the MLP (3.5 x D in the record)."""
    rotary_dims: int = 16
    """Leading dims of each head that rotary position encoding turns."""
    rotary_base: float = 10_000.0
    """Rotary base for contexts up to rotary_native_len."""
    rotary_native_len: int = 1024
    """Longest context, in tokens, before the rotary base is stretched."""
    q_gain: float = 1.5
    """Initial gain of every query head after RMS normalisation."""
    logit_softcap: float = 30.0
    """Logits are softcap * tanh(logits / softcap)."""
    embed_std: float = 0.005
    """Standard deviation of the initial token embedding."""
    bigram_buckets: int = 3072
    """Rows of the bigram hash table; the last one is position 0's."""
    bigram_dim: int = 112
    """Width of the bigram hash table."""
    bigram_scale: float = 0.05
    """Initial scale of the bigram embedding."""
    value_embed_layers: tuple[int, ...] = (9, 10)
    """Layers whose values receive the shared value embedding."""
    value_embed_dim: int = 128
    """Width of the value embedding table."""
    value_embed_std: float = 0.01
    """Standard deviation of the initial value embedding table."""
    value_embed_scale: float = 0.1
    """Initial scale of the value embedding."""

    @property
    def head_size(self) -> int:
        """K: channels of one head."""
        return self.width // self.query_heads

    @property
    def kv_width(self) -> int:
        """G * K: rows of a key or value matrix."""
        return self.kv_heads * self.head_size

    def __post_init__(self) -> None:
        if self.width % self.query_heads or self.query_heads % self.kv_heads:
            raise ConfigError(
                f"width {self.width}, query_heads {self.query_heads}, kv_heads {self.kv_heads}: "
                "query_heads must divide width and kv_heads must divide query_heads"
            )
        if self.width % 8 or self.mlp_width % 8:
            raise ConfigError("width and mlp_width must be multiples of 8 (16-byte rows for TMA)")
        if self.rotary_dims % 2 or not 2 < self.rotary_dims <= self.head_size:
            raise ConfigError(
                f"rotary_dims {self.rotary_dims} must be even, above 2 and at most the head size "
                f"{self.head_size}"
            )
        bad = [i for i in self.value_embed_layers if not 0 <= i < self.layers]
        if bad:
            raise ConfigError(f"value_embed_layers {bad} are outside the {self.layers} layers")


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from, and how batches mix shards."""

    dir: Path | None = None
    """Folder with *_train_*.bin, *_val_*.bin and a .model tokenizer; none: the embedded corpus."""
    mix_shards_start: int = 8
    """Shards mixed into a batch at the start (fewer if there are fewer)."""
    mix_shards_end: int = 64
    """Shards mixed into a batch once mixing has widened; the record's 8 ranks x 8."""
    mix_exponent_start: float = 0.9
    """A shard is drawn with probability ~ remaining_blocks ^ exponent; this is the first."""
    mix_exponent_end: float = 0.5
    """The last such exponent."""
    mix_steps: int = 1800
    """Batches over which mixing widens, of 6,819; scaled down in shorter runs."""
    queue_batches: int = 8
    """Batches the loader thread prepares ahead."""


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the banks, AdamW for the rest."""

    muon_lr: float = 0.025
    """Learning rate of the banks."""
    muon_momentum_start: float = 0.92
    """First Muon momentum."""
    muon_momentum_end: float = 0.99
    """Muon momentum after its warm-up."""
    muon_momentum_steps: int = 1500
    """Steps of momentum warm-up, of 6,819; scaled down in shorter runs."""
    muon_variant: Literal["newton_schulz", "turbo"] = "newton_schulz"
    """Orthogonalisation: the record's, or Turbo-Muon (published as 0.0018 BPB worse)."""
    embed_lr: float = 0.035
    """AdamW learning rate of the embedding tables."""
    scalar_lr: float = 0.025
    """AdamW learning rate of scalars, gates and small projections."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.04
    """Decoupled weight decay of Muon and AdamW."""
    clip_norm: float = 0.3
    """Limit on the norm of the averaged gradient of all parameters."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. It stops at max_steps or max_seconds, whichever comes first."""

    max_seconds: float | None = 600.0
    """Training time limit in seconds, priming left out."""
    max_steps: int | None = None
    """Step limit. With it, schedules follow steps instead of the clock and are reproducible."""
    sequences_per_step: int = 384
    """Windows of seq_len tokens in one step, all ranks together; a multiple of 8."""
    warmdown_steps: int = 4000
    """Steps of linear learning-rate decay at the end, of 6,819; scaled down in shorter runs."""
    lr_floor: float = 0.05
    """Learning-rate scale at the very end."""
    priming_steps: int = 20
    """Steps that compile everything before the clock starts; then undone."""
    ema_decay: float = 0.997
    """Decay per step, of 6,819, of the exponential moving average of weights; a shorter run forgets
    faster, over the same share of its steps."""
    swa_every: int = 50
    """Steps between snapshots of stochastic weight averaging, of 6,819; scaled down likewise."""
    swa_below: float = 0.2
    """Snapshots are taken once the learning-rate scale is under this."""
    average: Literal["ema", "swa", "both"] = "ema"
    """Weights used after training: EMA, SWA, or the mean of the two."""
    late_qat: Literal["off", "linears", "banks"] = "banks"
    """Straight-through int6 rounding late in training: none, the published form (small linear
    layers only), or banks and small linear layers."""
    late_qat_below: float = 0.15
    """Late QAT starts once the learning-rate scale is under this."""
    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints; at most this much training is lost in a crash."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints instead of seconds."""
    log_every: int = 10
    """Steps between logged losses."""


@dataclass(frozen=True)
class QuantConfig:
    """Calibration, GPTQ, bit allocation and compression."""

    calibration_sequences: int = 64
    """Sequences the model generates for calibration, each seq_len tokens."""
    calibration_temperature: float = 0.8
    """Sampling temperature of calibration text."""
    damping: float = 0.01
    """Share of the mean diagonal added to the diagonal of each Hessian, once."""
    bits: BitScheme = "mixed"
    """mixed: the int6_matrices most sensitive in int6, the rest int5 (the record). budgeted: as
    many in int6 as fit. measured: 4 to 8 bits each, one step for all rows of a matrix,
    for the least damage, measured on the calibration text, that fits. int5, int6: all alike."""
    int6_matrices: int = 10
    """Matrices kept in int6 under `mixed`, by trace of the Hessian."""
    clip_percentiles: tuple[float, ...] = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
    """Row clip percentiles tried; the least Hessian-weighted error wins."""
    block_columns: int = 128
    """Columns GPTQ handles between updates of the rest."""
    compressor: Literal["brotli", "lzma"] = "brotli"
    """Brotli 11 with window 24, or the baseline LZMA 9."""
    limit_bytes: int = SIZE_LIMIT_BYTES
    """Limit on artifact plus code in bytes; above it, +-1 codes are pruned."""

    def __post_init__(self) -> None:
        if self.calibration_sequences < 1 or self.calibration_temperature <= 0:
            raise ConfigError(
                f"quant.calibration_sequences {self.calibration_sequences} must be at least 1, and "
                f"calibration_temperature {self.calibration_temperature} above 0"
            )


@dataclass(frozen=True)
class EvalConfig:
    """Scoring of the held-out split."""

    stride: int = 64
    """Tokens a sliding window moves on; only these new ones are scored."""
    batch_windows: int = 32
    """Windows in one evaluation batch."""
    max_tokens: int | None = None
    """Score only the first tokens of the validation split."""
    slot_modes: tuple[SlotVariant, ...] = ("context", "shared")
    """SLOT variants to report beside plain scoring; may be none. `shared` is not causal."""
    slot_lr: float = 0.003
    """AdamW learning rate of SLOT's offset."""
    slot_steps: int = 5
    """AdamW steps of SLOT per batch or window."""
    slot_weight_decay: float = 1e-8
    """AdamW weight decay of SLOT's offset."""
    slot_eps: float = 1e-5
    """AdamW epsilon of SLOT's offset."""

    def __post_init__(self) -> None:
        for name, value in (("batch_windows", self.batch_windows), ("max_tokens", self.max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"eval.{name} {value} must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """One run, end to end."""

    name: str | None = None
    """Name of the run folder; none: preset, date and seed."""
    out: Path = Path("runs")
    """Folder that holds run folders."""
    seed: int = 1337
    """Seed of weights, batches and calibration text."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to run."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of matrix products in the forward and backward pass."""
    mlp: MlpBackend = "cutlass"
    """Fused MLP implementation; there is no fallback to another."""
    attention: AttentionBackend = "cudnn"
    """Attention implementation: cuDNN's, FlashAttention for Hopper, or torch's own choice."""
    passes: PassesBackend = "epilogue"
    """What lies between the products (sums, norms, rotary, XSA): plain PyTorch, fused kernels, or
    those with the sums and norms of whole windows in the epilogues of the CUTLASS products (--mlp
    cutlass)."""
    compile: bool = True
    """Use torch.compile with fullgraph."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
