"""Claims about quantization: GPTQ, bit allocation, pruning, and the whole round trip."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer import allocate, artifact, calibrate, estimate, sampling
from trainer.allocate import Sizer, most_that_fits
from trainer.config import QuantConfig
from trainer.errors import ArtifactError, RunError
from trainer.gptq import (
    even_scales,
    fitted_scales,
    gptq,
    gptq_even,
    round_to_nearest,
    row_scales,
    top_code,
    weighted_error,
)
from trainer.prune import PruningOrder, prune_to_fit
from trainer.quantize import (
    QuantizedMatrix,
    QuantizedModel,
    dequantize,
    quantize_matrices,
    quantize_table,
    with_matrices,
)
from verify.models import TINY, random_model
from verify.tolerance import check, relative_error, rounding_budget

FLOAT = torch.float32
SETTINGS = {"damping": 0.01, "block_columns": 128}
WHOLE = {"clip_percentiles": (1.0,), **SETTINGS}
widths = st.sampled_from([4.5, 5, 6])


def _hessian(kind: str, columns: int, generator: torch.Generator) -> Tensor:
    """A positive semi-definite matrix of the given kind of difficulty."""
    x = torch.randn(4 * columns, columns, generator=generator)
    if kind == "rank deficient":
        x[:, columns // 2 :] = x[:, : columns - columns // 2]
    elif kind == "dead columns":
        x[:, ::3] = 0
    elif kind == "ill-conditioned":
        x *= torch.logspace(-6, 3, columns)
    elif kind == "zero":
        x *= 0
    return x.T @ x


KINDS = ["random", "rank deficient", "dead columns", "ill-conditioned", "zero"]


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_every_code_round_trips(bits: int) -> None:
    """Every code of int5, int6 and int8 survives decoding and rounding, with its own scale."""
    top = top_code(bits)
    assert top == {4: 7, 5: 15, 6: 31, 8: 127}[bits]
    codes = torch.arange(-top, top + 1, dtype=torch.int8)[None]
    for scale in (1.0, 0.0123, 6e-5, 100.0):
        matrix = QuantizedMatrix(codes, torch.tensor([scale]).half(), bits)
        again = round_to_nearest(matrix.decoded()[None], matrix.scales_R[None], bits)[0]
        assert torch.equal(again, codes)


def test_half_bits_lie_midway() -> None:
    """A grid of half a bit has 2^-0.5 as many codes a side as the next whole one."""
    assert [top_code(b) for b in (4.5, 5.5, 6.5)] == [10, 22, 44]
    assert all(abs(top_code(b - 0.5) / top_code(b) - 0.5**0.5) < 0.05 for b in (5, 6, 7))


@given(seed=st.integers(0, 999), bits=widths, percentile=st.sampled_from([0.9, 0.999, 1.0]))
def test_rounding_errs_half_a_step_inside_the_clip(
    seed: int, bits: float, percentile: float
) -> None:
    """Plain rounding errs at most half a step inside the clip range, and clips outside it."""
    w = torch.randn(1, 6, 40, generator=torch.Generator().manual_seed(seed))
    scales = row_scales(w, bits, percentile)
    codes = round_to_nearest(w, scales, bits)
    step = scales.double().unsqueeze(-1)
    reach = step * top_code(bits)
    decoded = codes.double() * step
    inside = w.double().abs() <= reach
    worst = ((decoded - w.double()).abs() / step)[inside].max().item()
    check("steps of error", worst, 0.5 + 2 * top_code(bits) * rounding_budget(2, FLOAT))
    assert torch.equal(decoded[~inside], (reach.expand_as(decoded) * w.sign())[~inside])


@given(seed=st.integers(0, 999), bits=widths)
def test_identity_hessian_is_plain_rounding(seed: int, bits: float) -> None:
    """With an identity Hessian GPTQ is plain rounding, code by code."""
    w = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(seed))
    eye = torch.eye(24).expand(2, 24, 24)
    result = gptq(w, eye, bits, **WHOLE)  # pyright: ignore[reportArgumentType]
    assert torch.equal(result.codes_NRC, round_to_nearest(w, row_scales(w, bits, 1.0), bits))


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 999), bits=widths)
def test_gptq_is_never_worse_than_plain_rounding(kind: str, seed: int, bits: float) -> None:
    """GPTQ's Hessian-weighted error is at most plain rounding's, on any Hessian."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(2, 6, 20, generator=generator)
    h = torch.stack([_hessian(kind, 20, generator), _hessian("random", 20, generator)])
    config = QuantConfig()
    result = gptq(
        w,
        h,
        bits,
        clip_percentiles=config.clip_percentiles,
        damping=config.damping,
        block_columns=7,
    )
    for percentile in config.clip_percentiles:
        scales = row_scales(w, bits, percentile)
        plain = weighted_error(w, round_to_nearest(w, scales, bits), scales, h)
        assert (result.errors_N <= plain).all()
    recomputed = weighted_error(w, result.codes_NRC, result.scales_NR, h)
    assert torch.equal(recomputed, result.errors_N)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 999), bits=widths)
def test_even_grids_have_one_step_and_the_scales_of_least_error(
    kind: str, seed: int, bits: float
) -> None:
    """All rows start from one step; the scales that are kept err no more, and no other errs less.

    The codes of a row given, its error is a parabola of its scale.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(2, 6, 20, generator=generator) * torch.logspace(-1, 1, 6).unsqueeze(-1)
    w[0, 3] = 0
    h = torch.stack([_hessian(kind, 20, generator), _hessian("random", 20, generator)])
    step = even_scales(w[1:], bits)
    assert (step == step[0, 0]).all()
    largest = w[1].abs().amax(dim=-1) / top_code(bits)
    holds_all = w[1].abs().max() / top_code(8)
    wanted = torch.maximum(largest.square().mean().sqrt(), holds_all)
    assert step[0, 0].item() == pytest.approx(wanted.item(), rel=1e-3)
    result = gptq_even(w, h, bits, damping=0.01, block_columns=7)
    plain = round_to_nearest(w, even_scales(w, bits), 8)
    assert (result.errors_N <= weighted_error(w, plain, even_scales(w, bits), h)).all()
    assert torch.equal(weighted_error(w, result.codes_NRC, result.scales_NR, h), result.errors_N)
    best = fitted_scales(w, result.codes_NRC, result.scales_NR, h)
    least = weighted_error(w, result.codes_NRC, best, h)
    for factor in (0.98, 1.02):
        other = weighted_error(w, result.codes_NRC, (best.float() * factor).half(), h)
        assert least[1] <= other[1] * (1 + 1e-4)


def test_one_step_errs_less_at_equal_entropy() -> None:
    """Rows of unequal size: at the entropy of a clip per row, one step errs a twentieth less."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 128, 256, generator=generator)
    w *= torch.logspace(-0.3, 0.3, 128).unsqueeze(-1)
    eye = torch.eye(256)[None]
    clipped = gptq(w, eye, 5, clip_percentiles=QuantConfig().clip_percentiles, **SETTINGS)
    even = gptq_even(w, eye, 5, **SETTINGS)
    apart = [estimate.entropy_bytes(estimate.histogram(r.codes_NRC)) for r in (clipped, even)]
    bits_saved = 8 * (apart[0] - apart[1]) / w.numel()
    at_equal_entropy = even.errors_N / 4**bits_saved
    assert (at_equal_entropy < 0.95 * clipped.errors_N).all()


@given(seed=st.integers(0, 999))
def test_gptq_improves_on_correlated_inputs(seed: int) -> None:
    """On strongly correlated inputs GPTQ cuts plain rounding's error by a quarter at least."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 4, generator=generator) @ torch.randn(4, 24, generator=generator)
    x += 0.1 * torch.randn(200, 24, generator=generator)
    w, h = torch.randn(1, 8, 24, generator=generator), (x.T @ x)[None]
    scales = row_scales(w, 5, 1.0)
    plain = weighted_error(w, round_to_nearest(w, scales, 5), scales, h)
    result = gptq(w, h, 5, **WHOLE)  # pyright: ignore[reportArgumentType]
    assert (result.errors_N < 0.75 * plain).all()


def _slow_gptq(w: np.ndarray, h: np.ndarray, bits: float, damping: float) -> np.ndarray:
    """GPTQ of one matrix from the paper, in float64: a matrix inverse again for every column."""
    columns, top = w.shape[1], top_code(bits)
    scale = np.float16(np.abs(w).max(axis=1) / top).astype(np.float64)
    order = sorted(range(columns), key=lambda j: (-h[j, j], j))
    damped = h + damping * np.mean(np.diag(h)) * np.eye(columns)
    w, codes = w.copy(), np.zeros(w.shape)
    left = list(order)
    for j in order:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        codes[:, j] = np.clip(np.round(w[:, j] / scale), -top, top)
        error = (w[:, j] - codes[:, j] * scale) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return codes


@given(
    seed=st.integers(0, 999),
    bits=widths,
    block=st.sampled_from([3, 8, 128]),
    damping=st.sampled_from([0.01, 1.0]),
)
def test_gptq_equals_the_papers_update(seed: int, bits: float, block: int, damping: float) -> None:
    """Codes equal a direct float64 program of the paper that re-inverts H for every column.

    Where the two differ, it must be by a rounding tie: the weights before rounding lie within
    float32's error of half a step.
    """
    generator = torch.Generator().manual_seed(seed)
    w, h = torch.randn(6, 16, generator=generator), _hessian("random", 16, generator)
    settings = {**WHOLE, "block_columns": block, "damping": damping}
    fast = gptq(w[None], h[None], bits, **settings).codes_NRC[0]  # pyright: ignore[reportArgumentType]
    slow = _slow_gptq(w.double().numpy(), h.double().numpy(), bits, damping)
    scales = row_scales(w[None], bits, 1.0)
    plain = round_to_nearest(w[None], scales, bits)
    slow_error = weighted_error(w[None], torch.from_numpy(slow)[None], scales, h[None])
    if slow_error > weighted_error(w[None], plain, scales, h[None]):
        assert torch.equal(fast, plain[0])
        return
    different = (fast.double() - torch.from_numpy(slow)).abs().sum(dim=1) > 0
    assert different.sum() <= 1, "more than a rounding tie in one row"


@given(seed=st.integers(0, 999))
def test_gptq_follows_a_permutation_of_columns(seed: int) -> None:
    """Permuting the columns of W and H permutes the codes."""
    generator = torch.Generator().manual_seed(seed)
    w, h = torch.randn(1, 5, 12, generator=generator), _hessian("random", 12, generator)[None]
    order = torch.randperm(12, generator=generator)
    here = gptq(w, h, 5, **WHOLE).codes_NRC  # pyright: ignore[reportArgumentType]
    there = gptq(w[..., order], h[:, order][..., order], 5, **WHOLE).codes_NRC  # pyright: ignore[reportArgumentType]
    different = (here[..., order] != there).any(dim=-1).sum()
    assert different <= 1, "more than a rounding tie in one row"


@given(seed=st.integers(0, 999))
def test_gptq_in_stacks_equals_one_by_one(seed: int) -> None:
    """Matrices quantized together get the codes they get alone."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3, 4, 10, generator=generator)
    h = torch.stack([_hessian(k, 10, generator) for k in ("random", "dead columns", "random")])
    together = gptq(w, h, 6, **WHOLE)  # pyright: ignore[reportArgumentType]
    for i in range(3):
        alone = gptq(w[i : i + 1], h[i : i + 1], 6, **WHOLE)  # pyright: ignore[reportArgumentType]
        assert (together.codes_NRC[i] != alone.codes_NRC[0]).any(dim=-1).sum() <= 1


def test_dead_columns_are_rounded_plainly() -> None:
    """A column the calibration text never excites is rounded plainly and disturbs no other."""
    generator = torch.Generator().manual_seed(0)
    w, h = torch.randn(1, 6, 12, generator=generator), _hessian("dead columns", 12, generator)[None]
    codes = gptq(w, h, 6, **WHOLE).codes_NRC  # pyright: ignore[reportArgumentType]
    plain = round_to_nearest(w, row_scales(w, 6, 1.0), 6)
    assert torch.equal(codes[..., ::3], plain[..., ::3])


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    """NaN in a Hessian stops quantization with a reason."""
    h = torch.eye(4)[None].clone()
    h[0, 1, 1] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        gptq(torch.ones(1, 2, 4), h, 5, **WHOLE)  # pyright: ignore[reportArgumentType]


def test_the_clip_is_chosen_by_the_weighted_error() -> None:
    """Among clip percentiles the one with the least Hessian-weighted error wins."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 4, 200, generator=generator)
    w[..., 0] = 60.0  # an outlier in a column that does not matter
    h = torch.eye(200)[None].clone()
    h[0, 0, 0] = 1e-9
    clipped = gptq(w, h, 5, clip_percentiles=(0.99, 1.0), damping=0.01, block_columns=128)
    assert (clipped.scales_NR.float() < 1.0).all()
    h[0, 0, 0] = 1e9
    kept = gptq(w, h, 5, clip_percentiles=(0.99, 1.0), damping=0.01, block_columns=128)
    assert (kept.scales_NR.float() > 1.0).all()


# Allocation and pruning.


def test_the_record_keeps_ten_matrices_in_int6() -> None:
    """Of the record's 66 matrices the 10 most sensitive are int6, 56 stay int5."""
    sensitivity = {f"m{i}": float(i % 60) for i in range(66)}
    order = allocate.ranked(sensitivity)
    assert [sensitivity[n] for n in order] == sorted(sensitivity.values(), reverse=True)
    assert order.index("m0") < order.index("m60"), "ties go by name"
    bits = allocate.bits_with(order, allocate.fixed_count(QuantConfig(), 66))
    assert sorted(bits.values()) == [5] * 56 + [6] * 10
    assert {n for n, b in bits.items() if b == 6} == set(order[:10])
    assert allocate.fixed_count(QuantConfig(bits="int5"), 66) == 0
    assert allocate.fixed_count(QuantConfig(bits="int6"), 66) == 66


def test_sensitivity_is_the_trace() -> None:
    """Sensitivity is trace(H)."""
    h = torch.tensor([[3.0, 9.0], [9.0, 4.0]])
    assert allocate.sensitivity({"a": h}) == {"a": 7.0}


@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    at=st.integers(0, 60),
    off=st.integers(-1, 1),
    bend=st.floats(0.3, 3.0),
)
def test_search_finds_the_most_that_fits(steps: list[int], at: int, off: int, bend: float) -> None:
    """The search finds the largest count that fits a limit at, above or below any size."""
    sizes = np.cumsum([100, *steps])
    limit = int(sizes[at % len(sizes)]) + off
    tried: list[int] = []

    def exact(n: int) -> int:
        tried.append(n)
        return int(sizes[n])

    sizer = Sizer(exact, lambda n: int(sizes[n] * bend) + 1)
    found = most_that_fits(sizer, len(steps), limit)
    fitting = [n for n in range(len(sizes)) if sizes[n] <= limit]
    assert len(tried) <= 8
    assert found == (fitting[-1] if fitting else -1)


def _packed(generator: torch.Generator) -> QuantizedModel:
    """Two matrices with many +-1 codes."""
    matrices = {
        name: QuantizedMatrix(
            torch.randint(-2, 3, (6, 9), generator=generator, dtype=torch.int8),
            (0.1 + torch.rand(6, generator=generator)).half(),
            5,
        )
        for name in ("blocks.0.q", "blocks.0.k")
    }
    return QuantizedModel(TINY, matrices)


@given(seed=st.integers(0, 999), share=st.floats(0, 1))
def test_pruning_takes_the_least_scale_first(seed: int, share: float) -> None:
    """Pruning zeroes exactly n codes of +-1, those of the least scale^2, and nothing else."""
    packed = _packed(torch.Generator().manual_seed(seed))
    order = PruningOrder(packed)
    count = round(share * len(order))
    pruned = order.pruned(count)
    gone, kept = [], []
    for name, matrix in packed.matrices.items():
        after = pruned.matrices[name].codes_RC
        changed = after != matrix.codes_RC
        assert not after[changed].any()
        assert (matrix.codes_RC[changed].abs() == 1).all()
        scale = matrix.scales_R.float()[:, None].expand(changed.shape)
        gone += scale[changed].tolist()
        kept += scale[(matrix.codes_RC.abs() == 1) & ~changed].tolist()
    assert len(gone) == count
    assert not gone or not kept or max(gone) <= min(kept)


@given(seed=st.integers(0, 99), limit=st.integers(0, 60))
def test_pruning_stops_as_soon_as_it_fits(seed: int, limit: int) -> None:
    """Pruning ends with the fewest zeroed codes that fit, or says that nothing can."""
    packed = _packed(torch.Generator().manual_seed(seed))

    def pack(model: QuantizedModel) -> bytes:
        return bytes(int(sum((m.codes_RC != 0).sum() for m in model.matrices.values())))

    whole, floor = len(pack(packed)), len(pack(PruningOrder(packed).pruned(10**6)))
    if limit < floor:
        with pytest.raises(ArtifactError, match="even with all"):
            prune_to_fit(packed, limit, pack)
        return
    data, count = prune_to_fit(packed, limit, pack)
    assert len(data) <= limit
    assert count == max(0, whole - limit)


@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_estimates_are_the_entropy_of_two_kinds_of_rows(seed: int, share: float) -> None:
    """The estimate of a pruned model is the entropy of its codes, pruned rows counted apart."""
    packed = _packed(torch.Generator().manual_seed(seed))
    order = PruningOrder(packed)
    count = round(share * len(order))
    after = order.pruned(count).matrices
    expected = 0.0
    for name, before in packed.matrices.items():
        had = before.codes_RC.abs() == 1
        still = after[name].codes_RC.abs() == 1
        # A row pruned in part counts as whole: the estimate moves in rows.
        reached = ~(had & still).any(dim=1)
        for rows in (before.codes_RC[~reached], after[name].codes_RC[reached]):
            symbols, counts = np.unique(rows.numpy(), return_counts=True)
            if len(symbols):
                expected += counts.sum() * scipy.stats.entropy(counts, base=2) / 8
        expected += 2 * len(before.scales_R)
    check("estimate", abs(order.estimator()(count) - expected), 1e-9 * (1 + expected))


def test_estimates_are_close_to_brotli() -> None:
    """For codes of a normal matrix the estimate is within 3 % of Brotli-11's size."""
    packed = QuantizedModel(TINY, {})
    generator = torch.Generator().manual_seed(0)
    for bits in (5, 6):
        w = torch.randn(1, 256, 512, generator=generator)
        scales = row_scales(w, bits, 0.9999)
        packed.matrices[f"m{bits}"] = QuantizedMatrix(
            round_to_nearest(w, scales, bits)[0], scales[0], bits
        )
    ratio = len(artifact.pack(packed)) / estimate.packed_bytes(packed)
    check("Brotli over estimate", abs(ratio - 1), 0.03)


def test_a_budget_is_met_in_few_compressions() -> None:
    """Pruning a model by a few percent takes at most three more exact sizes, and leaves 0.05 %."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 512, 1024, generator=generator)
    w *= 0.5 + torch.rand(512, 1, generator=generator)
    scales = row_scales(w, 5, 0.9999)
    codes = round_to_nearest(w, scales, 5)[0]
    packed = QuantizedModel(TINY, {"m": QuantizedMatrix(codes, scales[0], 5)})
    sizes: list[int] = []

    def pack(model: QuantizedModel) -> bytes:
        data = artifact.pack(model)
        sizes.append(len(data))
        return data

    limit = int(0.96 * len(artifact.pack(packed)))
    data, count = prune_to_fit(packed, limit, pack)
    assert limit * (1 - 1 / 2000) - 1 <= len(data) <= limit
    assert count > 0
    assert len(sizes) <= 4, sizes


# The whole model.


def _quantized(bits: int) -> tuple[dict[str, Tensor], QuantizedModel]:
    model = random_model(TINY)
    ids = torch.randint(0, 64, (4, TINY.seq_len))
    hessians = calibrate.collect_hessians(model, ids)
    names = model.matrices()
    matrices, _ = quantize_matrices(names, hessians, dict.fromkeys(names, bits), QuantConfig())
    return dict(model.state_dict()), with_matrices(model, matrices)


def test_dequantized_weights_lie_where_they_belong() -> None:
    """After the round trip every weight is near the original, in its own place."""
    state, packed = _quantized(6)
    decoded = dequantize(packed)
    assert decoded.keys() == state.keys()
    for name, tensor in state.items():
        assert decoded[name].shape == tensor.shape
        # A wrong slot would be an error of about sqrt(2); int6 makes a few percent.
        bound = 0.25 if name.endswith("_bank") else 0.02
        check(name, relative_error(decoded[name], tensor), bound)


def test_large_tables_are_int8_and_small_tensors_float16() -> None:
    """Tensors above 65,536 entries become int8 rows; everything smaller is float16."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(300, 300, generator=generator)
    packed = quantize_table(table)
    assert packed.bits == 8
    error = (packed.decoded() - table).abs() / packed.scales_R.float()[:, None]
    check("steps of error", error.max().item(), 0.5 + 254 * rounding_budget(2, torch.float16))
    _, small = _quantized(5)
    assert not small.tables
    assert {t.dtype for t in small.others.values()} == {torch.float16}


# Calibration.


@pytest.mark.parametrize("span", [3, 256])
def test_generated_text_equals_sampling_without_a_cache(
    span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration text equals sampling with a full forward per token, however the cache is cut."""
    monkeypatch.setattr(sampling, "SPAN", span)
    model = random_model(TINY)
    ids = calibrate.generate(model, 3, 10, 0.8, seed=5)
    generator = torch.Generator().manual_seed(5)
    expected = torch.zeros(3, 10, dtype=torch.int64)
    expected[:, 0] = torch.randint(TINY.vocab_size, (3,), generator=generator)
    uniform = torch.rand(10, 3, generator=generator)
    for t in range(1, 10):
        for b in range(3):
            logits = model.logits(model.hidden(expected[b : b + 1, :t]))[0, -1].double() / 0.8
            shares = torch.exp(logits - logits.max())
            cumulative = torch.cumsum(shares / shares.sum(), 0)
            expected[b, t] = int((cumulative <= uniform[t, b].double()).sum())
    assert torch.equal(ids, expected)
    assert torch.equal(ids, calibrate.generate(model, 3, 10, 0.8, seed=5))
    assert not torch.equal(ids, calibrate.generate(model, 3, 10, 0.8, seed=6))


def test_first_tokens_are_uniform() -> None:
    """First tokens of calibration text are uniform over the vocabulary (chi-squared, 5 sigma)."""
    ids = calibrate.generate(random_model(TINY), 6400, 1, 0.8, seed=1)
    counts = torch.bincount(ids[:, 0], minlength=64).double()
    chi2 = ((counts - 100) ** 2 / 100).sum().item()
    check("chi-squared of 63 degrees", chi2, 63 + 5 * (2 * 63) ** 0.5)


def test_hessians_equal_their_definition() -> None:
    """Hessians equal sum x x^T over positions, averaged over sequences, in float64."""
    model = random_model(TINY)
    ids = torch.randint(0, 64, (11, 9))
    inputs: dict[str, Tensor] = {}

    def observe(names: tuple[str, ...], x: Tensor) -> None:
        inputs.update(dict.fromkeys(names, x.double()))

    model.hidden(ids, observe=observe)
    hessians = calibrate.collect_hessians(model, ids)
    assert hessians.keys() == model.matrices().keys()
    for name, h in hessians.items():
        expected = torch.zeros(h.shape, dtype=torch.float64)
        for sequence in inputs[name]:
            for x in sequence:
                expected += torch.outer(x, x)
        error = relative_error(h, expected / 11)
        check(name, error, rounding_budget(11 * 9 + 2000, FLOAT))


@pytest.mark.gpu
def test_gptq_on_the_gpu_equals_the_cpu() -> None:
    """GPTQ on a GPU reaches the CPU's weighted errors to float32's rounding."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 64, 128, generator=generator)
    h = torch.stack([_hessian("random", 128, generator) for _ in range(3)])
    here = gptq(w, h, 6, **WHOLE)  # pyright: ignore[reportArgumentType]
    there = gptq(w.cuda(), h.cuda(), 6, **WHOLE)  # pyright: ignore[reportArgumentType]
    same = (here.codes_NRC == there.codes_NRC.cpu()).float().mean().item()
    # A tie rounded the other way shifts the rest of its row; few rows may differ.
    check("share of differing codes", 1 - same, 3 / 64)
    error = relative_error(there.errors_N.cpu(), here.errors_N)
    check("weighted errors", error, 3 / 64)


@pytest.mark.gpu
def test_generation_on_the_gpu_repeats() -> None:
    """The captured generation step gives the same text every time."""
    model = random_model(TINY).cuda()
    first = calibrate.generate(model, 4, 20, 0.8, seed=2)
    assert torch.equal(first, calibrate.generate(model, 4, 20, 0.8, seed=2))
    assert first.min() >= 0
    assert first.max() < TINY.vocab_size
