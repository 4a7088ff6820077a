"""The training loop, its clock, its checkpoints and its stop.

Letters: B windows of a micro-batch, T positions.
"""

import collections
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import checkpoint, compiling
from trainer.average import Averages
from trainer.checkpoint import BackgroundWriter, Checkpoint
from trainer.config import MICRO_BATCHES, RunConfig
from trainer.corpus import DataFolder
from trainer.errors import RunError
from trainer.folder import RunFolder
from trainer.loader import Loader, make_loader
from trainer.model import GPT
from trainer.optim import Optimizer
from trainer.progress import is_main_process, log, progress
from trainer.ranks import Ranks
from trainer.schedule import Schedule

STEPS_AHEAD = 2
"""Steps the host may queue before it waits for the GPU; keeps the wall clock honest."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run can be continued
    """A signal stopped training after a checkpoint; `signal` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@dataclass
class Progress:
    """Where training stands."""

    step: int = 0
    elapsed_s: float = 0.0


def train(
    config: RunConfig, model: GPT, data: DataFolder, ranks: Ranks, folder: RunFolder
) -> dict[str, Any]:
    """Train `model` in place to its averaged weights; resume from the folder's checkpoint if any.

    Returns:
        Steps, ms/step, losses (nats), memory (bytes) and data stalls, JSON-able.

    Raises:
        Interrupted: SIGINT or SIGTERM; a checkpoint of this very step was written.
        RunError: the loss became NaN or infinite; the last good checkpoint stays.
    """
    return _Training(config, model, data, ranks, folder).run()


class _Training:
    """State of one training stage; every rank holds one."""

    def __init__(
        self, config: RunConfig, model: GPT, data: DataFolder, ranks: Ranks, folder: RunFolder
    ) -> None:
        self.config, self.model, self.data = config, model, data
        self.ranks, self.folder = ranks, folder
        self.micro_steps = MICRO_BATCHES // ranks.world_size
        self.optimizer = Optimizer(model, config.optim, model.compute_dtype)
        self.averages = Averages(model, config.train)
        loss = compiling.compiled(model.loss) if config.compile else model.loss
        self.loss_fn = loss
        self.at = Progress()
        self.writer = BackgroundWriter(folder.checkpoint)
        self.interrupted_by = 0

    def run(self) -> dict[str, Any]:
        resumed = checkpoint.load(self.folder.checkpoint) if self._has_checkpoint() else None
        expected_steps = resumed.counters["expected_steps"] if resumed else None
        primed_s = self._prime()
        self.schedule = Schedule(
            self.config.train, self.config.optim, expected_steps or self._expected_steps(primed_s)
        )
        self.loader = make_loader(
            self.data, self.config, self.ranks, step_scale=self.schedule.step_scale
        )
        try:
            if resumed is not None:
                self._restore(resumed)
            with self._signals():
                return self._loop()
        finally:
            self.loader.close()

    def _has_checkpoint(self) -> bool:
        return self.folder.checkpoint.exists()

    # Priming: compile both graphs before the clock starts, then undo every trace of it.

    def _prime(self) -> float:
        """Run priming steps and undo them; returns the seconds of a settled step (0 if none)."""
        steps = self.config.train.priming_steps
        if steps == 0:
            return 0.0
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        loader = make_loader(self.data, self.config, self.ranks, step_scale=1.0)
        # Both graphs compile: late QAT first, so that the timed steps are those that run most.
        qat_steps = min(3, steps // 2)
        times: list[float] = []
        with progress("priming", steps) as advance:
            for step in range(steps):
                self.model.late_qat = self.config.train.late_qat if step < qat_steps else "off"
                started = time.perf_counter()
                self._step(loader, lr_scale=1.0, momentum=self.config.optim.muon_momentum_start)
                self._synchronize()
                times.append(time.perf_counter() - started)
                advance()
        loader.close()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])
        self.model.late_qat = "off"
        self.optimizer = Optimizer(self.model, self.config.optim, self.model.compute_dtype)
        return sorted(times[qat_steps:])[(steps - qat_steps) // 2]

    def _expected_steps(self, step_s: float) -> int:
        """Steps this run will make: told, or measured; the same on every rank."""
        limits = self.config.train
        if limits.max_steps is not None:
            return limits.max_steps
        if limits.max_seconds is None or step_s == 0:
            raise RunError(
                "the number of steps is unknown: set --train.max-steps, or --train.max-seconds "
                "together with --train.priming-steps above 0"
            )
        return max(1, round(limits.max_seconds / self.ranks.from_main(step_s)))

    # The loop.

    def _loop(self) -> dict[str, Any]:
        train, at, schedule = self.config.train, self.at, self.schedule
        total = train.max_steps or self.schedule.expected_steps
        if self.config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        in_flight: collections.deque[torch.cuda.Event] = collections.deque()
        last_saved = (at.step, at.elapsed_s)
        started = time.perf_counter() - at.elapsed_s
        loss = norm = torch.tensor(math.nan)
        with progress("training", total) as advance:
            advance(at.step)
            while not schedule.finished(at.step, at.elapsed_s, len(in_flight)):
                scale = schedule.lr_scale(at.step, at.elapsed_s)
                self.model.late_qat = train.late_qat if schedule.qat_on(scale) else "off"
                loss, norm = self._step(self.loader, scale, schedule.muon_momentum(at.step))
                self.averages.update_ema(schedule.ema_decay)
                at.step += 1
                if schedule.take_snapshot(at.step, scale):
                    self.averages.take_snapshot()
                self._limit_run_ahead(in_flight)
                at.elapsed_s, stop = self.ranks.agree(
                    time.perf_counter() - started, self.interrupted_by
                )
                note = ""
                if at.step % train.log_every == 0 or at.step == 1:
                    note = self._log_step(loss, norm, scale)
                advance(1, note)
                if stop or self._checkpoint_due(last_saved):
                    # Finite loss and gradient: the weights about to be saved are good.
                    self._mean(loss, "loss")
                    self._mean(norm, "gradient norm")
                    self._save()
                    last_saved = (at.step, at.elapsed_s)
                if stop:
                    self.writer.wait()
                    raise Interrupted(stop)
        self._synchronize()
        at.elapsed_s = self.ranks.from_main(time.perf_counter() - started)
        final_loss = self._mean(loss, "loss")
        self._mean(norm, "gradient norm")
        if train.average == "both" and is_main_process():
            checkpoint.save_tensors(self.folder.averages, self.averages.state_dict(), {})
        self.averages.apply()
        self.model.late_qat = "off"
        self.writer.wait()
        return self._summary(final_loss)

    def _step(self, loader: Loader, lr_scale: float, momentum: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns this rank's mean loss and the gradient norm, on device."""
        total = torch.zeros((), device=self.ranks.device)
        for _ in range(self.micro_steps):
            x_BT, y_BT = loader.next()
            loss = self.loss_fn(x_BT, y_BT) / self.micro_steps
            loss.backward()
            total += loss.detach()
        norm = self.optimizer.step(lr_scale, momentum)
        self.optimizer.zero_grad()
        return total, norm

    def _log_step(self, loss: Tensor, norm: Tensor, scale: float) -> str:
        mean = self._mean(loss, "loss")
        self.folder.append_metric(
            step=self.at.step,
            train_nats=mean,
            lr_scale=scale,
            grad_norm=self._mean(norm, "gradient norm"),
            elapsed_s=self.at.elapsed_s,
            late_qat=self.model.late_qat != "off",
        )
        return f"loss {mean:.4f} nats, lr x{scale:.3f}, {self._ms_per_step():.0f} ms/step"

    def _mean(self, value_0: Tensor, what: str) -> float:
        """Mean of a scalar over ranks. Raises RunError when it is not finite."""
        mean = value_0.detach().clone()
        if self.ranks.world_size > 1:
            dist.all_reduce(mean, op=dist.ReduceOp.SUM)
            mean /= self.ranks.world_size
        value = mean.item()
        if not math.isfinite(value):
            self.writer.wait()
            kept = (
                f"the last good checkpoint is kept: continue with --resume {self.folder.path}"
                if self._has_checkpoint()
                else "no checkpoint had been written yet"
            )
            raise RunError(
                f"the training {what} is {value} at step {self.at.step}; {kept}. "
                "Lower --optim.muon-lr, --optim.embed-lr and --optim.scalar-lr if it recurs."
            )
        return value

    def _ms_per_step(self) -> float:
        return 1000 * self.at.elapsed_s / max(1, self.at.step)

    def _limit_run_ahead(self, in_flight: "collections.deque[torch.cuda.Event]") -> None:
        if self.config.device != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        in_flight.append(event)
        if len(in_flight) > STEPS_AHEAD:
            in_flight.popleft().synchronize()

    def _synchronize(self) -> None:
        if self.config.device == "cuda":
            torch.cuda.synchronize()

    # Checkpoints.

    def _checkpoint_due(self, last: tuple[int, float]) -> bool:
        every_steps = self.config.train.checkpoint_every_steps
        if every_steps is not None:
            return self.at.step - last[0] >= every_steps
        return self.at.elapsed_s - last[1] >= self.config.train.checkpoint_every_s

    def _save(self) -> None:
        optim = self.optimizer.state_dict()  # every rank takes part in gathering it
        if not is_main_process():
            return
        state = Checkpoint(
            model=dict(self.model.state_dict()),
            optim=optim,
            average=self.averages.state_dict(),
            counters={
                "step": self.at.step,
                "elapsed_s": self.at.elapsed_s,
                "expected_steps": self.schedule.expected_steps,
                "loader": self.loader.state(),
            },
        )
        self.writer.submit(state)

    def _restore(self, saved: Checkpoint) -> None:
        self.model.load_state_dict(saved.model)
        self.optimizer.load_state_dict(saved.optim)
        self.averages.load_state_dict(saved.average)
        self.loader.load_state(saved.counters["loader"])
        self.at = Progress(saved.counters["step"], saved.counters["elapsed_s"])
        if is_main_process():
            self.folder.forget_metrics_after(self.at.step)
        log(f"continuing at step {self.at.step}, {self.at.elapsed_s:.1f} s into training")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a checkpoint and a stop after the current step."""

        def ask(number: int, frame: object) -> None:
            self.interrupted_by = number

        previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _summary(self, final_loss: float) -> dict[str, Any]:
        cuda = self.config.device == "cuda"
        return {
            "steps": self.at.step,
            "train_s": self.at.elapsed_s,
            "ms_per_step": self._ms_per_step(),
            "final_train_nats": final_loss,
            "expected_steps": self.schedule.expected_steps,
            "step_scale": self.schedule.step_scale,
            "world_size": self.ranks.world_size,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "data_stall_share": self.loader.stall_s / max(self.at.elapsed_s, 1e-9),
        }
