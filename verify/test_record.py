"""Claims about the presets: the record's numbers are the defaults, as published."""

from dataclasses import asdict

import pytest

from trainer import config as settings
from trainer.__main__ import parse
from trainer.record import RECORD

PUBLISHED = {
    "model": {
        "vocab_size": 1024, "seq_len": 2048, "width": 512, "layers": 11, "query_heads": 8,
        "kv_heads": 4, "mlp_width": 1792, "rotary_dims": 16, "rotary_base": 10_000.0,
        "rotary_native_len": 1024, "q_gain": 1.5, "logit_softcap": 30.0, "embed_std": 0.005,
        "bigram_buckets": 3072, "bigram_dim": 112, "bigram_scale": 0.05,
        "value_embed_layers": (9, 10), "value_embed_dim": 128, "value_embed_std": 0.01,
        "value_embed_scale": 0.1,
    },
    "optim": {
        "muon_lr": 0.025, "muon_momentum_start": 0.92, "muon_momentum_end": 0.99,
        "muon_momentum_steps": 1500, "muon_variant": "newton_schulz", "embed_lr": 0.035,
        "scalar_lr": 0.025, "adam_betas": (0.9, 0.95), "adam_eps": 1e-8, "weight_decay": 0.04,
        "clip_norm": 0.3,
    },
    "train": {
        "max_seconds": 600.0, "max_steps": None, "sequences_per_step": 384,
        "warmdown_steps": 4000, "lr_floor": 0.05, "priming_steps": 20, "ema_decay": 0.997,
        "swa_every": 50, "swa_below": 0.2, "average": "ema", "late_qat_below": 0.15,
    },
    "data": {
        "mix_shards_start": 8, "mix_shards_end": 64, "mix_exponent_start": 0.9,
        "mix_exponent_end": 0.5, "mix_steps": 1800, "queue_batches": 8,
    },
    "quant": {
        "calibration_sequences": 64, "calibration_temperature": 0.8, "damping": 0.01,
        "bits": "mixed", "int6_matrices": 10,
        "clip_percentiles": (0.999, 0.9995, 0.9999, 0.99999, 1.0), "block_columns": 128,
        "compressor": "brotli", "limit_bytes": 16_000_000,
    },
    "eval": {
        "stride": 64, "batch_windows": 32, "slot_lr": 0.003, "slot_steps": 5,
        "slot_weight_decay": 1e-8, "slot_eps": 1e-5,
    },
}  # fmt: skip


@pytest.mark.parametrize("section", list(PUBLISHED))
def test_record_preset_has_the_published_numbers(section: str) -> None:
    """Every setting of the record preset equals the published one."""
    actual = asdict(RECORD)[section]
    assert {name: actual[name] for name in PUBLISHED[section]} == PUBLISHED[section]


def test_record_batch_is_786432_tokens_in_eight_micro_batches() -> None:
    """A step is 786,432 tokens, eight micro-batches of 98,304."""
    tokens = RECORD.train.sequences_per_step * RECORD.model.seq_len
    assert tokens == 786_432
    assert tokens // settings.MICRO_BATCHES == 98_304
    assert settings.RECORD_STEPS == 6_819


def test_overrides_reach_the_settings() -> None:
    """An override on the command line changes that setting and no other."""
    preset, config = parse(["smoke", "--optim.muon-lr", "0.5"])
    _, plain = parse(["smoke"])
    assert preset == "smoke"
    assert config.optim.muon_lr == 0.5
    changed = asdict(config)
    changed["optim"]["muon_lr"] = plain.optim.muon_lr
    assert changed == asdict(plain)


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` names every setting of every section."""
    with pytest.raises(SystemExit) as stop:
        parse(["record", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for section, values in asdict(RECORD).items():
        names = [f"{section}.{name}" for name in values] if isinstance(values, dict) else [section]
        for name in names:
            assert f"--{name.replace('_', '-')}" in text, name
