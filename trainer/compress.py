"""From Hessians to the artifact: bits per matrix, GPTQ, pruning, exact accounting of bytes."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import allocate, artifact, codesize, estimate, files
from trainer.allocate import Sizer
from trainer.config import QuantConfig, RunConfig
from trainer.folder import RunFolder
from trainer.model import GPT
from trainer.progress import log
from trainer.prune import prune_to_fit
from trainer.quantize import QuantizedMatrix, QuantizedModel, quantize_matrices, with_matrices


def quantize_run(
    model: GPT, hessians: dict[str, Tensor], config: RunConfig, path: Path
) -> dict[str, Any]:
    """Quantize `model` at the bits the settings ask for and write the result to `path`.

    Returns:
        Sensitivity, bits and Hessian-weighted error of every matrix, JSON-able.

    Raises:
        RunError: a Hessian cannot be used, or the file not written.
        ArtifactError: `budgeted`, and not even int5 throughout fits.
    """
    device = model.qo_bank.device
    hessians = {name: h.to(device) for name, h in hessians.items()}
    sensitivities = allocate.sensitivity(hessians)
    order = allocate.ranked(sensitivities)
    quant = config.quant
    if quant.bits == "budgeted":
        matrices, errors = _budgeted(model, hessians, order, quant)
    else:
        bits = allocate.bits_with(order, allocate.fixed_count(quant, len(order)))
        matrices, errors = quantize_matrices(model.matrices(), hessians, bits, quant)
    packed = with_matrices(model, matrices)
    files.write_bytes(path, artifact.pack(packed, quality=artifact.QUICK_QUALITY))
    return {
        "matrices": [
            {
                "name": name,
                "bits": matrices[name].bits,
                "sensitivity": sensitivities[name],
                "error": errors[name],
            }
            for name in matrices
        ]
    }


def _budgeted(
    model: GPT, hessians: dict[str, Tensor], order: list[str], quant: QuantConfig
) -> tuple[dict[str, QuantizedMatrix], dict[str, float]]:
    """As many of the most sensitive matrices in int6 as fit beside the code.

    Both widths of every matrix are made once; only compression is repeated.
    """
    made = {
        bits: quantize_matrices(
            model.matrices(), hessians, dict.fromkeys(model.matrices(), bits), quant
        )
        for bits in (5, 6)
    }

    rest = with_matrices(model, {})

    def candidate(count: int) -> QuantizedModel:
        widths = allocate.bits_with(order, count)
        return replace(rest, matrices={n: made[widths[n]][0][n] for n in made[5][0]})

    sizer = Sizer(
        lambda n: len(artifact.pack(candidate(n), quant.compressor)),
        lambda n: estimate.packed_bytes(candidate(n)),
    )
    limit = quant.limit_bytes - codesize.code_bytes()
    count = max(0, allocate.most_that_fits(sizer, len(order), limit))
    log(f"budget: {count} of {len(order)} matrices in int6")
    widths = allocate.bits_with(order, count)
    return candidate(count).matrices, {n: made[widths[n]][1][n] for n in widths}


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
