"""Estimated compressed sizes, from the entropy of the codes: milliseconds instead of Brotli's time.

Integer codes of a trained matrix are nearly independent of each other, so that no compressor gets
far below their zeroth-order entropy (Shannon 1948), and Brotli gets close to it. An estimate is
proportional to the true size, not equal to it.
"""

import numpy as np
from torch import Tensor

from trainer.quantize import QuantizedMatrix, QuantizedModel

TOP_CODE = 127
ZERO = TOP_CODE
"""Place of code 0 in a histogram."""


def histogram(codes: Tensor) -> np.ndarray:
    """How often each code of -127..127 occurs, int64 [255], least code first."""
    return np.bincount(codes.flatten().numpy() + np.int16(TOP_CODE), minlength=2 * TOP_CODE + 1)


def entropy_bytes(counts: np.ndarray) -> float:
    """Bytes that an ideal memoryless coder needs for symbols with these counts [..., codes]."""
    present = counts[counts > 0].astype(np.float64)
    total = counts.sum(axis=-1, dtype=np.float64)
    whole = (total * np.log2(np.maximum(total, 1))).sum()
    return float(whole - (present * np.log2(present)).sum()) / 8


def matrix_bytes(matrix: QuantizedMatrix) -> float:
    """Estimate of one quantized matrix: its codes, and its scales as they are."""
    return entropy_bytes(histogram(matrix.codes_RC)) + 2.0 * len(matrix.scales_R)


def packed_bytes(packed: QuantizedModel) -> float:
    """Estimate of a whole artifact, before any rescaling."""
    coded = [*packed.matrices.values(), *packed.tables.values()]
    return sum(map(matrix_bytes, coded)) + 2.0 * sum(t.numel() for t in packed.others.values())
