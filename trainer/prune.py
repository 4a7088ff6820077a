"""Pruning: give up codes of +-1, the cheapest first, until the artifact fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer import estimate
from trainer.allocate import Sizer, most_that_fits
from trainer.errors import ArtifactError
from trainer.estimate import ZERO
from trainer.progress import log
from trainer.quantize import QuantizedMatrix, QuantizedModel

SLACK_SHARE = 1 / 2000
"""Share of the limit that may stay unused: each further byte costs a compression."""


class PruningOrder:
    """The +-1 codes of a model in the order they are given up: least scale^2 first.

    Zeroing a code of +-1 costs scale^2 in plain squared error. Equal scales go in the order of
    names, rows and columns.
    """

    def __init__(self, packed: QuantizedModel) -> None:
        self.packed = packed
        costs: list[Tensor] = []
        self.places: list[tuple[str, Tensor]] = []
        for name, matrix in packed.matrices.items():
            at = (matrix.codes_RC.abs() == 1).flatten().nonzero().squeeze(-1)
            columns = matrix.codes_RC.shape[1]
            costs.append(matrix.scales_R.float().square()[at // columns])
            self.places.append((name, at))
        order = torch.cat(costs).argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        self.ranks = rank.split([len(at) for _, at in self.places])
        """Place in the order of every +-1 code, matrix by matrix."""

    def __len__(self) -> int:
        return sum(len(ranks) for ranks in self.ranks)

    def pruned(self, count: int) -> QuantizedModel:
        """The model with the first `count` codes of the order set to zero."""
        matrices: dict[str, QuantizedMatrix] = {}
        for (name, at), ranks in zip(self.places, self.ranks, strict=True):
            matrix = self.packed.matrices[name]
            codes = matrix.codes_RC.flatten().clone()
            codes[at[ranks < count]] = 0
            matrices[name] = replace(matrix, codes_RC=codes.view_as(matrix.codes_RC))
        return replace(self.packed, matrices=matrices)

    def estimator(self) -> Callable[[int], float]:
        """Estimated bytes of `pruned(count)`, a millisecond each.

        Rows that lost their codes of +-1 differ so much from the others that a compressor tells
        them apart: each matrix counts as two sources of symbols.
        """
        parts = list(zip(self.packed.matrices.values(), self.ranks, strict=True))
        sources = [_RowHistograms.of(m.codes_RC, ranks) for m, ranks in parts]
        rest = estimate.packed_bytes(replace(self.packed, matrices={}))
        rest += 2.0 * sum(len(m.scales_R) for m, _ in parts)
        return lambda count: rest + sum(source.bytes_after(count) for source in sources)


@dataclass(frozen=True)
class _RowHistograms:
    """Code counts of a matrix's rows, summed in the order in which pruning reaches them."""

    last_rank_R: np.ndarray
    """Place in the order of each row's last code of +-1; -1 if it has none. Ascending."""
    sums_RC: np.ndarray
    """Row r: histogram of the first r rows together."""

    @classmethod
    def of(cls, codes_RC: Tensor, ranks: Tensor) -> "_RowHistograms":
        last_R = torch.full(codes_RC.shape, -1)
        last_R[codes_RC.abs() == 1] = ranks
        last_R, order_R = last_R.amax(dim=1).sort(stable=True)
        counts_RC = np.stack([estimate.histogram(row) for row in codes_RC[order_R]])
        sums_RC = counts_RC.cumsum(axis=0, dtype=np.int32)
        return cls(last_R.numpy(), np.vstack((np.zeros_like(sums_RC[:1]), sums_RC)))

    def bytes_after(self, count: int) -> float:
        """Entropy of the codes once the first `count` of the order are gone."""
        pruned_rows = np.searchsorted(self.last_rank_R, count)
        gone, kept = self.sums_RC[pruned_rows].copy(), self.sums_RC[-1] - self.sums_RC[pruned_rows]
        ones = [ZERO - 1, ZERO + 1]
        gone[ZERO] += gone[ones].sum()
        gone[ones] = 0
        return estimate.entropy_bytes(np.stack((gone, kept)))


def prune_to_fit(
    packed: QuantizedModel, limit_bytes: int, pack: Callable[[QuantizedModel], bytes]
) -> tuple[bytes, int]:
    """Zero as few +-1 codes as the limit asks for: entropies bracket the count, `pack` confirms.

    Args:
        packed: the quantized model.
        limit_bytes: limit on the compressed container.
        pack: makes the container.

    Returns:
        The container that fits, and how many codes were zeroed.

    Raises:
        ArtifactError: it does not fit even with every +-1 code zeroed.
    """
    data = pack(packed)
    if len(data) <= limit_bytes:
        return data, 0
    order = PruningOrder(packed)
    whole = len(order)
    log(f"{len(data):,} bytes, over {limit_bytes:,}: pruning up to {whole:,} codes")
    fitting: dict[int, bytes] = {}

    def exact(kept: int) -> int:
        packed_bytes = pack(order.pruned(whole - kept))
        log(f"without {whole - kept:,} codes: {len(packed_bytes):,} bytes")
        if len(packed_bytes) <= limit_bytes:
            fitting[kept] = packed_bytes
        return len(packed_bytes)

    estimated = order.estimator()
    # Counted by the codes that are kept, the size grows.
    kept = most_that_fits(
        Sizer(exact, lambda kept: estimated(whole - kept)),
        whole,
        limit_bytes,
        slack_bytes=int(SLACK_SHARE * limit_bytes),
        known={whole: len(data)},
    )
    if kept < 0 and exact(0) > limit_bytes:
        raise ArtifactError(
            f"the artifact does not fit {limit_bytes:,} bytes even with all {whole:,} codes "
            "of +-1 zeroed. Go on with `python -m trainer --resume RUN --bits measured`, which "
            "gives every matrix as many bits as fit, or train a smaller model"
        )
    kept = max(0, kept)
    return fitting[kept], whole - kept
