"""Parallel Muon: every rank orthogonalises its own slices of a bank.

A bank [N, R, C] is cut along N into W equal shards, padded with zero matrices where W does not
divide N. Per step: reduce-scatter of the averaged gradient (each rank gets its shard's mean),
Muon on the shard, all-gather of the updates, which every rank applies to its own float32 masters.
Updates rather than weights travel, because they are needed in the compute dtype only; all ranks
apply the same numbers, so their weights agree to the bit. With one rank nothing is copied or sent.
On a CUDA device the elementwise work around the orthogonalisation is Triton's.

Source: the published record's Parallel Muon (its overlap, without its per-rank clipping).

Letters: N matrices in a bank, P matrices in a shard, R rows, C columns, W ranks.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from kernels import reference
from trainer.config import OptimConfig
from trainer.muon import newton_schulz, turbo_muon

NEWTON_SCHULZ_STEPS = 5


class Communicator:
    """The default process group, or nobody."""

    def __init__(self) -> None:
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def average(self, grads: list[Tensor]) -> None:
        """Replace small gradients by their mean over ranks, in one all-reduce."""
        if self.world_size == 1 or not grads:
            return
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.world_size
        pieces = flat.split([g.numel() for g in grads])
        for grad, piece in zip(grads, pieces, strict=True):
            grad.copy_(piece.view_as(grad))

    def total_norm(self, shards: list[Tensor], small: list[Tensor]) -> Tensor:
        """Norm over all shards of all ranks and over the small gradients all ranks hold alike."""
        squares = torch.stack([_sum_of_squares(s) for s in shards]).sum()
        if self.world_size > 1:
            dist.all_reduce(squares)
        if small:
            squares = squares + get_total_norm(small).square()  # many tensors, few launches
        return squares.sqrt()


def _sum_of_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32).square()


class Bank:
    """One bank's shard of momentum, and its part in a step.

    Args:
        name: name of the parameter.
        parameter: float32 [N, R, C].
        dtype: type of travelling gradients and of Newton-Schulz.
        communicator: who shares the work.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, dtype: torch.dtype, communicator: Communicator
    ) -> None:
        self.name, self.parameter, self.dtype = name, parameter, dtype
        self.communicator = communicator
        count, rows, columns = parameter.shape
        self.shard_size = -(-count // communicator.world_size)
        self.first = self.shard_size * communicator.rank
        self.scale = math.sqrt(max(1.0, rows / columns))
        self.momentum_PRC = torch.zeros(
            (self.shard_size, rows, columns), dtype=torch.float32, device=parameter.device
        )
        self._shard = self._update = torch.empty(0)
        self._work: dist.Work | None = None
        self._elementwise: Any = reference
        if parameter.is_cuda:
            from kernels import muon_triton

            self._elementwise = muon_triton

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Shape with padding: [W * P, R, C]."""
        _, rows, columns = self.parameter.shape
        return self.shard_size * self.communicator.world_size, rows, columns

    def start_reduce(self) -> None:
        """Send this rank's gradient; the shard's mean arrives by `finish_reduce`."""
        grad = self.parameter.grad
        assert grad is not None, f"{self.name} has no gradient"
        if self.communicator.world_size == 1:
            self._shard = grad.to(self.dtype)
            return
        padded = grad.new_zeros(self._shape, dtype=self.dtype)
        # Divided before the sum: exact, as W is a power of two, and it cannot overflow.
        padded[: len(grad)] = grad / self.communicator.world_size
        self._shard = torch.empty_like(padded[: self.shard_size])
        self._work = dist.reduce_scatter_tensor(self._shard, padded, async_op=True)

    def finish_reduce(self) -> Tensor:
        """Mean gradient of the own shard, [P, R, C]."""
        self._wait()
        return self._shard

    def start_update(self, clip: Tensor, momentum: float, config: OptimConfig) -> None:
        """Nesterov momentum and orthogonalisation of the own shard; send the update off."""
        direction = self._elementwise.nesterov(
            self._shard, self.momentum_PRC, clip, momentum, self.dtype
        )
        if config.muon_variant == "turbo":
            update = turbo_muon(direction, self.dtype)
        else:
            update = newton_schulz(direction, NEWTON_SCHULZ_STEPS, self.dtype)
        self._shard = torch.empty(0)
        if self.communicator.world_size == 1:
            self._update = update
            return
        self._update = update.new_empty(self._shape)
        self._work = dist.all_gather_into_tensor(self._update, update.contiguous(), async_op=True)

    def finish_update(self, lr: float, weight_decay: float) -> None:
        """Apply all ranks' updates to the masters, with decoupled weight decay."""
        self._wait()
        update = self._update[: len(self.parameter)]
        self._elementwise.apply_update(
            self.parameter, update, 1 - lr * weight_decay, lr * self.scale
        )
        self._update = torch.empty(0)

    def gather_momentum(self) -> Tensor:
        """The whole bank's momentum, float32 [N, R, C]; every rank must call it."""
        if self.communicator.world_size == 1:
            return self.momentum_PRC
        whole = self.momentum_PRC.new_empty(self._shape)
        dist.all_gather_into_tensor(whole, self.momentum_PRC)
        return whole[: len(self.parameter)]

    def load_momentum(self, whole_NRC: Tensor) -> None:
        """Take the own shard out of a whole bank's momentum."""
        mine = whole_NRC[self.first : self.first + self.shard_size]
        self.momentum_PRC.zero_()
        self.momentum_PRC[: len(mine)] = mine.to(self.momentum_PRC.device)

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
