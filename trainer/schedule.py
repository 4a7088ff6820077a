"""Learning rate, momentum, snapshots and stop as pure functions of step and elapsed time.

Step counts in the settings are those of the record's 6,819 steps. A run that will make fewer
scales them by `step_scale` = expected_steps / 6,819, or its learning rate would never leave the
warmdown; a run that makes more keeps the record's counts.
"""

from dataclasses import dataclass

from trainer.config import RECORD_STEPS, OptimConfig, TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Schedules of one run. `expected_steps` is told (max_steps) or measured after priming."""

    train: TrainConfig
    optim: OptimConfig
    expected_steps: int

    @property
    def step_scale(self) -> float:
        """Factor on step counts: 1 for the record's length or more."""
        return min(1.0, self.expected_steps / RECORD_STEPS)

    def lr_scale(self, step: int, elapsed_s: float) -> float:
        """Factor on every learning rate, before `step` (counted from 0).

        1 until the warmdown, then linear down to `lr_floor` at the end. With max_steps the end is
        counted in steps; otherwise in seconds, the warmdown being worth
        warmdown_steps * step_scale steps at the mean step time so far.
        """
        warmdown_steps = self.train.warmdown_steps * self.step_scale
        if warmdown_steps == 0:
            return 1.0
        left = min(1.0, self._steps_left(step, elapsed_s) / warmdown_steps)
        return self.train.lr_floor + (1 - self.train.lr_floor) * left

    def _steps_left(self, step: int, elapsed_s: float) -> float:
        """Steps until the end; by the clock, at the mean step time so far."""
        limits = self.train
        if limits.max_steps is not None:
            return max(0, limits.max_steps - step)
        if limits.max_seconds is None or step == 0 or elapsed_s <= 0:
            return float(self.expected_steps - step)
        return max(0.0, limits.max_seconds - elapsed_s) * step / elapsed_s

    def muon_momentum(self, step: int) -> float:
        """Muon's momentum at `step`: linear from start to end over its warm-up."""
        warm_up_steps = self.optim.muon_momentum_steps * self.step_scale
        share = min(1.0, step / warm_up_steps) if warm_up_steps else 1.0
        start, end = self.optim.muon_momentum_start, self.optim.muon_momentum_end
        return start + (end - start) * share

    @property
    def ema_decay(self) -> float:
        """Decay per step of EMA: it forgets over the same share of a run, however many its steps.

        The record's 0.997 forgets over 333 of 6,819 steps; in 840 it would keep 8 % of the initial
        weights.
        """
        return self.train.ema_decay ** (1 / self.step_scale)

    def take_snapshot(self, step: int, scale: float) -> bool:
        """Whether the weights after `step` steps join the stochastic weight average."""
        every = max(1, round(self.train.swa_every * self.step_scale))
        return scale < self.train.swa_below and step % every == 0

    def qat_on(self, scale: float) -> bool:
        """Whether late QAT is active at this learning-rate scale."""
        return scale < self.train.late_qat_below

    def finished(self, step: int, elapsed_s: float, in_flight: int = 0) -> bool:
        """Whether training ends before `step`: one more would pass a limit.

        Args:
            step: steps taken.
            elapsed_s: seconds they took on the host.
            in_flight: how many of them the device may still have to do.
        """
        limits = self.train
        if limits.max_steps is not None and step >= limits.max_steps:
            return True
        if limits.max_seconds is None or step == 0:
            return False
        return elapsed_s + (1 + in_flight) * elapsed_s / step > limits.max_seconds
