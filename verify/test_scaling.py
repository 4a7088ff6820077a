"""Claims about several ranks: what the scaling table is made of, and the loss of a rank."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import overlap, rank_loss, scaling
from bench.agreement import LIMIT, compare
from bench.rank_loss import Outcome
from bench.scaling import Run
from trainer.errors import RunError
from trainer.record import SMOKE
from verify.models import TINY_RUN

TINY = [*TINY_RUN, "--train.sequences-per-step=16"]
GRID = 40
intervals = st.lists(
    st.tuples(st.integers(0, GRID), st.integers(0, GRID)).map(lambda p: (min(p), max(p))),
    max_size=8,
)


def covered(spans: list[tuple[float, float]]) -> set[int]:
    """Unit cells of the grid inside any of the intervals."""
    return {cell for begin, end in spans for cell in range(int(begin), int(end))}


@given(intervals, intervals)
def test_overlap_counts_every_moment_once(
    a: list[tuple[float, float]], b: list[tuple[float, float]]
) -> None:
    """Union and intersection of intervals have the lengths that counting cells gives."""
    one, two = overlap.union(a), overlap.union(b)
    assert overlap.length(one) == len(covered(a))
    common = overlap.intersection(one, two)
    assert overlap.length(common) == len(covered(a) & covered(b))
    assert covered(common) == covered(a) & covered(b)


def kernel(name: str, begin: float, end: float, category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin}


def test_hidden_communication_is_what_compute_kernels_cover() -> None:
    """Only compute kernels hide communication; copies and other communication do not."""
    gather, scatter = "ncclDevKernel_AllGather_RING_LL", "ncclDevKernel_ReduceScatter_Sum_bf16"
    events = [
        kernel("nvjet_gemm", 0, 1000),
        kernel(scatter, 500, 2500),
        kernel("Memcpy DtoD", 1000, 1500, "gpu_memcpy"),
        kernel("muon", 2000, 2200),
        kernel(gather, 2400, 3000),
        kernel("ema", 3500, 4000),
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 9000},
        {"ph": "i", "cat": "kernel", "name": "marker", "ts": 0},
    ]
    found = overlap.read(events, steps=2)
    assert found is not None
    assert found.window_ms == pytest.approx(2.0)
    assert found.busy_ms == pytest.approx((4.0 - 0.5) / 2)
    assert found.communication.ms == pytest.approx(2.5 / 2)
    assert found.communication.hidden_ms == pytest.approx(0.7 / 2)
    assert found.kinds["ReduceScatter"].ms == pytest.approx(1.0)
    assert found.kinds["AllGather"].hidden_ms == 0
    assert found.kinds.keys() == {"ReduceScatter", "AllGather"}
    assert overlap.read([], steps=2) is None


def walk(seed: int, growth: float) -> list[float]:
    """Losses of 50 steps with a difference that grows from run to run's own noise."""
    rng = random.Random(seed)
    return [6 - 0.03 * t + rng.gauss(0, growth * (1 + t)) for t in range(50)]


def test_losses_agree_up_to_the_order_of_sums_and_no_further() -> None:
    """Runs as far apart as the yardstick agree; one with fifteen times its difference does not."""
    base, worst = walk(0, 0.0), []
    for seed in range(1, 60, 2):
        found = compare(base, [walk(seed, 2e-5)], walk(seed + 1, 2e-5))
        worst.append(found.worst)
        assert not compare(base, [walk(seed, 2e-5)], walk(seed + 1, 3e-4)).holds
    assert max(worst) < LIMIT
    assert compare(base, [base], base).worst == 0
    first = [base[0] + 1e-3, *base[1:]]
    assert compare(base, [base], first).first_nats == pytest.approx(1e-3)
    assert not compare(base, [base], first).holds


def test_scaling_table_from_real_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One and two real ranks give a table, and their losses agree."""
    out = tmp_path / "scaling.json"
    options = ["--worlds", "1", "2", "--steps", "12", "--warm-up-steps", "3", "--out", str(out)]
    assert scaling.main([*options, "--", *TINY]) == 0, capsys.readouterr()
    document = json.loads(out.read_text())
    one, two = document["table"]
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(one["ms_per_step"] / two["ms_per_step"] / 2)
    assert one["tokens_per_s"] == pytest.approx(1000 * 16 * 32 / one["ms_per_step"])
    losses = [run["losses"] for run in document["runs"]]
    assert [len(run) for run in losses] == [12, 12, 12]
    assert all(run["times_ms"][0] > 0 and len(run["times_ms"]) == 12 for run in document["runs"])
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert losses[0] != losses[1], "the yardstick did not permute anything"
    assert document["agreement"]["2"]["worst"] <= LIMIT
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--worlds", "2"], "must contain 1"),
        (["--worlds", "1", "3"], "1, 2, 4 and 8"),
        (["--steps", "5"], "--steps must leave"),
        (["--yardsticks", "0"], "--yardsticks"),
        (["--traced-steps", "0"], "--traced-steps"),
    ],
)
def test_scaling_refuses_what_gives_no_table(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    """Options without a comparison are refused before anything runs."""
    assert scaling.main(options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world", "3"], "3 ranks"),
        (["--resume-world", "0"], "0 ranks"),
        (["--victim", "2"], "--victim 2"),
        (["--steps-after", "0"], "--steps-after"),
    ],
)
def test_ranks_that_cannot_be_lost_are_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    """A rank that there is not cannot be killed: said before a run is started."""
    assert rank_loss.main(options) == 2
    assert message in capsys.readouterr().err


def test_single_runs_share_the_machine_as_far_as_it_has_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With two GPUs the plain run and the yardstick go side by side; larger worlds go alone."""
    arguments = scaling.Arguments(worlds=(1, 2), yardsticks=2)
    plain, first, second = Run(1), Run(1, 1), Run(1, 2)
    for gpus, groups in ((0, 3), (1, 3), (2, 2), (8, 1)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        found = scaling.plan(arguments)
        assert len(found) == groups + 1
        assert found[-1] == [Run(2)]
        assert list(itertools.chain(*found[:-1])) == [plain, first, second]


def test_losing_a_rank_ends_the_run_which_goes_on_at_another_world_size(tmp_path: Path) -> None:
    """A killed rank ends the run within 60 s with a message; one rank continues its losses."""
    out = tmp_path / "loss.json"
    options = ["--world", "2", "--resume-world", "1", "--out", str(out), "--resumed-steps", "3"]
    steps = ["--checkpoint-steps", "40", "--steps-after", "15"]
    assert rank_loss.main([*options, *steps, "--", *TINY]) == 0
    document = json.loads(out.read_text())
    assert document["good"]
    assert document["end_s"] < rank_loss.END_LIMIT_S
    assert any("rank 0 lost a peer" in line for line in document["messages"])
    assert document["resumed_to_step"] > document["killed_step"] > document["checkpoint_step"]


def test_a_resumed_run_that_lost_its_state_is_noticed() -> None:
    """Other weights show at the first step, other optimizer state at the later ones."""
    before = {step: 6 - 0.05 * step for step in range(10)}
    same = rank_loss.compare(before, dict(before), SMOKE)
    assert same.holds
    assert same.steps == 10
    assert same.later_limit == pytest.approx(0.005)
    assert not rank_loss.compare(before, {**before, 0: before[0] + 1e-3}, SMOKE).holds
    assert not rank_loss.compare(before, {**before, 5: before[5] + 0.01}, SMOKE).holds
    with pytest.raises(RunError, match="--steps-after"):
        rank_loss.compare(before, {0: 6.0}, SMOKE)
    good = Outcome(5.0, ["rank 0 lost a peer"], 1, 2, 3, {"x": same})
    assert good.good
    assert not Outcome(61.0, ["rank 0 lost a peer"], 1, 2, 3, {"x": same}).good
    assert not Outcome(5.0, [], 1, 2, 3, {"x": same}).good


def test_a_run_that_fails_shows_its_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ends with an error is reported with its own message."""
    options = ["--steps", "6", "--warm-up-steps", "1", "--traced-steps", "1"]
    missing = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "x.json")]
    assert scaling.main([*options, *missing]) == 2
    message = capsys.readouterr().err
    assert "1 rank(s) ended with status 2" in message
    assert str(tmp_path / "none") in message
