"""What it costs to quantize one matrix: the loss expected over what the model itself predicts.

The text is the calibration text, which the model wrote: no training or validation data decides
anything. For every position the target is not one token but the float32 model's whole
distribution r. With p the model as it runs and q the same with one matrix quantized, the damage is
sum over v of r_v (log p_v - log q_v), in nats per token. It is KL(p || q) where the model runs in
float32. In bfloat16 the rounding of activations, alike in p and q, cancels, and differences of
1e-6 nats can be told apart in some thousand tokens: drawn targets would need thousands of times as
many.

Letters: B sequences, T positions, V vocabulary, R rows, C columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model import GPT
from trainer.progress import progress
from trainer.quantize import QuantizedMatrix

MEASURED_BITS = 5
"""Grid whose damage is measured where that of others follows."""
SEQUENCES = 16
"""Calibration sequences that the damage is measured on."""
BATCH = 8
"""Sequences in one forward pass."""


@contextmanager
def exchanged(matrix_RC: Tensor, replacement: QuantizedMatrix) -> Iterator[None]:
    """`matrix_RC` (a view that `GPT.matrices` gave) holds `replacement` until the block ends."""
    kept_RC = matrix_RC.clone()
    matrix_RC.copy_(replacement.decoded())
    try:
        yield
    finally:
        matrix_RC.copy_(kept_RC)


def precise_logits(model: GPT, ids_BT: Tensor) -> Tensor:
    """Logits float32 [B, T, V] with the head in float32.

    A bfloat16 head rounds logits by up to 0.03, as much as a quantized matrix moves them.
    """
    return model.logits(model.hidden(ids_BT).float())


@torch.no_grad()
def damage(
    model: GPT, ids_BT: Tensor, made: dict[float, dict[str, QuantizedMatrix]]
) -> dict[str, dict[float, float]]:
    """Nats per token that each matrix alone costs at each number of bits.

    Args:
        model: on its device; its matrices are exchanged one at a time and put back.
        ids_BT: calibration text, int64 on the model's device.
        made: quantized matrices by bits and name.

    Returns:
        By name, then bits.
    """
    batches = ids_BT.split(BATCH)
    expected = _predictions(model, batches)

    def loss() -> Tensor:
        """Cross-entropy of the expected distributions, 0-dim float64 on the device."""
        total = torch.zeros((), dtype=torch.float64, device=ids_BT.device)
        for ids, r_NV in zip(batches, expected, strict=True):
            logits_NV = precise_logits(model, ids).flatten(0, 1)
            total += F.cross_entropy(logits_NV, r_NV, reduction="none").double().sum()
        return total / ids_BT.numel()

    whole = loss()
    tries = [(name, bits) for bits in made for name in made[bits]]
    losses: list[Tensor] = []
    matrices = model.matrices()
    with progress("damage per matrix", len(tries)) as advance:
        for name, bits in tries:
            with exchanged(matrices[name], made[bits][name]):
                losses.append(loss() - whole)
            advance()
    found: dict[str, dict[float, float]] = {name: {} for name in matrices}
    for (name, bits), nats in zip(tries, torch.stack(losses).tolist(), strict=True):
        found[name][bits] = nats
    return found


def damage_by_error(
    model: GPT,
    ids_BT: Tensor,
    made: dict[float, dict[str, QuantizedMatrix]],
    errors: dict[float, dict[str, float]],
) -> dict[str, dict[float, float]]:
    """Damage at every width, measured at one: it is proportional to the Hessian-weighted error.

    A small change of a matrix moves the divergence by a quadratic form of the change, of which the
    weighted error is the cheap part; the factor between them belongs to the matrix, not the grid.

    Args:
        model, ids_BT, made: as of `damage`; `made` has MEASURED_BITS.
        errors: Hessian-weighted errors, by bits and name.

    Returns:
        By name, then bits; never below zero, which noise alone would bring about.
    """
    at = MEASURED_BITS
    measured = damage(model, ids_BT, {at: made[at]})
    return {
        name: {
            bits: max(0.0, found[at]) * (errors[bits][name] / errors[at][name])
            if errors[at][name] > 0
            else 0.0
            for bits in made
        }
        for name, found in measured.items()
    }


def _predictions(model: GPT, batches: tuple[Tensor, ...]) -> list[Tensor]:
    """The float32 model's distributions, [B * T, V] of each batch."""
    precise = GPT(model.config).to(model.qo_bank.device)
    precise.load_state_dict(model.state_dict())
    return [precise_logits(precise, ids).flatten(0, 1).softmax(-1) for ids in batches]
