"""The plan of windows: which tokens each optimizer step reads. Pure numpy, no files, no ranks.

Letters: S windows in a step, T positions in a window, W ranks.

Inside a shard, a pass cuts the tokens into blocks of T from a random phase (0..T-1) and visits
the blocks from a random start in strides coprime with their number, so each block comes exactly
once; an exhausted pass is followed by one with fresh phase, start and stride. A block is followed
by one more token, the target of its last position.

A step mixes `width` shards, drawn with probability ~ (remaining blocks) ^ exponent by systematic
sampling: `width` evenly spaced points with one random offset on the line of weights, the shards
in random order. Each point stands for S / width windows. So a shard's share is right on average
and in each single step within one point, and large shards may be drawn more than once. Width and
exponent go linearly from their first to their last values over the first `mix_steps` steps.

A step's windows do not depend on the number of ranks: the published loader mixed max(8, W) ->
max(32, 8 W) shards, so that other world sizes saw other data; here it is always the figures of
the record's 8 ranks, 8 -> 64, and never more shards than there are. Hence every world size
trains on the same windows and a run may resume at another one.

Every random draw comes from a generator seeded by (seed, purpose, counters), so that the whole
state is the counters.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.config import MICRO_BATCHES, DataConfig
from trainer.errors import ConfigError, DataError

_STEP, _PASS = 0, 1


class ShardPasses:
    """Endless passes over the blocks of one shard of `tokens` tokens."""

    def __init__(self, tokens: int, seq_len: int, seed: int, shard: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.seed, self.shard = seed, shard
        self.begin(0, 0)

    def begin(self, number: int, visited: int) -> None:
        """Enter pass `number` with `visited` of its blocks behind us."""
        rng = np.random.default_rng((self.seed, _PASS, self.shard, number))
        spare = self.tokens - self.seq_len - 1
        self.phase = int(rng.integers(min(self.seq_len, spare + 1)))
        self.blocks = (self.tokens - 1 - self.phase) // self.seq_len
        self.start = int(rng.integers(self.blocks))
        self.stride = _coprime(rng, self.blocks)
        self.number, self.visited = number, visited

    @property
    def remaining(self) -> int:
        """Blocks this pass has yet to visit; at least 1."""
        return self.blocks - self.visited

    def take(self, count: int) -> np.ndarray:
        """First tokens of the next `count` blocks, int64 [count]; rolls over into new passes."""
        parts: list[np.ndarray] = []
        while count > 0:
            now = min(count, self.remaining)
            order = np.arange(self.visited, self.visited + now, dtype=np.int64)
            block = (self.start + self.stride * order) % self.blocks
            parts.append(self.phase + self.seq_len * block)
            count -= now
            self.visited += now
            if self.remaining == 0:
                self.begin(self.number + 1, 0)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


class Plan:
    """Endless steps of windows (shard index, first token), the same for every world size.

    Args:
        shard_token_counts: tokens in each shard; shards without room for a window are passed over.
        seq_len: T; a window reads T + 1 tokens.
        sequences_per_step: S.
        config: mixing width, exponents and steps.
        seed: non-negative; same seed, same plan.
        step_scale: factor on `mix_steps` for runs shorter than the record's.

    Raises:
        ConfigError: a negative seed, or a count or scale that is not positive.
        DataError: no shard holds a whole window.
    """

    def __init__(
        self,
        shard_token_counts: Sequence[int],
        seq_len: int,
        sequences_per_step: int,
        config: DataConfig,
        seed: int,
        step_scale: float = 1.0,
    ) -> None:
        if seed < 0 or seq_len < 1 or sequences_per_step < 1 or step_scale <= 0:
            raise ConfigError(
                f"seed {seed} must be at least 0; seq_len {seq_len}, sequences_per_step "
                f"{sequences_per_step} and step_scale {step_scale} above 0"
            )
        if not 1 <= config.mix_shards_start <= config.mix_shards_end:
            raise ConfigError(
                f"mix_shards_start {config.mix_shards_start} must be at least 1 and at most "
                f"mix_shards_end {config.mix_shards_end}"
            )
        self.sequences_per_step, self.seq_len = sequences_per_step, seq_len
        self.config, self.seed, self.step_scale = config, seed, step_scale
        self.counts = [int(count) for count in shard_token_counts]
        self.passes = [
            ShardPasses(count, seq_len, seed, shard)
            for shard, count in enumerate(self.counts)
            if count > seq_len
        ]
        if not self.passes:
            raise DataError(
                f"no training shard holds a window of {seq_len} + 1 tokens (the longest has "
                f"{max(self.counts, default=0)}). Use more data or a smaller model.seq_len."
            )
        self.step = 0

    def mixing(self) -> tuple[int, float]:
        """Draws of a shard, and the exponent of its remaining blocks, in the next step."""
        c = self.config
        done = min(1.0, self.step / max(1.0, c.mix_steps * self.step_scale))
        width = round(c.mix_shards_start + done * (c.mix_shards_end - c.mix_shards_start))
        exponent = c.mix_exponent_start + done * (c.mix_exponent_end - c.mix_exponent_start)
        return min(width, len(self.passes), self.sequences_per_step), exponent

    def next_batch(self) -> np.ndarray:
        """Windows of the next step in their order: int64 [S, 2] of (shard index, first token)."""
        rng = np.random.default_rng((self.seed, _STEP, self.step))
        width, exponent = self.mixing()
        remaining = np.array([shard.remaining for shard in self.passes], dtype=np.float64)
        points = systematic_draw(rng, remaining**exponent, width)
        counts = np.bincount(
            points[np.arange(self.sequences_per_step) % width], minlength=len(self.passes)
        )
        windows_S2 = np.concatenate(
            [
                np.stack([np.full(count, shard.shard), shard.take(int(count))], axis=1)
                for shard, count in zip(self.passes, counts, strict=True)
                if count
            ]
        )
        self.step += 1
        return rng.permutation(windows_S2)

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on from here, ready for JSON."""
        return {
            "identity": self._identity(),
            "step_scale": self.step_scale,
            "step": self.step,
            "passes": [[shard.number, shard.visited] for shard in self.passes],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken, with its step_scale.

        Raises:
            DataError: the state belongs to other shards, another seed or another window length.
        """
        if state["identity"] != self._identity():
            raise DataError(
                "the saved position in the data belongs to other shards or settings "
                f"({state['identity']}; now {self._identity()}). Resume with the data folder, "
                "seed, seq_len and sequences_per_step that the run began with."
            )
        self.step_scale, self.step = state["step_scale"], state["step"]
        for shard, (number, visited) in zip(self.passes, state["passes"], strict=True):
            shard.begin(number, visited)

    def _identity(self) -> dict[str, int]:
        """Figures that must agree between a saved state and this plan."""
        weighted = sum((i + 1) * count for i, count in enumerate(self.counts))
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "sequences_per_step": self.sequences_per_step,
            "shards": len(self.counts),
            "tokens": sum(self.counts),
            "weighted_tokens": weighted,
        }


def systematic_draw(rng: np.random.Generator, weights: np.ndarray, points: int) -> np.ndarray:
    """Draw `points` indices with probability ~ `weights` (positive, [n]); int64 [points].

    Index i comes floor or ceil of points * weights[i] / sum times (systematic sampling).
    """
    order = rng.permutation(weights.size)
    edges = np.cumsum(weights[order])
    at = (rng.random() + np.arange(points)) * (edges[-1] / points)
    # Rounding may put the last point on the very end of the line.
    slots = np.minimum(np.searchsorted(edges, at, side="right"), weights.size - 1)
    return order[slots]


def rank_share(
    windows_S2: np.ndarray, rank: int, world_size: int, micro_batches: int = MICRO_BATCHES
) -> np.ndarray:
    """Every `world_size`-th window from `rank` on, int64 [micro_steps, S / micro_batches, 2].

    Raises:
        ConfigError: `world_size` does not divide `micro_batches`, or that does not divide S.
    """
    check_divisible(len(windows_S2), world_size, micro_batches)
    return windows_S2[rank::world_size].reshape(
        micro_batches // world_size, len(windows_S2) // micro_batches, 2
    )


def check_divisible(sequences_per_step: int, world_size: int, micro_batches: int) -> None:
    """Require that ranks share the micro-batches, and these the windows, evenly.

    Raises:
        ConfigError: they do not.
    """
    if world_size < 1 or micro_batches % world_size:
        sizes = [w for w in range(1, micro_batches + 1) if micro_batches % w == 0]
        raise ConfigError(
            f"{world_size} ranks cannot share a step's {micro_batches} micro-batches evenly. "
            f"Start {', '.join(map(str, sizes[:-1]))} or {sizes[-1]} ranks."
        )
    if sequences_per_step < 1 or sequences_per_step % micro_batches:
        near = max(1, round(sequences_per_step / micro_batches)) * micro_batches
        raise ConfigError(
            f"train.sequences_per_step {sequences_per_step} is not a multiple of {micro_batches} "
            f"micro-batches. Choose {near}, for example."
        )


def _coprime(rng: np.random.Generator, blocks: int) -> int:
    """A random stride in 1..blocks that has no common factor with `blocks`."""
    while True:
        stride = int(rng.integers(1, blocks + 1))
        if math.gcd(stride, blocks) == 1:
            return stride
