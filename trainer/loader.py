"""Batches for the training loop: the plan's windows, gathered ahead by a thread.

Letters: B windows of one micro-batch, T positions, S windows of a step (all ranks).

A daemon thread follows the plan and copies windows from the mapped shards into a queue of
(pinned, on CUDA) batches. On CUDA a side stream uploads the next batch while the current one is
computed on. Every loader derives the whole plan and takes its own rank's share.
"""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config import MICRO_BATCHES, RunConfig
from trainer.corpus import DataFolder
from trainer.plan import Plan, check_divisible, rank_share
from trainer.ranks import Ranks

STOP_POLL_S = 0.1


@dataclass(frozen=True)
class _Batch:
    """One micro-batch: inputs and targets, int64 [2, B, T], and the plan after its step."""

    tokens: Tensor
    state_after: dict[str, Any] | None  # only on a step's last micro-batch
    uploaded: torch.cuda.Event | None = None


class Loader:
    """Micro-batches of one rank, in the plan's order, without end.

    Args:
        shards: tokens of each shard, uint16 [N], in the plan's order.
        plan: where the next step begins; owned by the loader from now on.
        rank, world_size: this rank's share of every step.
        micro_batches: micro-batches of a step, all ranks together.
        device: where batches go.
        queue_batches: batches prepared ahead.

    Attributes:
        stall_s: seconds that `next` has waited for the thread.

    Raises:
        ConfigError: ranks do not divide micro_batches, or these the windows of a step.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        plan: Plan,
        *,
        rank: int,
        world_size: int,
        micro_batches: int = MICRO_BATCHES,
        device: torch.device | str = "cpu",
        queue_batches: int = 8,
    ) -> None:
        check_divisible(plan.sequences_per_step, world_size, micro_batches)
        self.shards, self.plan = shards, plan
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches
        self.device = torch.device(device)
        self.queue_batches = queue_batches
        self.upload_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.stall_s = 0.0
        self._start()

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next micro-step: x_BT, y_BT, int64 on the device.

        x is tokens[s : s + T] and y is tokens[s + 1 : s + T + 1] of each window.

        Raises:
            Exception: whatever stopped the thread.
        """
        batch = self._ahead or self._upload(self._wait())
        self._ahead = None
        if batch.uploaded is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(batch.uploaded)
            batch.tokens.record_stream(stream)
            self._upload_ahead()
        self._mid_step = batch.state_after is None
        if batch.state_after is not None:
            self._state = batch.state_after
        return batch.tokens[0], batch.tokens[1]

    def state(self) -> dict[str, Any]:
        """The plan's state after the last step handed out, prefetched steps left aside.

        Raises:
            RuntimeError: called between micro-steps of one step.
        """
        if self._mid_step:
            raise RuntimeError("the loader's state exists between steps only")
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`; what was prefetched is dropped. Raises DataError."""
        self.close()
        self.plan.load_state(state)
        self._start()

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()

    def _start(self) -> None:
        self._state = self.plan.state()
        self._mid_step = False
        self._ahead: _Batch | None = None
        self._queue: queue.Queue[_Batch | Exception] = queue.Queue(self.queue_batches)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self._thread.start()

    # The thread's side

    def _fill(self) -> None:
        try:
            while not self._stop.is_set():
                windows_S2 = self.plan.next_batch()
                share_MB2 = rank_share(windows_S2, self.rank, self.world_size, self.micro_batches)
                for number, windows_B2 in enumerate(share_MB2, start=1):
                    after = self.plan.state() if number == len(share_MB2) else None
                    self._put(_Batch(self._gather(windows_B2), after))
        except Exception as error:
            self._put(error)

    def _gather(self, windows_B2: np.ndarray) -> Tensor:
        """Copy windows out of the shards: int64 [2, B, T], pinned on CUDA."""
        seq_len = self.plan.seq_len
        tokens_2BT = torch.empty(
            (2, len(windows_B2), seq_len),
            dtype=torch.int64,
            pin_memory=self.upload_stream is not None,
        )
        rows_2BT = tokens_2BT.numpy()
        for row, (shard, first) in enumerate(windows_B2):
            window = self.shards[shard][first : first + seq_len + 1]
            rows_2BT[0, row] = window[:-1]
            rows_2BT[1, row] = window[1:]
        return tokens_2BT

    def _put(self, item: _Batch | Exception) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=STOP_POLL_S)
            except queue.Full:
                continue
            return

    # The consumer's side

    def _wait(self) -> _Batch:
        started = time.perf_counter()
        item = self._queue.get()
        self.stall_s += time.perf_counter() - started
        if isinstance(item, Exception):
            self._put(item)  # so that every later call raises it too
            raise item
        return item

    def _upload_ahead(self) -> None:
        """Start the next upload if its batch is ready; never wait for one that is not."""
        try:
            item = self._queue.get_nowait()
        except queue.Empty:
            return
        if isinstance(item, Exception):
            self._put(item)  # the next call raises it; this one still has a good batch
        else:
            self._ahead = self._upload(item)

    def _upload(self, batch: _Batch) -> _Batch:
        if self.upload_stream is None:
            return batch
        with torch.cuda.stream(self.upload_stream):
            tokens_2BT = batch.tokens.to(self.device, non_blocking=True)
            uploaded = torch.cuda.Event()
            uploaded.record(self.upload_stream)
        return _Batch(tokens_2BT, batch.state_after, uploaded)


def make_loader(data: DataFolder, config: RunConfig, ranks: Ranks, *, step_scale: float) -> Loader:
    """The loader of this rank for a run's settings. Raises ConfigError, DataError."""
    shards = data.train()
    plan = Plan(
        [len(tokens) for tokens in shards],
        config.model.seq_len,
        config.train.sequences_per_step,
        config.data,
        config.seed,
        step_scale,
    )
    return Loader(
        shards,
        plan,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        queue_batches=config.data.queue_batches,
    )
