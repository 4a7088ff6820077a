"""The plan of windows: each block once a pass, fair mixing, same for every number of ranks."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import DataConfig
from trainer.errors import ConfigError, DataError
from trainer.plan import Plan, ShardPasses, rank_share, systematic_draw

RANKS = (1, 2, 4, 8)


@given(
    tokens=st.integers(2, 4000),
    seq_len=st.integers(1, 64),
    seed=st.integers(0, 2**32),
    takes=st.lists(st.integers(1, 50), min_size=1, max_size=5),
)
def test_each_block_once_per_pass(tokens: int, seq_len: int, seed: int, takes: list[int]) -> None:
    """A pass over a shard visits every block of its phase exactly once, however it is asked."""
    if tokens <= seq_len:
        tokens += seq_len
    shard = ShardPasses(tokens, seq_len, seed, shard=3)
    for _ in range(3):
        firsts: list[int] = []
        number = shard.number
        sizes = iter(takes * (tokens // len(takes) + 1))
        while shard.number == number:
            firsts += shard.take(min(next(sizes), shard.remaining)).tolist()
        phase = min(firsts)
        # Independent: the blocks that fit behind this phase, each with one more target token.
        fitting = list(range(phase, tokens - seq_len, seq_len))
        assert sorted(firsts) == fitting
        assert phase < seq_len


def test_take_rolls_over_between_passes() -> None:
    """Asking for more blocks than a pass has left goes on in the next pass without a gap."""
    at_once = ShardPasses(1000, 10, 5, 0).take(450)
    singly = ShardPasses(1000, 10, 5, 0)
    assert at_once.tolist() == [int(singly.take(1)[0]) for _ in range(450)]


def test_phases_starts_and_strides_vary() -> None:
    """Passes differ in phase, start and stride, and cover the range of each."""
    shard = ShardPasses(1 << 12, 16, 7, 0)
    seen = [(shard.phase, shard.start, shard.stride)]
    for number in range(1, 400):
        shard.begin(number, 0)
        seen.append((shard.phase, shard.start, shard.stride))
    phases, starts, strides = (set(values) for values in zip(*seen, strict=True))
    assert phases == set(range(16))
    assert len(starts) > 150
    assert max(starts) > 240
    assert len(strides) > 100
    assert max(strides) > 240


@given(
    counts=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    seq_len=st.integers(1, 50),
    sequences=st.integers(1, 6).map(lambda n: 8 * n),
    seed=st.integers(0, 1000),
)
def test_windows_fit_and_repeat(counts: list[int], seq_len: int, sequences: int, seed: int) -> None:
    """Every window and its last target lie inside their shard, and one seed gives one plan."""
    counts = [*counts, seq_len + 1]
    plans = [Plan(counts, seq_len, sequences, DataConfig(), seed) for _ in range(2)]
    for _ in range(4):
        a_S2, b_S2 = (plan.next_batch() for plan in plans)
        assert a_S2.shape == (sequences, 2)
        assert a_S2.tolist() == b_S2.tolist()
        for shard, first in a_S2.tolist():
            assert first >= 0
            assert first + seq_len + 1 <= counts[shard]


def test_seeds_differ() -> None:
    """Another seed gives another plan."""
    first, second = (Plan([9000] * 9, 8, 16, DataConfig(), seed).next_batch() for seed in (1, 2))
    assert first.tolist() != second.tolist()


@given(seed=st.integers(0, 100), steps=st.integers(1, 5), world_size=st.sampled_from(RANKS))
def test_ranks_partition_the_plan(seed: int, steps: int, world_size: int) -> None:
    """Ranks of any world size together read each window of a step once, every W-th of it each."""
    plan = Plan([5000] * 10, 16, 48, DataConfig(), seed)
    for _ in range(steps):
        windows_S2 = plan.next_batch()
        together: list[object] = [None] * 48
        for rank in range(world_size):
            share = rank_share(windows_S2, rank, world_size)
            assert share.shape == (8 // world_size, 6, 2)
            together[rank::world_size] = share.reshape(-1, 2).tolist()
        assert together == windows_S2.tolist()


@pytest.mark.parametrize("world_size", [0, 3, 5, 6, 7, 16])
def test_bad_world_size(world_size: int) -> None:
    """A world size that does not divide 8 is refused with those that do."""
    with pytest.raises(ConfigError, match="1, 2, 4 or 8 ranks"):
        rank_share(np.zeros((48, 2)), 0, world_size)


@pytest.mark.parametrize("sequences", [1, 12, 383])
def test_bad_batch(sequences: int) -> None:
    """A batch that 8 micro-batches cannot share evenly is refused with one that they can."""
    with pytest.raises(ConfigError, match="not a multiple of 8"):
        rank_share(np.zeros((sequences, 2)), 0, 1)


@given(
    weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40),
    points=st.integers(1, 64),
    seed=st.integers(0, 2**20),
)
def test_draws_follow_weights(weights: list[float], points: int, seed: int) -> None:
    """Each shard is drawn as often as its weight says, to within one draw."""
    drawn = Counter(
        systematic_draw(np.random.default_rng(seed), np.array(weights), points).tolist()
    )
    assert drawn.total() == points
    for index, weight in enumerate(weights):
        share = points * weight / math.fsum(weights)
        assert math.floor(share - 1e-9) <= drawn[index] <= math.ceil(share + 1e-9)


def test_small_shards_get_their_chance() -> None:
    """Over many draws a shard's frequency is its share of the weights."""
    weights = np.array([1.0, 2.0, 3.0, 94.0])
    counts = np.zeros(4)
    draws = 4000
    for seed in range(draws):
        counts += np.bincount(systematic_draw(np.random.default_rng(seed), weights, 2), minlength=4)
    share = 2 * weights / weights.sum()
    # Five standard deviations of a count that is floor or ceil of its mean.
    spread = 5 * np.sqrt((share % 1) * (1 - share % 1) / draws)
    assert np.all(np.abs(counts / draws - share) <= spread)


@pytest.mark.parametrize(
    ("step", "width", "exponent"),
    [(0, 8, 0.9), (450, 22, 0.8), (900, 36, 0.7), (1800, 64, 0.5), (5000, 64, 0.5)],
)
def test_mixing_widens(step: int, width: int, exponent: float) -> None:
    """Mixing goes from 8 shards and exponent 0.9 to 64 and 0.5 in 1800 even steps."""
    plan = Plan([1000] * 100, 9, 384, DataConfig(), 0)
    plan.step = step
    assert plan.mixing() == (width, pytest.approx(exponent, abs=1e-12))
    shorter = Plan([1000] * 100, 9, 384, DataConfig(), 0, step_scale=0.1)
    shorter.step = step // 10
    assert shorter.mixing() == (width, pytest.approx(exponent, abs=1e-12))


def test_width_of_real_steps() -> None:
    """A step reads exactly as many equal shards as mixing says, and never more than there are."""
    for shards, first, last in ((100, 8, 64), (20, 8, 20), (3, 3, 3)):
        plan = Plan([100_000] * shards, 9, 384, DataConfig(), 0)
        assert len(set(plan.next_batch()[:, 0].tolist())) == first
        fresh = Plan([100_000] * shards, 9, 384, DataConfig(), 0)
        fresh.step = 1800
        assert len(set(fresh.next_batch()[:, 0].tolist())) == last


def test_remaining_blocks_and_exponent_set_the_odds() -> None:
    """Shards are drawn by remaining blocks to the power of the exponent, not by size alone."""
    config = DataConfig(mix_exponent_start=0.5, mix_exponent_end=0.5)
    plan = Plan([100 * 900 + 1, 100 * 100 + 1], 100, 8000, config, 3)
    for shard, visited in zip(plan.passes, (500, 0), strict=True):
        shard.phase, shard.blocks = 0, shard.tokens // 100
        shard.visited = visited
    # Weights sqrt(400) : sqrt(100), so two draws in three: shares 4/3 and 2/3 of two draws.
    chosen = Counter[int]()
    state = [(s.phase, s.blocks, s.start, s.stride, s.number, s.visited) for s in plan.passes]
    for step in range(3000):
        plan.step = step
        chosen.update((plan.next_batch()[::4000, 0]).tolist())
        for shard, values in zip(plan.passes, state, strict=True):
            (shard.phase, shard.blocks, shard.start, shard.stride, shard.number, shard.visited) = (
                values
            )
    # Windows are shuffled, so each of the two looked at is shard 0 with probability 2/3.
    spread = 5 * math.sqrt(2 / 9 / 6000) + 5 * math.sqrt(2 / 9 / 3000)
    assert abs(chosen[0] / 6000 - 2 / 3) < spread


@given(before=st.integers(0, 6), after=st.integers(1, 4), seed=st.integers(0, 50))
def test_state_resumes_exactly(before: int, after: int, seed: int) -> None:
    """A plan's state, through JSON and into a new plan, gives the very same later windows."""
    counts = [300, 900, 55, 700]
    plan = Plan(counts, 10, 40, DataConfig(mix_steps=5), seed, step_scale=0.7)
    for _ in range(before):
        plan.next_batch()
    saved = json.loads(json.dumps(plan.state()))
    expected = [plan.next_batch().tolist() for _ in range(after)]
    other = Plan(counts, 10, 40, DataConfig(mix_steps=5), seed)
    other.next_batch()
    other.load_state(saved)
    assert [other.next_batch().tolist() for _ in range(after)] == expected
    assert other.state() == plan.state()


@pytest.mark.parametrize(
    "other",
    [
        Plan([300, 900], 10, 40, DataConfig(), 2),
        Plan([900, 300], 10, 40, DataConfig(), 1),
        Plan([300, 900], 9, 40, DataConfig(), 1),
        Plan([300, 900], 10, 48, DataConfig(), 1),
        Plan([300, 900, 5], 10, 40, DataConfig(), 1),
    ],
)
def test_foreign_state_is_refused(other: Plan) -> None:
    """A state saved with other shards, seed or window sizes is refused, not half applied."""
    plan = Plan([300, 900], 10, 40, DataConfig(), 1)
    with pytest.raises(DataError, match="other shards or settings"):
        plan.load_state(other.state())


def test_no_window_anywhere() -> None:
    """Shards that are all shorter than one window are refused; one that fits is enough."""
    with pytest.raises(DataError, match=r"window of 10 \+ 1"):
        Plan([10, 3], 10, 8, DataConfig(), 0)
    plan = Plan([10, 11, 3], 10, 8, DataConfig(), 0)
    assert plan.next_batch().tolist() == [[1, 0]] * 8


def test_bad_settings() -> None:
    """Negative seeds, empty batches and crossed mixing widths are refused."""
    for bad in ({"seed": -1}, {"seq_len": 0}, {"sequences_per_step": 0}, {"step_scale": 0.0}):
        settings = {"seq_len": 4, "sequences_per_step": 8, "seed": 0, "step_scale": 1.0} | bad
        with pytest.raises(ConfigError):
            Plan([100], config=DataConfig(), **settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="mix_shards_start"):
        Plan([100], 4, 8, DataConfig(mix_shards_start=9, mix_shards_end=8), 0)
