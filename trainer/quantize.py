"""A trained model to integer codes and back.

The matrices of the banks go through GPTQ in int4 to int8; embedding tables of more than 65,536
entries get int8 rows; everything smaller is kept in float16.

Letters: N matrices of one shape, R rows, C columns, L layers.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from trainer.config import ModelConfig, QuantConfig
from trainer.gptq import gptq, gptq_even, round_to_nearest, top_code
from trainer.model import GPT
from trainer.progress import progress

TABLE_ENTRIES = 65_536
"""Tensors with more entries than this are int8 tables; others are float16."""

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


@dataclass(frozen=True)
class QuantizedMatrix:
    """Integer codes and one float16 scale a row."""

    codes_RC: Tensor
    scales_R: Tensor
    bits: int
    """Whole bits that hold every code."""

    def decoded(self) -> Tensor:
        """Weights [R, C], float32."""
        return self.codes_RC.float() * self.scales_R.float().unsqueeze(-1)


@dataclass(frozen=True)
class QuantizedModel:
    """Everything an artifact holds; tensors lie on the CPU."""

    model_config: ModelConfig
    matrices: dict[str, QuantizedMatrix]
    """By name of `GPT.matrices`."""
    tables: dict[str, QuantizedMatrix] = field(default_factory=dict)
    """int8 embedding tables by state_dict name."""
    others: dict[str, Tensor] = field(default_factory=dict)
    """float16 by state_dict name."""


def quantize_matrices(
    matrices: dict[str, Tensor],
    hessians: dict[str, Tensor],
    bits: dict[str, float],
    config: QuantConfig,
    *,
    even: bool = False,
) -> tuple[dict[str, QuantizedMatrix], dict[str, float]]:
    """GPTQ of every matrix, equal shapes together, where the weights are (a GPU if there).

    Args:
        matrices: weights [R, C] by name.
        hessians: on the same device.
        bits: of each grid.
        config: clips, damping, blocks.
        even: one step for all rows of a matrix, instead of the record's clip per row.

    Returns:
        Quantized matrices (on the CPU) and their Hessian-weighted errors, by name.

    Raises:
        RunError: a Hessian cannot be used.
    """
    groups: dict[tuple[torch.Size, float], list[str]] = defaultdict(list)
    for name, w in matrices.items():
        groups[w.shape, bits[name]].append(name)
    results: dict[str, QuantizedMatrix] = {}
    errors: dict[str, float] = {}
    with progress("GPTQ", len(matrices)) as advance:
        for (_, width), names in groups.items():
            w_NRC, h_NCC = (
                torch.stack([tensors[n] for n in names]).float() for tensors in (matrices, hessians)
            )
            grid = partial(gptq, clip_percentiles=config.clip_percentiles)
            rounded = (gptq_even if even else grid)(
                w_NRC, h_NCC, width, damping=config.damping, block_columns=config.block_columns
            )
            codes, scales = rounded.codes_NRC.cpu(), rounded.scales_NR.cpu()
            for i, name in enumerate(names):
                results[name] = QuantizedMatrix(codes[i], scales[i], bits_for(codes[i], width))
                errors[name] = rounded.errors_N[i].item()
            advance(len(names))
    return {name: results[name] for name in matrices}, errors


def bits_for(codes_RC: Tensor, width: float) -> int:
    """Fewest whole bits, of at least `width`, that hold every code."""
    return max(math.ceil(width), int(codes_RC.abs().amax()).bit_length() + 1)


def quantize_table(w_RC: Tensor) -> QuantizedMatrix:
    """int8 rows of an embedding table, the scale being the row's largest entry / 127."""
    scales = (w_RC.abs().amax(dim=-1) / top_code(8)).to(torch.float16)
    codes = round_to_nearest(w_RC.unsqueeze(0), scales.unsqueeze(0), 8)[0]
    return QuantizedMatrix(codes.cpu(), scales.cpu(), 8)


def with_matrices(model: GPT, matrices: dict[str, QuantizedMatrix]) -> QuantizedModel:
    """A quantized model: `matrices`, and the rest of `model` as tables and float16."""
    tables: dict[str, QuantizedMatrix] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in BANKS:
            continue
        if tensor.numel() > TABLE_ENTRIES:
            tables[name] = quantize_table(tensor.float())
        else:
            others[name] = tensor.to(torch.float16).cpu()
    return QuantizedModel(model.config, matrices, tables, others)


def dequantize(packed: QuantizedModel) -> dict[str, Tensor]:
    """float32 state_dict of a GPT with `packed.model_config`."""
    state = {name: t.float() for name, t in packed.others.items()}
    state.update({name: t.decoded() for name, t in packed.tables.items()})
    layers = range(packed.model_config.layers)

    def stack(*kinds: str) -> Tensor:
        names = (f"blocks.{i}.{kind}" for kind in kinds for i in layers)
        return torch.stack([packed.matrices[name].decoded() for name in names])

    state["qo_bank"] = stack("q", "out")
    state["kv_bank"] = stack("k", "v")
    state["mlp_up_bank"] = stack("up")
    state["mlp_down_bank"] = stack("down")
    return state
