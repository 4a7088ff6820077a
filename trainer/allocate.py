"""Bits per matrix by sensitivity, and pruning until the artifact fits.

Sizes are exact compressed sizes; because Brotli-11 takes a minute on the record's model, a cheap
size (the same bytes at a low quality, rescaled by what was learnt) brackets the answer first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.config import QuantConfig
from trainer.errors import ArtifactError
from trainer.progress import log
from trainer.quantize import QuantizedMatrix, QuantizedModel

EXACT_TRIES = 8
"""Most exact compressions in one search."""


def sensitivity(hessians: dict[str, Tensor]) -> dict[str, float]:
    """trace(H) of every matrix: the squared size of its inputs, by which its errors grow."""
    return {name: h.diagonal().sum().item() for name, h in hessians.items()}


def ranked(sensitivities: dict[str, float]) -> list[str]:
    """Names by descending sensitivity; by name where they tie."""
    return sorted(sensitivities, key=lambda name: (-sensitivities[name], name))


def bits_with(order: list[str], int6_matrices: int) -> dict[str, int]:
    """int6 for the first `int6_matrices` of `order`, int5 for the rest."""
    return {name: 6 if i < int6_matrices else 5 for i, name in enumerate(order)}


def fixed_count(config: QuantConfig, matrices: int) -> int:
    """int6 matrices under every mode but `budgeted`."""
    return {"int5": 0, "int6": matrices, "mixed": min(config.int6_matrices, matrices)}[config.bits]


@dataclass(frozen=True)
class Sizer:
    """Compressed size in bytes of a candidate: exact, and cheap but proportional to it."""

    exact: Callable[[int], int]
    cheap: Callable[[int], int]


def most_that_fits(sizer: Sizer, highest: int, limit_bytes: int, slack_bytes: int = 0) -> int:
    """Largest n in 0..highest whose exact size fits, sizes growing with n; -1 if none does.

    Bisects the cheap size, confirms by the exact one and rescales; among at most EXACT_TRIES
    confirmed counts the largest. Stops early at one that fits with `slack_bytes` or less to spare.
    """
    low, high = -1, highest + 1  # low fits (or is -1), high does not
    ratio = 1.0
    for _ in range(EXACT_TRIES):
        if high - low <= 1:
            break
        guess = _cheap_boundary(sizer.cheap, low, high, limit_bytes / ratio)
        size = sizer.exact(guess)
        ratio = size / sizer.cheap(guess)
        if size > limit_bytes:
            high = guess
            continue
        low = guess
        if limit_bytes - size <= slack_bytes:
            break
    return low


def _cheap_boundary(cheap: Callable[[int], int], low: int, high: int, limit: float) -> int:
    """Largest n strictly between low and high whose cheap size fits; low + 1 if none does."""
    first, last = low + 1, high - 1
    while first < last:
        middle = (first + last + 1) // 2
        if cheap(middle) <= limit:
            first = middle
        else:
            last = middle - 1
    return first


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
        self.rank = torch.empty_like(order)
        self.rank[order] = torch.arange(len(order))

    def __len__(self) -> int:
        return len(self.rank)

    def pruned(self, count: int) -> QuantizedModel:
        """The model with the first `count` codes of the order set to zero."""
        matrices: dict[str, QuantizedMatrix] = {}
        begin = 0
        for name, at in self.places:
            gone = at[self.rank[begin : begin + len(at)] < count]
            begin += len(at)
            matrix = self.packed.matrices[name]
            codes = matrix.codes_RC.flatten().clone()
            codes[gone] = 0
            matrices[name] = replace(matrix, codes_RC=codes.view_as(matrix.codes_RC))
        return replace(self.packed, matrices=matrices)


def prune_to_fit(
    packed: QuantizedModel,
    limit_bytes: int,
    pack: Callable[[QuantizedModel], bytes],
    cheap: Callable[[QuantizedModel], int],
) -> tuple[bytes, int]:
    """Zero as few +-1 codes as the limit asks for, by bisection.

    Args:
        packed: the quantized model.
        limit_bytes: limit on the compressed container.
        pack: makes the container.
        cheap: a size that grows and shrinks with the container's.

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
    fitting = {0: pack(order.pruned(whole))}
    if len(fitting[0]) > limit_bytes:
        raise ArtifactError(
            f"the artifact does not fit {limit_bytes:,} bytes even with all {whole:,} codes "
            "of +-1 zeroed; use fewer bits (--quant.int6-matrices, --quant.bits int5) or a "
            "smaller model"
        )

    def exact(kept: int) -> int:
        packed_bytes = pack(order.pruned(whole - kept))
        if len(packed_bytes) <= limit_bytes:
            fitting[kept] = packed_bytes
        return len(packed_bytes)

    # Counted by the codes that are kept, the size grows.
    sizer = Sizer(exact, lambda kept: cheap(order.pruned(whole - kept)))
    kept = max(0, most_that_fits(sizer, whole, limit_bytes, slack_bytes=limit_bytes // 2000))
    return fitting[kept], whole - kept
