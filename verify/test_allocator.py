"""Claims about measured damage and the bits chosen by it."""

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer import allocate, artifact, budget, calibrate, codesize, estimate, quantize
from trainer.allocate import WIDTHS, Knapsack
from trainer.compress import quantize_run
from trainer.config import QuantConfig, RunConfig
from trainer.damage import damage, damage_by_error, exchanged, precise_logits
from trainer.gptq import top_code
from trainer.model import GPT
from trainer.quantize import QuantizedMatrix, dequantize
from verify.models import TINY, random_model

QUANT = QuantConfig(clip_percentiles=(0.999, 1.0))
SMALL = replace(TINY, layers=2, value_embed_layers=(1,))


@cache
def subject() -> tuple[GPT, dict[str, Tensor], Tensor]:
    """A small model, its Hessians and its calibration text."""
    torch.set_num_threads(1)
    model = random_model(SMALL)
    ids_BT = calibrate.generate(model, 12, SMALL.seq_len, 0.8, seed=1)
    return model, calibrate.collect_hessians(model, ids_BT), ids_BT


@cache
def made() -> budget.Made:
    """Every width of every matrix of the subject."""
    model, hessians, _ = subject()
    return budget.make(model, hessians, WIDTHS, QUANT)


@cache
def evenly() -> budget.Made:
    """The same with one step a matrix, as `measured` has it."""
    model, hessians, _ = subject()
    return budget.make(model, hessians, WIDTHS, QUANT, even=True)


@cache
def even_damages() -> dict[str, dict[float, float]]:
    """Damage of these, measured at every width."""
    model, _, ids_BT = subject()
    return damage(model, ids_BT, evenly().matrices)


@cache
def damages() -> dict[str, dict[float, float]]:
    """Damage of the subject's matrices."""
    model, _, ids_BT = subject()
    return damage(model, ids_BT, made().matrices)


# The knapsack.


@given(
    table=st.lists(
        st.lists(st.tuples(st.integers(0, 300), st.integers(0, 50)), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    ),
    share=st.floats(0, 1),
)
def test_knapsack_is_as_good_as_trying_everything(
    table: list[list[tuple[int, int]]], share: float
) -> None:
    """At any budget no other choice of that size does less damage, up to the rounding of sizes."""
    sizes, hurts = (
        {
            f"m{i}": {float(b): float(o[of]) for b, o in enumerate(row)}
            for i, row in enumerate(table)
        }
        for of in (0, 1)
    )
    knapsack = Knapsack(hurts, sizes)
    units = round(share * knapsack.highest)
    chosen = knapsack.bits(units)
    least = sum(min(s.values()) for s in sizes.values())
    span = sum(max(s.values()) - min(s.values()) for s in sizes.values())
    unit = span / allocate.BUDGETS
    limit, error = least + units * unit, 0.5 * unit * len(sizes) + 1e-6
    assert sum(sizes[n][b] for n, b in chosen.items()) <= limit + error
    ours = sum(hurts[n][b] for n, b in chosen.items())
    for other in itertools.product(range(3), repeat=len(table)):
        named = dict(zip(sizes, other, strict=True))
        if sum(sizes[n][b] for n, b in named.items()) <= limit - error:
            assert ours <= sum(hurts[n][b] for n, b in named.items()) + 1e-9


def test_more_budget_never_hurts() -> None:
    """From all-smallest to all-largest the damage falls and the bytes grow, step by step."""
    sizes = {f"m{i}": {b: b * (100.0 + i) for b in WIDTHS} for i in range(6)}
    hurts = {f"m{i}": {b: (1 + i % 3) * 4.0**-b for b in WIDTHS} for i in range(6)}
    knapsack = Knapsack(hurts, sizes)
    assert set(knapsack.bits(0).values()) == {min(WIDTHS)}
    assert set(knapsack.bits(knapsack.highest).values()) == {max(WIDTHS)}
    steps = [knapsack.bits(n) for n in range(0, knapsack.highest + 1, 97)]
    totals = [sum(hurts[n][b] for n, b in bits.items()) for bits in steps]
    taken = [sum(sizes[n][b] for n, b in bits.items()) for bits in steps]
    assert totals == sorted(totals, reverse=True)
    assert all(b >= a - 6 * 2 for a, b in itertools.pairwise(taken)), "up to the rounding"


# Damage.


def test_an_exchanged_matrix_is_put_back_to_the_bit() -> None:
    """While the block lasts the model differs, in that matrix alone; afterwards it is as before."""
    model, _, ids_BT = subject()
    before = {n: w.clone() for n, w in model.matrices().items()}
    replacement = made().matrices[4]["blocks.1.k"]
    plain = model.hidden(ids_BT)
    with exchanged(model.matrices()["blocks.1.k"], replacement):
        now = model.matrices()
        assert {n for n in now if not torch.equal(now[n], before[n])} == {"blocks.1.k"}
        assert torch.equal(now["blocks.1.k"], replacement.decoded())
        assert not torch.equal(model.hidden(ids_BT), plain)
    assert all(torch.equal(w, before[n]) for n, w in model.matrices().items())
    assert torch.equal(model.hidden(ids_BT), plain)


def test_damage_is_the_divergence_of_the_predictions() -> None:
    """In float32 the damage is KL(model || model with the matrix quantized), mean per token."""
    model, _, ids_BT = subject()
    log_p = model.logits(model.hidden(ids_BT)).log_softmax(-1)
    for name in ("blocks.0.up", "blocks.1.q"):
        with exchanged(model.matrices()[name], made().matrices[4][name]):
            log_q = model.logits(model.hidden(ids_BT)).log_softmax(-1)
        divergence = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / ids_BT.numel()
        assert damages()[name][4] == pytest.approx(divergence.item(), rel=1e-3, abs=1e-7)
    assert all(d[4] > 2 * d[6] > 0 for d in damages().values()), "two bits: about a sixteenth"


def test_damage_follows_the_weighted_error() -> None:
    """Measured at one width and scaled by the error, damage is near what every width measures."""
    model, _, ids_BT = subject()
    scaled = damage_by_error(model, ids_BT, evenly().matrices, evenly().errors)
    measured = even_damages()
    for name, by_bits in scaled.items():
        assert list(by_bits) == list(WIDTHS)
        assert by_bits[5] == pytest.approx(measured[name][5])
        for bits in (4, 4.5, 5.5, 6):
            assert by_bits[bits] == pytest.approx(measured[name][bits], rel=0.5)
        assert list(by_bits.values()) == sorted(by_bits.values(), reverse=True)


def test_a_matrix_without_error_does_no_damage() -> None:
    """Where no code errs nothing is divided by zero, and noise below zero counts as zero."""
    model, _, ids_BT = subject()
    none = dict.fromkeys(model.matrices(), 0.0)
    found = damage_by_error(model, ids_BT, {5: made().matrices[5], 6: {}}, {5: none, 6: none})
    assert all(set(d.values()) == {0.0} for d in found.values())


def test_rounding_of_activations_is_not_taken_for_damage() -> None:
    """A bfloat16 model whose matrix is exchanged for one as precise as bfloat16 shows none."""
    _, _, ids_BT = subject()
    model = random_model(SMALL, dtype=torch.bfloat16)
    for name, w in model.matrices().items():
        w.copy_(made().matrices[8][name].decoded())  # then int8 again is exact
    same = damage(model, ids_BT, {8: made().matrices[8]})
    assert all(d[8] == 0 for d in same.values())
    drawn = damage(model, ids_BT, {4: made().matrices[4]})
    for name, d in drawn.items():
        assert d[4] == pytest.approx(damages()[name][4], rel=0.35, abs=2e-4), name


def test_the_head_does_not_round() -> None:
    """Logits of a bfloat16 model are the float64 product of its hidden states and embedding."""
    _, _, ids_BT = subject()
    model = random_model(SMALL, dtype=torch.bfloat16)
    raw = model.hidden(ids_BT).double() @ model.tok_emb.weight.double().T
    cap = SMALL.logit_softcap
    expected = cap * torch.tanh(raw / cap)
    torch.testing.assert_close(precise_logits(model, ids_BT).double(), expected, atol=1e-4, rtol=0)


# From settings to the artifact.


def _run(bits: str, limit_bytes: int, path: Path) -> dict[str, float]:
    model, hessians, ids_BT = subject()
    quant = replace(QUANT, bits=bits, limit_bytes=limit_bytes)  # pyright: ignore[reportArgumentType]
    summary = quantize_run(model, hessians, ids_BT, RunConfig(model=SMALL, quant=quant), path)
    return {m["name"]: m["bits"] for m in summary["matrices"]}


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_measured_bits_fit_and_hurt_least(share: float, tmp_path: Path) -> None:
    """The artifact fits the limit, is nearly full, and does no more damage than `budgeted`."""
    ends = [len(artifact.pack(made().chosen(dict.fromkeys(made().sizes, b)))) for b in (5, 6)]
    room = round(ends[0] + share * (ends[1] - ends[0]))
    limit = room + codesize.code_bytes()
    measured = _run("measured", limit, tmp_path / "measured.fwy")
    size = len(artifact.pack(evenly().chosen(measured)))
    assert 0.97 * room <= size <= room
    budgeted = _run("budgeted", limit, tmp_path / "budgeted.fwy")
    ours = sum(even_damages()[n][b] for n, b in measured.items())
    assert ours <= sum(damages()[n][b] for n, b in budgeted.items())


def test_unbounded_measured_bits_are_the_largest_and_come_back(tmp_path: Path) -> None:
    """Where everything fits nearly all is int8 (as good as int7 now and then), and is read back."""
    path = tmp_path / "quantized.fwy"
    bits = _run("measured", 10**9, path)
    assert min(bits.values()) >= 7
    assert 8 in bits.values()
    assert artifact.load(path).matrices.keys() == bits.keys()


def test_every_width_survives_the_file() -> None:
    """Matrices of 4 to 8 bits and grids between are read as they were, and stay matrices."""
    names = list(made().sizes)
    bits = {name: WIDTHS[i % len(WIDTHS)] for i, name in enumerate(names)}
    packed = made().chosen(bits)
    read = artifact.unpack(artifact.pack(packed, quality=1))
    assert {n: m.bits for n, m in read.matrices.items()} == {
        n: math.ceil(b) for n, b in bits.items()
    }
    for name, matrix in packed.matrices.items():
        other: QuantizedMatrix = read.matrices[name]
        assert torch.equal(matrix.codes_RC, other.codes_RC)
        assert torch.equal(matrix.scales_R, other.scales_R)
    state, again = dequantize(packed), dequantize(read)
    assert all(torch.equal(state[n], again[n]) for n in state)


def test_declared_bits_hold_every_code() -> None:
    """A matrix with one step is declared with as many bits as its codes take, 4 to 8."""
    for by_name in evenly().matrices.values():
        for matrix in by_name.values():
            assert 4 <= matrix.bits <= 8
            assert matrix.codes_RC.abs().max() <= top_code(matrix.bits)
    wide = quantize.bits_for(torch.tensor([[16, -3]]), 4.5)
    assert wide == 6, "16 is beyond int5"


def test_estimates_are_sums_over_matrices() -> None:
    """The cheap size of a choice is what the estimate says of the whole model."""
    bits = {name: WIDTHS[i % len(WIDTHS)] for i, name in enumerate(made().sizes)}
    whole = estimate.packed_bytes(made().chosen(bits))
    assert made().estimated_bytes(bits) == pytest.approx(whole)
