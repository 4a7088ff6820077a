"""The loader: the plan's windows, in order, split over ranks, resumable to the window."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import DataConfig
from trainer.errors import ConfigError
from trainer.loader import Loader
from trainer.plan import Plan

T, S = 7, 16
COUNTS = (120, 333, 58)
SHARDS = [
    (np.arange(count) + 1000 * number).astype(np.uint16) for number, count in enumerate(COUNTS)
]
"""Every token tells its shard and place."""


def new_plan(seed: int = 3) -> Plan:
    return Plan(COUNTS, T, S, DataConfig(mix_steps=4), seed)


@contextmanager
def loader(plan: Plan | None = None, shards: Any = SHARDS, **settings: Any) -> Iterator[Loader]:
    given_: dict[str, Any] = {"rank": 0, "world_size": 1, "queue_batches": 3} | settings
    opened = Loader(shards, plan or new_plan(), **given_)
    try:
        yield opened
    finally:
        opened.close()


def micro_steps(opened: Loader, count: int) -> list[list[list[int]]]:
    """Inputs with their last target of the next micro-steps: [count][B][T + 1]."""
    out = []
    for _ in range(count):
        x_BT, y_BT = opened.next()
        assert x_BT.dtype == y_BT.dtype == torch.int64
        assert x_BT.is_contiguous()
        assert y_BT.is_contiguous()
        assert torch.equal(x_BT[:, 1:], y_BT[:, :-1])
        out.append(torch.cat([x_BT, y_BT[:, -1:]], dim=1).tolist())
    return out


@given(seed=st.integers(0, 1000), world_size=st.sampled_from((1, 2, 4, 8)))
def test_ranks_read_the_plan(seed: int, world_size: int) -> None:
    """Batches hold the plan's windows and next tokens; ranks share each step without overlap."""
    steps, each = 3, 8 // world_size
    oracle = new_plan(seed)
    expected = []
    for _ in range(steps):
        for shard, first in oracle.next_batch().tolist():
            expected.append(list(range(1000 * shard + first, 1000 * shard + first + T + 1)))
    read: list[Any] = [None] * (steps * S)
    for rank in range(world_size):
        with loader(new_plan(seed), rank=rank, world_size=world_size) as opened:
            for step in range(steps):
                rows = [row for batch in micro_steps(opened, each) for row in batch]
                read[step * S + rank : (step + 1) * S : world_size] = rows
    assert read == expected


@given(before=st.integers(0, 4), after=st.integers(1, 3))
def test_state_is_of_what_was_consumed(before: int, after: int) -> None:
    """State taken while later batches wait in the queue resumes at the next unread window."""
    with loader() as opened:
        micro_steps(opened, 8 * before)
        saved = opened.state()
        expected = micro_steps(opened, 8 * after)
        opened.load_state(saved)  # undone in place, as after priming
        assert micro_steps(opened, 8 * after) == expected
    with loader(new_plan(), world_size=2) as other:
        other.load_state(saved)
        mine = micro_steps(other, 4)
    windows = [row for batch in expected[:8] for row in batch]
    assert [row for batch in mine for row in batch] == windows[::2]


def test_state_between_micro_steps_is_refused() -> None:
    """A position inside a step is never saved: the loader refuses instead."""
    with loader() as opened:
        opened.next()
        with pytest.raises(RuntimeError, match="between steps"):
            opened.state()
        micro_steps(opened, 7)
        opened.state()


class _Failing:
    """A shard that cannot be read, as after a disk error."""

    def __getitem__(self, _: slice) -> np.ndarray:
        raise OSError("disk gone")


def test_failures_reach_the_consumer() -> None:
    """An error in the thread is raised by `next`, every time, and closing still works."""
    with loader(shards=[_Failing()] * 3) as opened:
        for _ in range(3):
            with pytest.raises(OSError, match="disk gone"):
                opened.next()


def test_close_stops_the_thread() -> None:
    """Closing ends the thread even when the queue is full, and prefetching is bounded."""
    plan = new_plan()
    with loader(plan, queue_batches=2) as opened:
        opened.next()
        deadline = time.monotonic() + 5
        while opened._queue.qsize() < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert plan.step == 1
        assert any(thread.name == "loader" for thread in threading.enumerate())
        opened.close()
    assert not opened._thread.is_alive()


class _Slow:
    """A shard on a slow disk."""

    def __getitem__(self, _: slice) -> np.ndarray:
        time.sleep(0.02)
        return np.zeros(T + 1, dtype=np.uint16)


def test_stall_is_measured() -> None:
    """The seconds that the consumer waited for data are counted."""
    with loader(shards=[_Slow()] * 3) as opened:
        started = time.perf_counter()
        opened.next()
        waited_s = time.perf_counter() - started
        assert 0.02 < opened.stall_s <= waited_s


@pytest.mark.parametrize(("world_size", "sequences"), [(3, 16), (16, 16), (1, 12), (8, 4)])
def test_bad_division_is_refused(world_size: int, sequences: int) -> None:
    """World sizes that do not divide 8 and batches not divisible by 8 are refused at the start."""
    with pytest.raises(ConfigError):
        Loader(SHARDS, Plan(COUNTS, T, sequences, DataConfig(), 0), rank=0, world_size=world_size)


@pytest.mark.gpu
def test_cuda_batches_equal_cpu_batches() -> None:
    """Batches uploaded through the side stream equal those of the CPU while the GPU is busy."""
    busy = torch.randn(2048, 2048, device="cuda")
    with loader() as on_cpu, loader(device="cuda") as on_gpu:
        for _ in range(40):
            expected = on_cpu.next()
            actual = on_gpu.next()
            for _ in range(5):
                busy = (busy @ busy).clamp(-1, 1)
            for a, b in zip(actual, expected, strict=True):
                assert a.is_cuda
                assert torch.equal(a.cpu(), b)
            del actual
        saved = on_gpu.state()
        expected = micro_steps(on_cpu, 8)
        on_gpu.load_state(saved)
        assert micro_steps(on_gpu, 8) == expected
