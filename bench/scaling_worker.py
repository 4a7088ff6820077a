"""One rank of a run of `bench.scaling`: the trainer's own loop, with a look at every step.

    python -m bench.scaling_worker JOB.json        (torchrun starts one on every GPU)

Letters: S windows that one rank reads in a step, B windows of a micro-batch, T positions.
"""

import itertools
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import dacite
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity

from bench import overlap
from trainer import __main__ as command
from trainer import corpus, environment, files, ranks
from trainer.config import RunConfig
from trainer.errors import FairwayError
from trainer.folder import RunFolder
from trainer.loader import Loader
from trainer.run import new_model, preflight
from trainer.train import _Training

NEVER = 10**9


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        arguments: preset and overrides, as for `python -m trainer`.
        steps: steps of the whole run.
        traced_steps: the last of them, profiled and left out of the timing.
        permutation: seed of the order of every step's windows; None: the plan's order.
        out: JSON file for the result.
    """

    arguments: list[str]
    steps: int
    traced_steps: int
    permutation: int | None
    out: str


def settings(job: Job) -> RunConfig:
    """The job's settings: a run of so many steps that neither logs nor saves on its way.

    The loss of a step is read when all is done, so that nothing waits for it.
    """
    _, config = command.parse(job.arguments)
    train = replace(
        config.train,
        max_steps=job.steps,
        max_seconds=None,
        log_every=NEVER,
        checkpoint_every_steps=NEVER,
    )
    return replace(config, train=train)


class _Permuted:
    """A step's micro-batches with their windows in another order: same mean, other sums."""

    def __init__(self, loader: Loader, micro_steps: int, seed: int) -> None:
        batches = [torch.stack(loader.next()) for _ in range(micro_steps)]  # [2, B, T] each
        windows_2ST = torch.cat(batches, dim=1)
        generator = torch.Generator().manual_seed(seed)
        order_S = torch.randperm(windows_2ST.shape[1], generator=generator)
        self._batches = iter(windows_2ST[:, order_S.to(windows_2ST.device)].chunk(micro_steps, 1))

    def next(self) -> tuple[Tensor, Tensor]:
        x_BT, y_BT = next(self._batches)
        return x_BT, y_BT


class _Watched(_Training):
    """The training loop, with losses, times and a trace of its steps."""

    def watch(self, job: Job) -> dict[str, Any]:
        self.job = job
        self.watching = False
        self.losses: list[Tensor] = []
        self.events: list[torch.cuda.Event] = []
        self.clock_s: list[float] = []
        self.overlap: overlap.Overlap | None = None
        activity = ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU
        self.profiler = torch.profiler.profile(activities=[activity])
        summary = self.run()
        losses = torch.stack(self.losses)
        if self.ranks.world_size > 1:
            dist.all_reduce(losses)
            losses /= self.ranks.world_size
        return {**summary, "losses": losses.tolist(), "times_ms": self._times_ms()}

    @property
    def _cuda(self) -> bool:
        return self.config.device == "cuda"

    def _loop(self) -> dict[str, Any]:
        self.watching = True  # priming is over
        return super()._loop()

    def _step(self, loader: Loader, lr_scale: float, momentum: float) -> tuple[Tensor, Tensor]:
        if not self.watching:
            return super()._step(loader, lr_scale, momentum)
        self._mark()
        if self.at.step == self.job.steps - self.job.traced_steps:
            self._synchronize()
            self.profiler.start()
            self.ranks.wait_for_all()  # the profiler takes its time to start, on each rank another
        if self.job.permutation is not None:
            seed = NEVER * self.job.permutation + self.at.step
            loader = cast("Loader", _Permuted(loader, self.micro_steps, seed))
        loss, norm = super()._step(loader, lr_scale, momentum)
        self.losses.append(loss)
        if self.at.step == self.job.steps - 1:
            self._mark()
            self._synchronize()
            self.profiler.stop()
            self._read_trace()
        return loss, norm

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
        else:
            self.clock_s.append(time.perf_counter())

    def _times_ms(self) -> list[float]:
        """From the begin of each step to the begin of the next, or to the end of the last."""
        if self._cuda:
            return [a.elapsed_time(b) for a, b in itertools.pairwise(self.events)]
        return [1000 * (b - a) for a, b in itertools.pairwise(self.clock_s)]

    def _read_trace(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        self.overlap = overlap.read(events, self.job.traced_steps)


def work(job: Job) -> None:
    """Run the job on this rank; rank 0 writes the result. Raises FairwayError."""
    config = settings(job)
    preflight(config)
    with ranks.setup(config.device) as group, tempfile.TemporaryDirectory() as folder:
        data = corpus.open_data(config.data.dir, config.model.vocab_size)
        model = new_model(config, group.device)
        training = _Watched(config, model, data, group, RunFolder(Path(folder)))
        result = training.watch(job)
        mine = None if training.overlap is None else asdict(training.overlap)
        overlaps: list[Any] = [mine] * group.world_size
        if group.world_size > 1:
            dist.all_gather_object(overlaps, mine, group=group.host)
        if group.rank == 0:
            result["overlaps"] = [o for o in overlaps if o is not None]
            result["tokens_per_step"] = config.train.sequences_per_step * config.model.seq_len
            result["dtype"] = config.compute_dtype
            result["environment"] = environment.describe(config.device)
            files.write_json(Path(job.out), result)


def main() -> int:
    """Run the job whose file is the only argument."""
    try:
        work(dacite.from_dict(Job, json.loads(Path(sys.argv[1]).read_text())))
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
