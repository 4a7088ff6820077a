"""Claims about training as a whole: it learns, it repeats, and the fused path is the same path."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config import MlpBackend, ModelConfig, OptimConfig
from trainer.model import GPT
from trainer.optim import Optimizer
from verify.models import TINY
from verify.tolerance import check, unit_roundoff

STORED = Path(__file__).parent / "stored" / "tiny_run.json"
STEPS = 12


def numpy_model(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    backend: MlpBackend = "reference",
    perturb: float = 0.0,
) -> GPT:
    """A GPT with weights from numpy's generator, the same in every torch version.

    `perturb` multiplies each weight by 1 +- perturb.
    """
    model = GPT(config, compute_dtype=dtype, mlp=backend)
    generator = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for p in model.parameters():
            spread = 1 / math.sqrt(p.shape[-1]) if p.ndim > 1 else 0.1
            values = generator.normal(0 if p.ndim > 1 else 1, spread, tuple(p.shape))
            values *= 1 + perturb * generator.choice([-1.0, 1.0], tuple(p.shape))
            p.copy_(torch.from_numpy(np.asarray(values)))
    return model


def losses(model: GPT, steps: int, batch: int, device: str = "cpu") -> list[float]:
    """Training losses, nats, on a stream with structure: each token mostly decides the next."""
    generator = np.random.Generator(np.random.PCG64(7))
    V, T = model.config.vocab_size, model.config.seq_len
    model = model.to(device)
    optimizer = Optimizer(model, OptimConfig(), model.compute_dtype)
    history = []
    for _ in range(steps):
        ids = np.empty((batch, T + 1), dtype=np.int64)
        ids[:, 0] = generator.integers(0, V, batch)
        for t in range(T):
            noise = generator.integers(0, V, batch)
            ids[:, t + 1] = np.where(generator.random(batch) < 0.9, (5 * ids[:, t] + 3) % V, noise)
        tokens = torch.from_numpy(ids).to(device)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step(1.0, 0.95)
        optimizer.zero_grad()
        history.append(loss.item())
    return history


def test_stored_tiny_run_reproduces_its_losses() -> None:
    """A stored run's losses come back, to what one rounding of the initial weights may change."""
    stored = json.loads(STORED.read_text())["losses"]
    again = losses(numpy_model(TINY, 11), STEPS, 8)
    nudged = losses(numpy_model(TINY, 11, perturb=2 * unit_roundoff(torch.float32)), STEPS, 8)
    assert len(stored) == STEPS
    assert again[-1] < again[0] - 0.2, "the stored run must be one that learns"
    for step, (a, b, c) in enumerate(zip(stored, again, nudged, strict=True)):
        # Training amplifies rounding; how much is measured here, not guessed. Another CPU's sums
        # round differently at every operation, so each of L layers may add one such nudge.
        amplified = max(abs(x - y) for x, y in zip(again, nudged, strict=True))
        allowed = 8 * TINY.layers * (amplified + unit_roundoff(torch.float32) * a)
        check(f"stored loss of step {step}", abs(a - b), allowed)
        assert math.isfinite(c)


def test_training_repeats_to_the_bit() -> None:
    """Two runs with the same seed on the same device give identical losses."""
    assert losses(numpy_model(TINY, 3), 4, 4) == losses(numpy_model(TINY, 3), 4, 4)


def test_late_qat_touches_what_it_names() -> None:
    """Late QAT `banks` rounds banks and projections, `linears` projections alone, `off` nothing."""
    model = numpy_model(TINY, 5)
    plain = model.cast_weights()
    rounded = {}
    for mode in ("off", "linears", "banks"):
        model.late_qat = mode
        cast = model.cast_weights()
        rounded[mode] = {
            name: not torch.equal(value, getattr(plain, name)) for name, value in vars(cast).items()
        }
    assert not any(rounded["off"].values())
    assert {name for name, moved in rounded["linears"].items() if moved} == {
        "bigram_proj",
        "ve_proj",
    }
    assert all(rounded["banks"].values())


def test_late_qat_gradients_reach_the_masters() -> None:
    """With late QAT on, every bank still receives a gradient."""
    model = numpy_model(TINY, 5)
    model.late_qat = "banks"
    tokens = torch.randint(0, TINY.vocab_size, (2, 9))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"):
        grad = getattr(model, name).grad
        assert grad is not None
        assert grad.any(), name


def test_the_model_compiles_without_graph_breaks() -> None:
    """The training loss compiles with fullgraph=True, with and without late QAT."""
    model = numpy_model(TINY, 5)
    tokens = torch.randint(0, TINY.vocab_size, (2, 9))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    for mode in ("off", "banks"):
        model.late_qat = mode
        eager = model.loss(tokens[:, :-1], tokens[:, 1:])
        same = compiled(tokens[:, :-1], tokens[:, 1:])
        error = abs(same.item() - eager.item()) / eager.item()
        check("compiled against eager loss", error, 64 * unit_roundoff(torch.float32))


GPU_SHAPE = ModelConfig(
    seq_len=512, layers=4, width=256, query_heads=4, kv_heads=2, mlp_width=896,
    value_embed_layers=(3,),
)  # fmt: skip


@pytest.mark.hopper
@pytest.mark.parametrize("backend", ["triton", "cutlass"])
def test_twenty_fused_steps_follow_the_reference(backend: MlpBackend) -> None:
    """Twenty steps with the fused MLP stay as close to float32 as twenty plain bf16 steps do."""
    exact = losses(numpy_model(GPU_SHAPE, 1), 20, 8, "cuda")
    plain = losses(numpy_model(GPU_SHAPE, 1, torch.bfloat16), 20, 8, "cuda")
    fused = losses(numpy_model(GPU_SHAPE, 1, torch.bfloat16, backend), 20, 8, "cuda")
    distance = math.dist(plain, exact)
    allowed = 2 * distance + unit_roundoff(torch.bfloat16) * math.hypot(*exact)
    check(f"twenty losses, {backend}", math.dist(fused, exact), allowed)
