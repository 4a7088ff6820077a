"""Claims about the optimizer: Muon's orthogonalisation, the whole step, and its schedules."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.average import Averages
from trainer.config import ModelConfig, OptimConfig, TrainConfig
from trainer.errors import ConfigError, RunError
from trainer.model import GPT
from trainer.muon import NEWTON_SCHULZ, POLAR_EXPRESS, newton_schulz, turbo_muon
from trainer.optim import Optimizer, group_of
from trainer.qat import fake_quantize_rows
from trainer.schedule import Schedule
from verify.interpreter import run_interpreted
from verify.models import TINY, random_model
from verify.tolerance import check, relative_error, rounding_budget, unit_roundoff

FLOAT = torch.float32
STEPS_AMPLIFY = 500
"""Five quintic steps multiply a rounding by at most about 3.4445^5 = 485."""


def _quintic_band(values: np.ndarray, coefficients: list[tuple[float, float, float]]) -> np.ndarray:
    """Singular values after the steps, by iterating the scalar polynomial."""
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return values


@given(seed=st.integers(0, 999), rows=st.integers(1, 24), columns=st.integers(1, 24))
def test_newton_schulz_maps_singular_values_by_the_quintic(
    seed: int, rows: int, columns: int
) -> None:
    """Newton-Schulz keeps singular vectors and maps each singular value by the scalar quintic."""
    g = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    out = newton_schulz(g, 5, FLOAT)
    for matrix, got in zip(g.double(), out.double(), strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        mapped = _quintic_band((s / s.norm()).numpy(), [NEWTON_SCHULZ] * 5)
        expected = u @ torch.diag(torch.from_numpy(mapped)) @ vh
        allowed = STEPS_AMPLIFY * rounding_budget(2 * min(rows, columns) + 4, FLOAT)
        check("orthogonalised gradient", relative_error(got, expected), allowed)


@given(seed=st.integers(0, 999), wide=st.booleans())
def test_newton_schulz_band_for_well_scaled_matrices(seed: int, wide: bool) -> None:
    """For singular values within a factor of ten, five steps land in the published 0.68..1.14."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    s = 0.1 + 0.9 * torch.rand(16, generator=generator)
    g = u @ torch.diag(s) @ v[:16]
    values = torch.linalg.svdvals(newton_schulz((g if wide else g.T)[None], 5, FLOAT)[0])
    slack = STEPS_AMPLIFY * rounding_budget(36, FLOAT)
    check("below the band", max(0.0, 0.68 - values.min().item()), slack)
    check("above the band", max(0.0, values.max().item() - 1.14), slack)


@given(seed=st.integers(0, 999))
def test_orthogonalisation_in_batches_equals_one_by_one(seed: int) -> None:
    """A bank orthogonalised at once equals its matrices orthogonalised one by one."""
    g = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(seed))
    for function in (lambda x: newton_schulz(x, 5, FLOAT), lambda x: turbo_muon(x, FLOAT)):
        together = function(g)
        alone = torch.cat([function(g[i : i + 1]) for i in range(3)])
        allowed = STEPS_AMPLIFY * rounding_budget(40, FLOAT)
        check("batched", relative_error(together, alone), allowed)


def test_a_zero_gradient_stays_zero() -> None:
    """Zero matrices, the padding of a bank, stay exactly zero."""
    for out in (
        newton_schulz(torch.zeros(2, 4, 6), 5, FLOAT),
        turbo_muon(torch.zeros(2, 4, 6), FLOAT),
    ):
        assert not out.any()
        assert out.isfinite().all()


@given(seed=st.integers(0, 999))
def test_turbo_muon_equals_its_formula(seed: int) -> None:
    """Turbo-Muon equals Gershgorin scaling followed by four Polar Express steps, in float64."""
    g = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(seed))
    x = g[0].double() / g[0].double().norm()
    gram = x @ x.T
    x = torch.diag(1 / gram.abs().sum(1).sqrt()) @ x
    assert torch.linalg.svdvals(x).max() <= 1 + 1e-12
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    error = relative_error(turbo_muon(g, FLOAT)[0], x)
    check("Turbo-Muon", error, STEPS_AMPLIFY * rounding_budget(40, FLOAT))


# The whole step against numpy.


def _numpy_step(
    name: str, w: np.ndarray, grads: list[np.ndarray], norms: list[float], scales: list[float]
) -> np.ndarray:
    """All steps of one parameter in float64, written from the rules."""
    c = OptimConfig()
    momentum, m, v = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for t, (g, norm, scale) in enumerate(zip(grads, norms, scales, strict=True), start=1):
        g = g * min(1.0, 0.3 / (norm + 1e-6))
        if name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"):
            momentum = 0.9 * momentum + g
            direction = g + 0.9 * momentum
            update = np.empty_like(direction)
            for i, d in enumerate(direction):
                u, s, vh = np.linalg.svd(d, full_matrices=False)
                s = s / np.linalg.norm(s)
                update[i] = u @ np.diag(_quintic_band(s, [(3.4445, -4.7750, 2.0315)] * 5)) @ vh
            rows, columns = w.shape[1:]
            lr = 0.025 * scale
            w = w * (1 - lr * 0.04) - lr * max(1, rows / columns) ** 0.5 * update
        else:
            tables = ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight")
            lr = (0.035 if name in tables else 0.025) * scale
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            unbiased = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + c.adam_eps)
            w = w * (1 - lr * 0.04) - lr * unbiased
    return w


def test_optimizer_steps_equal_an_independent_program() -> None:
    """Three steps equal a float64 program of the rules: clip, Muon, AdamW, rates, decay."""
    model = random_model(TINY, seed=3).requires_grad_()
    optimizer = Optimizer(model, OptimConfig(), FLOAT)
    start = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    grads: dict[str, list[np.ndarray]] = {n: [] for n in start}
    norms: list[float] = []
    scales = [1.0, 0.5, 0.05]
    sizes = [1e-4, 1.0, 1e-2]  # the first is below the clip, the second far above
    for scale, size in zip(scales, sizes, strict=True):
        for name, p in model.named_parameters():
            p.grad = size * torch.randn(p.shape, generator=generator)
            grads[name].append(p.grad.double().numpy().copy())
        norm = optimizer.step(scale, 0.9)
        norms.append(math.sqrt(sum((g[-1] ** 2).sum() for g in grads.values())))
        error = abs(norm.item() - norms[-1]) / norms[-1]
        check("gradient norm", error, rounding_budget(4096, FLOAT))
        optimizer.zero_grad()
    assert norms[0] < 0.3 < norms[1]
    for name, p in model.named_parameters():
        expected = torch.from_numpy(
            np.asarray(_numpy_step(name, start[name], grads[name], norms, scales))
        )
        moved = (expected - torch.from_numpy(np.asarray(start[name]))).norm() / expected.norm()
        allowed = rounding_budget(64, FLOAT) + float(moved) * STEPS_AMPLIFY * rounding_budget(
            200, FLOAT
        )
        check(f"{name} after three steps", relative_error(p.detach(), expected), allowed)


FUSED = """
import torch
from kernels import muon_triton, reference
from verify.tolerance import check, relative_error, rounding_budget

device, dtype = "DEVICE", torch.bfloat16
for seed, shape in enumerate([(2, 5, 7), (1, 40, 33), (3, 64, 32), (1, 1, 4099)]):
    g = torch.Generator().manual_seed(seed)
    grad, momentum, weight = (torch.randn(shape, generator=g).to(device) for _ in range(3))
    grad, clip = grad.to(dtype), torch.tensor(0.37, device=device)
    kept = momentum.clone()
    got = muon_triton.nesterov(grad, momentum, clip, 0.9, torch.float32)
    want = reference.nesterov(grad, kept, clip, 0.9, torch.float32)
    budget = rounding_budget(6, torch.float32)
    check("momentum", relative_error(momentum, kept), budget)
    check("direction", relative_error(got, want), budget)
    rounded = muon_triton.nesterov(grad, momentum, clip, 0.9, dtype)
    assert rounded.dtype == dtype
    check("rounded", relative_error(rounded, reference.nesterov(grad, kept, clip, 0.9, dtype)),
          rounding_budget(6, dtype))
    for update in (want.to(dtype), want.to(dtype).mT.contiguous().mT):
        expected = weight.clone()
        reference.apply_update(expected, update, 0.98, 0.3)
        muon_triton.apply_update(weight, update, 0.98, 0.3)
        check("weights", relative_error(weight, expected), budget)
"""


def test_fused_muon_equals_its_formula_in_the_interpreter() -> None:
    """Momentum, direction and update of odd shapes and strides equal plain PyTorch's."""
    run_interpreted(FUSED.replace("DEVICE", "cpu"))


@pytest.mark.gpu
def test_fused_muon_equals_its_formula_on_the_gpu() -> None:
    """The same, compiled."""
    exec(FUSED.replace("DEVICE", "cuda"), {})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("momentum", torch.zeros(2, 3, 4, dtype=torch.bfloat16), "momentum must be float32"),
        ("momentum", torch.zeros(2, 4, 3).mT, "momentum must be contiguous"),
        ("grad", torch.zeros(2, 3, 3), r"grad \[N, R, C\] .* must be \(2, 3, 4\)"),
        ("clip", torch.ones(1), "clip must be float32"),
        ("clip", torch.tensor(1), "clip must be float32"),
        ("weight", torch.zeros(2, 3, 4, dtype=torch.bfloat16), "weight must be float32"),
        ("weight", torch.zeros(2, 4, 3).mT, "weight must be contiguous"),
        ("update", torch.zeros(1, 3, 4), r"update \[N, R, C\] .* must be \(2, 3, 4\)"),
    ],
)
def test_fused_muon_names_what_does_not_fit(name: str, value: torch.Tensor, words: str) -> None:
    """Type, layout, shape and place of banks are checked before a kernel reads or writes them."""
    from kernels import muon_triton

    bank = torch.zeros(2, 3, 4)
    given = {"grad": bank, "momentum": bank, "clip": torch.ones(()), "weight": bank, "update": bank}

    def run(grad: Any, momentum: Any, clip: Any, weight: Any, update: Any) -> None:
        if name in ("weight", "update"):
            muon_triton.apply_update(weight, update, 0.9, 0.1)
        else:
            muon_triton.nesterov(grad, momentum, clip, 0.9, torch.float32)

    with pytest.raises(ValueError, match=words):
        run(**given | {name: value})
    with pytest.raises(ValueError, match="is on cpu; all must be on one CUDA device"):
        run(**given)


def test_every_parameter_has_one_group() -> None:
    """The banks are Muon's, the three tables have the embedding rate, the rest the small rate."""
    with torch.device("meta"):
        model = GPT(ModelConfig())
    groups = {name: group_of(name) for name, _ in model.named_parameters()}
    assert sum(g == "muon" for g in groups.values()) == 4
    assert sum(g == "embedding" for g in groups.values()) == 3
    assert sum(g == "small" for g in groups.values()) == len(groups) - 7
    with pytest.raises(ConfigError, match="surprise"):
        group_of("surprise.weight")


def test_optimizer_state_round_trip() -> None:
    """A step after saving and loading the state equals the step without it, to the bit."""

    def run(reload_at: int | None) -> dict[str, torch.Tensor]:
        model = random_model(TINY, seed=3).requires_grad_()
        optimizer = Optimizer(model, OptimConfig(), FLOAT)
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            if step == reload_at:
                state = {k: v.clone() for k, v in optimizer.state_dict().items()}
                optimizer = Optimizer(model, OptimConfig(), FLOAT)
                optimizer.load_state_dict(state)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step(1.0, 0.95)
            optimizer.zero_grad()
        return {n: p.detach() for n, p in model.named_parameters()}

    plain, reloaded = run(None), run(2)
    assert all(torch.equal(plain[n], reloaded[n]) for n in plain)


# Schedules.

train_configs = st.builds(
    TrainConfig,
    warmdown_steps=st.integers(0, 6819),
    lr_floor=st.floats(0, 0.5),
    max_steps=st.just(None),
)


@given(steps=st.integers(1, 20_000), config=train_configs)
def test_learning_rate_falls_linearly_to_its_floor(steps: int, config: TrainConfig) -> None:
    """The scale starts at 1 (or in the warmdown), never rises, and ends at the floor."""
    schedule = Schedule(dataclasses.replace(config, max_steps=steps), OptimConfig(), steps)
    scales = [schedule.lr_scale(s, 0.0) for s in range(0, steps + 1, max(1, steps // 50))]
    assert all(a >= b for a, b in itertools.pairwise(scales))
    end = schedule.lr_scale(steps, 0.0)
    assert end == (1.0 if config.warmdown_steps == 0 else pytest.approx(config.lr_floor))
    length = config.warmdown_steps * min(1.0, steps / 6819)
    assert schedule.step_scale == min(1.0, steps / 6819)
    for s in range(0, steps + 1, max(1, steps // 20)):
        left = min(1.0, (steps - s) / length) if length else 1.0
        expected = config.lr_floor + (1 - config.lr_floor) * left
        assert schedule.lr_scale(s, 0.0) == pytest.approx(expected, rel=1e-12)


@given(steps=st.integers(10, 9000), step_s=st.floats(0.01, 2.0), at=st.floats(0, 1))
def test_schedule_by_the_clock_equals_schedule_by_steps(
    steps: int, step_s: float, at: float
) -> None:
    """With a constant step time, the wall clock gives the same learning rates as the step count."""
    counted = Schedule(TrainConfig(max_steps=steps), OptimConfig(), steps)
    clocked = Schedule(TrainConfig(max_seconds=steps * step_s), OptimConfig(), steps)
    step = round(at * steps)
    expected = counted.lr_scale(step, 0.0)
    assert clocked.lr_scale(step, step * step_s) == pytest.approx(expected, rel=1e-9)


def test_record_schedule() -> None:
    """At the record's 6,819 steps the counts are the record's own: 4000, 1500 and 50."""
    schedule = Schedule(TrainConfig(max_steps=6819), OptimConfig(), 6819)
    assert schedule.step_scale == 1.0
    assert schedule.lr_scale(2819, 0) == 1.0
    assert schedule.lr_scale(2820, 0) < 1.0
    assert schedule.lr_scale(4819, 0) == pytest.approx(0.05 + 0.95 * 0.5)
    assert schedule.muon_momentum(0) == pytest.approx(0.92)
    assert schedule.muon_momentum(750) == pytest.approx(0.955)
    assert schedule.muon_momentum(1500) == schedule.muon_momentum(6000) == pytest.approx(0.99)
    taken = [s for s in range(1, 6820) if schedule.take_snapshot(s, 0.1)]
    assert taken == list(range(50, 6820, 50))
    assert not schedule.take_snapshot(50, 0.2)
    assert schedule.qat_on(0.1499)
    assert not schedule.qat_on(0.15)


def test_short_runs_scale_step_counts() -> None:
    """A run of 840 steps scales the record's counts by 840 / 6819."""
    schedule = Schedule(TrainConfig(max_steps=840), OptimConfig(), 840)
    warmdown = 4000 * 840 / 6819
    assert schedule.lr_scale(math.floor(840 - warmdown), 0) == 1.0
    assert schedule.lr_scale(math.ceil(840 - warmdown) + 1, 0) < 1.0
    assert schedule.muon_momentum(185) == pytest.approx(0.99, abs=1e-4)
    assert [s for s in range(1, 30) if schedule.take_snapshot(s, 0.1)] == [6, 12, 18, 24]


def test_training_ends_at_the_first_limit() -> None:
    """Training ends at max_steps, or where one more step would pass max_seconds."""
    schedule = Schedule(TrainConfig(max_steps=10, max_seconds=5.0), OptimConfig(), 10)
    assert not schedule.finished(0, 0.0)
    assert not schedule.finished(9, 4.5), "a tenth step ends at 5.0 s"
    assert schedule.finished(9, 4.6)
    assert schedule.finished(10, 0.0)
    assert schedule.finished(3, 5.0)
    assert not schedule.finished(5, 2.5, in_flight=2), "those in flight and one more: 4.0 s"
    assert schedule.finished(7, 3.6, in_flight=2), "those in flight and one more: 5.1 s"


# Averages and QAT.


@given(st.integers(1, 20_000))
def test_ema_forgets_over_the_same_share_of_every_run(steps: int) -> None:
    """EMA's time constant is the record's share of a shorter run, and never longer than its own."""
    decay = Schedule(TrainConfig(), OptimConfig(), steps).ema_decay
    constant = -1 / math.log(0.997) * min(1.0, steps / 6819)
    check("time constant", abs(-1 / math.log(decay) / constant - 1), 1e-9)


def _walk(model: GPT, averages: Averages, steps: int) -> list[list[torch.Tensor]]:
    """Random weights step by step; returns every step's weights."""
    history = [[p.detach().clone() for p in model.parameters()]]
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        history.append([p.detach().clone() for p in model.parameters()])
        averages.update_ema(0.9)
        if step % 2:
            averages.take_snapshot()
    return history


@pytest.mark.parametrize("kind", ["ema", "swa", "both"])
def test_averages_equal_their_closed_forms(kind: str) -> None:
    """EMA equals the geometric sum, SWA the plain mean of snapshots, `both` their mean."""
    model = random_model(TINY)
    averages = Averages(model, TrainConfig(average=kind))  # pyright: ignore[reportArgumentType]
    history = _walk(model, averages, 6)
    averages.apply()
    for i, p in enumerate(model.parameters()):
        w = [h[i].double() for h in history]
        ema = 0.9**6 * w[0] + sum(0.1 * 0.9 ** (6 - t) * w[t] for t in range(1, 7))
        swa = (w[2] + w[4] + w[6]) / 3
        expected = {"ema": ema, "swa": swa, "both": (ema + swa) / 2}[kind]
        check(f"{kind} average", relative_error(p, expected), rounding_budget(40, FLOAT))


def test_averages_state_round_trip() -> None:
    """Averages loaded into a new object go on as if never interrupted."""
    model = random_model(TINY)
    config = TrainConfig(average="both")
    first = Averages(model, config)
    _walk(model, first, 5)
    second = Averages(model, config)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for averages in (first, second):
        averages.update_ema(0.9)
        averages.take_snapshot()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    with pytest.raises(RunError, match="average"):
        Averages(model, TrainConfig(average="ema")).load_state_dict(first.state_dict())


def test_swa_without_snapshots_is_refused() -> None:
    """Selecting SWA when no snapshot was taken is an error that says why."""
    with pytest.raises(RunError, match="snapshot"):
        Averages(random_model(TINY), TrainConfig(average="swa")).apply()


@given(seed=st.integers(0, 999), bits=st.sampled_from([5, 6, 8]), zero_row=st.booleans())
def test_fake_quantization_rounds_rows_and_passes_gradients(
    seed: int, bits: int, zero_row: bool
) -> None:
    """Late QAT rounds each row to its own symmetric grid; the gradient is the identity's."""
    w = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed))
    if zero_row:
        w[0, 2] = 0
    w.requires_grad_()
    rounded = fake_quantize_rows(w, bits)
    top = 2 ** (bits - 1) - 1
    for row, got in zip(w.detach().view(-1, 7), rounded.detach().view(-1, 7), strict=True):
        step = row.abs().max().item() / top
        if step == 0:
            assert not got.any()
            continue
        codes = got.double() / step
        check(
            "code is whole",
            (codes - codes.round()).abs().max().item(),
            top * 4 * unit_roundoff(FLOAT),
        )
        assert codes.abs().max().round() == top
        assert (got - row).abs().max().item() <= step * (0.5 + top * 4 * unit_roundoff(FLOAT))
    upstream = torch.randn_like(w)
    rounded.backward(upstream)
    assert w.grad is not None
    assert torch.equal(w.grad, upstream)
