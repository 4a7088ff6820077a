"""Process group set-up from torchrun's environment, and what ranks agree on.

Only this module reads RANK, WORLD_SIZE and LOCAL_RANK.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.config import MICRO_BATCHES
from trainer.errors import ConfigError, RunError

HOST_TIMEOUT = timedelta(minutes=30)
"""Patience for a peer: rank 0 quantizes alone for minutes. A peer that *dies* is noticed at once:
its connections close, and torchrun ends the others."""


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
    try:
        yield Ranks(dist.get_rank(), world_size, where, host)
    except dist.DistError as error:
        raise RunError(
            f"rank {dist.get_rank()} lost a peer: {error}. Look at the other ranks' output; "
            "the run continues from its last checkpoint with --resume."
        ) from error
    finally:
        # After an error the peers may be gone, and an orderly goodbye would wait for them.
        if sys.exc_info()[0] is None:
            # Leaving together: gloo aborts a process whose peer closes first.
            dist.barrier(group=host)
            dist.destroy_process_group()
