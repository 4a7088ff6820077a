"""Single kernels by name, for `python -m profiles kernel NAME`."""

from dataclasses import dataclass

import torch

from bench import model_cases
from bench.measure import Case
from bench.scale import Scale, gemm_reference
from trainer.config import MlpBackend
from trainer.layers import causal_attention

NAMES = ("mlp_forward", "mlp_dpre", "attention", "gemm")


@dataclass(frozen=True)
class Ideal:
    """Least work of one call."""

    flops: float
    bytes: float


def case(scale: Scale, name: str, mlp: MlpBackend) -> Case:
    """The kernel as a case; raises KeyError for a name not in NAMES."""
    return {
        "mlp_forward": lambda: model_cases.mlp_forward(scale, mlp),
        "mlp_dpre": lambda: model_cases.mlp_dpre(scale, mlp),
        "attention": lambda: _attention(scale),
        "gemm": lambda: _gemm(scale),
    }[name]()


def ideal(scale: Scale, name: str) -> Ideal:
    """Operations and traffic of one call, were every tensor moved once."""
    c = scale.config.model
    n, element = scale.windows * c.seq_len, scale.dtype.itemsize
    d, f = c.width, c.mlp_width
    if name == "attention":
        flops = 2.0 * scale.windows * c.query_heads * c.seq_len**2 * c.head_size
        return Ideal(flops, element * n * (2.0 * d + 2.0 * c.kv_width))
    streams = {"gemm": 1, "mlp_forward": 2, "mlp_dpre": 2}[name]
    return Ideal(2.0 * n * d * f, element * (n * d + d * f + streams * n * f))


def _attention(scale: Scale) -> Case:
    """Attention forward alone, one layer."""
    c = scale.config.model
    lead = (scale.windows, c.seq_len)
    q = scale.normal(*lead, c.query_heads, c.head_size)
    k, v = (scale.normal(*lead, c.kv_heads, c.head_size) for _ in range(2))
    name, reference = gemm_reference(scale)

    def run(i: int) -> None:
        with torch.no_grad():
            causal_attention(q, k, v, scale.config.attention)

    return Case(run, reference, name, scale.device.type)


def _gemm(scale: Scale) -> Case:
    """The bare product of the MLP's shape."""
    c = scale.config.model
    a = scale.normal(scale.windows * c.seq_len, c.width)
    b = scale.normal(c.mlp_width, c.width)
    name, reference = gemm_reference(scale)
    return Case(lambda i: torch.nn.functional.linear(a, b), reference, name, scale.device.type)
