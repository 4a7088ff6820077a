"""Process group set-up from torchrun's environment, and what ranks agree on.

Only this module reads RANK, WORLD_SIZE and LOCAL_RANK.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.config import MICRO_BATCHES
from trainer.errors import ConfigError, RunError

HOST_TIMEOUT = timedelta(minutes=30)
"""Patience for a peer: rank 0 quantizes alone for minutes. A peer that *dies* is noticed within
seconds by `_PeerWatch`."""
BEAT_S = 1.0
"""Between two heartbeats."""
LOST_GRACE_S = 10
"""From the loss of a peer until this process is ended; room for its own error to come up."""
LEAVING_GRACE_S = 25
"""The same when the peer said goodbye: after a signal, rank 0 may still write the checkpoint."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. `host` is a gloo group for decisions made on the CPU."""

    rank: int
    world_size: int
    device: torch.device
    host: dist.ProcessGroup | None = None

    def from_main(self, value: float) -> float:
        """Rank 0's `value`, on every rank."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, src=0, group=self.host)
        return shared.item()

    def agree(self, elapsed_s: float, signal_number: int) -> tuple[float, int]:
        """Rank 0's clock, and the highest signal any rank received (0: none)."""
        if self.world_size == 1:
            return elapsed_s, signal_number
        mine = elapsed_s if self.rank == 0 else 0.0
        shared = torch.tensor([mine, float(signal_number)], dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.host)
        return shared[0].item(), int(shared[1].item())

    def broadcast_text(self, text: str) -> str:
        """Rank 0's `text`, on every rank."""
        if self.world_size == 1:
            return text
        holder = [text]
        dist.broadcast_object_list(holder, src=0, group=self.host)
        return holder[0]

    def wait_for_all(self) -> None:
        """Return once every rank has come here."""
        if self.world_size > 1:
            dist.barrier(group=self.host)


class _PeerWatch:
    """Ends this process soon after a peer has died, whatever the main thread waits for.

    NCCL does not notice that a peer on the same machine is gone: its kernels spin for ever, the
    host waits for them inside CUDA, and no Python signal handler runs. So a thread exchanges a
    heartbeat over gloo, whose connections close with the process. Once a peer is missing it says
    so and sets an alarm, which the operating system delivers even to a process that hangs.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._lost = threading.Event()
        self._peer_failed = False
        self._goodbye = threading.Event()
        self._wake = threading.Event()
        self._done = threading.Event()
        self._failed = False
        group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._thread = threading.Thread(target=self._run, name="peer watch", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Return once every rank has come here. Raises RunError if a peer did not."""
        self._say_goodbye()
        self._thread.join()
        if self._lost.is_set() or self._peer_failed:
            raise RunError(f"rank {self.rank} cannot end in order without its peer")

    def has_lost(self) -> bool:
        """Whether a peer is gone; asks for a heartbeat at once. For the main thread."""
        # torchrun sends SIGTERM to the survivors, which must not cut the message short.
        previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._wake.set()
        lost = self._lost.wait(2 * BEAT_S)
        if not lost:
            signal.signal(signal.SIGTERM, previous)
        return lost

    def leave_in_error(self) -> None:
        """Tell the peers, as long as they listen, that this rank stops on an error of its own."""
        self._failed = True
        self._say_goodbye()
        self._thread.join(3 * BEAT_S)

    def _say_goodbye(self) -> None:
        self._goodbye.set()
        self._wake.set()

    def _run(self) -> None:
        try:
            while not self._done.is_set():
                self._beat()
                self._wake.wait(BEAT_S)
                self._wake.clear()
        except RuntimeError:  # gloo's: a connection to a peer has closed
            self._lost.set()
            self._end_soon(
                LOST_GRACE_S,
                f"rank {self.rank} lost a peer: another rank's process has ended. Its own output "
                "or torchrun's tells why. The run continues from its last checkpoint with "
                "--resume, at any world size that divides 8.",
            )

    def _beat(self) -> None:
        """Exchange (ranks at their end, ranks that stop on an error)."""
        at_end = self._goodbye.is_set()
        state = torch.tensor([int(at_end), int(at_end and self._failed)])
        dist.all_reduce(state, group=self._group)
        finished, failed = state.tolist()
        if failed and not self._failed:
            self._peer_failed = True
            self._end_soon(LEAVING_GRACE_S, f"rank {self.rank}: another rank has stopped")
        if failed or finished == dist.get_world_size():
            self._done.set()

    def _end_soon(self, grace_s: int, message: str) -> None:
        # One write: several ranks and threads share the terminal.
        sys.stderr.write(f"error: {message} (ending within {grace_s} s)\n")
        sys.stderr.flush()
        signal.alarm(grace_s)


@contextmanager
def setup(device: str) -> Iterator[Ranks]:
    """Join the process group torchrun describes, if any; leave it at the end.

    Args:
        device: "cuda" (NCCL) or "cpu" (gloo).

    Raises:
        ConfigError: the world size does not divide 8, or there are fewer GPUs than local ranks.
        RunError: a peer was lost.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size < 1 or MICRO_BATCHES % world_size:
        raise ConfigError(
            f"{world_size} ranks: a step is {MICRO_BATCHES} micro-batches, so the number of ranks "
            f"must divide {MICRO_BATCHES} (1, 2, 4 or 8). Change torchrun's --nproc-per-node."
        )
    where = torch.device(device)
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: this machine has "
                f"{torch.cuda.device_count()}. Change torchrun's --nproc-per-node."
            )
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    if world_size == 1:
        yield Ranks(0, 1, where)
        return
    if device == "cuda":
        dist.init_process_group("nccl", device_id=where, timeout=HOST_TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=HOST_TIMEOUT)
    host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    assert isinstance(host, dist.ProcessGroup)
    watch = _PeerWatch(dist.get_rank())
    try:
        yield Ranks(dist.get_rank(), world_size, where, host)
        watch.finish()
    except RuntimeError as error:
        # gloo and NCCL report a lost peer as any RuntimeError; the watch knows for sure.
        if watch.has_lost():
            raise RunError(f"rank {watch.rank} stops with its peer: {error}") from error
        watch.leave_in_error()
        raise
    except BaseException:
        watch.leave_in_error()
        raise
    # Leaving together: gloo aborts a process whose peer closes first. After an error the peers
    # may be gone, and an orderly goodbye would wait for them.
    dist.barrier(group=host)
    dist.destroy_process_group()
