"""From Hessians to the artifact: bits per matrix, GPTQ, pruning, exact accounting of bytes."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import allocate, artifact, budget, codesize, damage, files
from trainer.config import QuantConfig, RunConfig
from trainer.folder import RunFolder
from trainer.model import GPT
from trainer.progress import log
from trainer.prune import SLACK_SHARE, prune_to_fit
from trainer.quantize import quantize_matrices, with_matrices


def quantize_run(
    model: GPT,
    hessians: dict[str, Tensor],
    calibration_BT: Tensor,
    config: RunConfig,
    path: Path,
) -> dict[str, Any]:
    """Quantize `model` at the bits the settings ask for and write the result to `path`.

    Args:
        model: on its device.
        hessians: of every matrix.
        calibration_BT: the text they were collected on, int64.
        config: of the run.
        path: the quantized model's file.

    Returns:
        Sensitivity, bits and Hessian-weighted error of every matrix, JSON-able; with `measured`
        also its damage by bits, in nats per token.

    Raises:
        RunError: a Hessian cannot be used, or the file not written.
    """
    device = model.qo_bank.device
    hessians = {name: h.to(device) for name, h in hessians.items()}
    sensitivities = allocate.sensitivity(hessians)
    order = allocate.ranked(sensitivities)
    quant = config.quant
    damages: dict[str, dict[float, float]] = {}
    if quant.bits in ("budgeted", "measured"):
        if quant.bits == "budgeted":
            made, bits = _budgeted(model, hessians, order, quant)
        else:
            made, bits, damages = _measured(model, hessians, calibration_BT, quant)
        packed, errors = made.chosen(bits), made.chosen_errors(bits)
    else:
        bits = allocate.bits_with(order, allocate.fixed_count(quant, len(order)))
        matrices, errors = quantize_matrices(model.matrices(), hessians, bits, quant)
        packed = with_matrices(model, matrices)
    files.write_bytes(path, artifact.pack(packed, quality=artifact.QUICK_QUALITY))
    return {
        "matrices": [
            {
                "name": name,
                "bits": bits[name],
                "sensitivity": sensitivities[name],
                "error": errors[name],
                **({"damage": damages[name]} if damages else {}),
            }
            for name in bits
        ]
    }


def _budgeted(
    model: GPT, hessians: dict[str, Tensor], order: list[str], quant: QuantConfig
) -> tuple[budget.Made, budget.Bits]:
    """As many of the most sensitive matrices in int6 as fit beside the code."""
    made = budget.make(model, hessians, (5, 6), quant)
    bits = budget.largest_fit(
        made,
        lambda count: allocate.bits_with(order, count),
        len(order),
        quant.limit_bytes - codesize.code_bytes(),
        lambda bits: made.packed_bytes(bits, quant.compressor),
    )
    log(f"budget: {sum(b == 6 for b in bits.values())} of {len(order)} matrices in int6")
    return made, bits


def _measured(
    model: GPT, hessians: dict[str, Tensor], calibration_BT: Tensor, quant: QuantConfig
) -> tuple[budget.Made, budget.Bits, dict[str, dict[float, float]]]:
    """4 to 8 bits each, for the least damage that fits beside the code; and every damage."""
    made = budget.make(model, hessians, allocate.WIDTHS, quant, even=True)
    text_BT = calibration_BT[: damage.SEQUENCES].to(model.qo_bank.device)
    damages = damage.damage_by_error(model, text_BT, made.matrices, made.errors)
    knapsack = allocate.Knapsack(damages, made.sizes)
    limit = quant.limit_bytes - codesize.code_bytes()
    bits = budget.largest_fit(
        made,
        knapsack.bits,
        knapsack.highest,
        limit,
        lambda bits: made.packed_bytes(bits, quant.compressor),
        slack_bytes=int(SLACK_SHARE * limit),
    )
    widths = ", ".join(f"{n} int{b:g}" for b, n in sorted(Counter(bits.values()).items()))
    nats = sum(damages[name][b] for name, b in bits.items())
    log(f"measured: {widths}; {nats:.5f} nats per token expected of all together")
    return made, bits, damages


def write_artifact(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """Prune the quantized model if need be, compress it, write it and account for every byte.

    Raises:
        ArtifactError: it cannot be made to fit.
        RunError: it cannot be written.
    """
    quant = config.quant
    code_bytes = codesize.code_bytes()
    packed = artifact.load(folder.quantized)
    data, pruned = prune_to_fit(
        packed,
        quant.limit_bytes - code_bytes,
        pack=lambda m: artifact.pack(m, quant.compressor),
    )
    files.write_bytes(folder.artifact, data)
    baseline: artifact.Compressor = "lzma" if quant.compressor == "brotli" else "brotli"
    return {
        "artifact_bytes": len(data),
        "code_bytes": code_bytes,
        "limit_bytes": quant.limit_bytes,
        "compressor": quant.compressor,
        "baseline_compressor": baseline,
        "baseline_bytes": len(artifact.pack(packed, baseline)),
        "pruned": pruned,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
