"""What the benches run on: the record's shapes on a GPU, the smoke preset's on a CPU.

Letters: B windows of a micro-batch, T positions, N tokens, D width, V vocabulary.
"""

import lzma
import zlib
from dataclasses import dataclass, replace
from functools import cache

import brotli
import numpy as np
import torch
from torch import Tensor

from bench.stopwatch import Subject
from trainer.artifact import Compressor
from trainer.config import (
    MICRO_BATCHES,
    AttentionBackend,
    MlpBackend,
    ModelConfig,
    PassesBackend,
    RunConfig,
)
from trainer.model import GPT
from trainer.record import RECORD, SMOKE
from trainer.run import DTYPES


@dataclass(frozen=True)
class Scale:
    """A preset and the device it is meant for."""

    config: RunConfig
    device: torch.device

    @property
    def cuda(self) -> bool:
        """On a GPU, with the record's shapes."""
        return self.device.type == "cuda"

    @property
    def windows(self) -> int:
        """B: windows of a micro-step."""
        return self.config.train.sequences_per_step // MICRO_BATCHES

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return DTYPES[self.config.compute_dtype]

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random normal values in the compute dtype."""
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)

    def ids(self, batch: int, length: int | None = None) -> Tensor:
        """Random token ids, int64 [B, T]."""
        shape = (batch, length or self.config.model.seq_len)
        return torch.randint(self.config.model.vocab_size, shape, device=self.device)

    def model(
        self,
        mlp: MlpBackend = "reference",
        shape: ModelConfig | None = None,
        passes: PassesBackend | None = None,
    ) -> GPT:
        """A GPT whose zero-initialised matrices are random too, so that no product is trivial.

        Passes in the epilogues of CUTLASS's products become fused kernels beside another MLP.
        """
        torch.manual_seed(0)
        passes = passes or self.config.passes
        if passes == "epilogue" and mlp != "cutlass":
            passes = "triton"
        model = GPT(
            shape or self.config.model,
            compute_dtype=self.dtype,
            mlp=mlp,
            attention=self.config.attention,
            passes=passes,
        )
        with torch.no_grad():
            for matrix in model.matrices().values():
                if not matrix.any():
                    matrix.normal_(std=matrix.shape[1] ** -0.5)
        return model.to(self.device)


def current(
    passes: PassesBackend | None = None, attention: AttentionBackend | None = None
) -> Scale:
    """The record's shapes on the GPU if there is one, else the smoke preset's on the CPU.

    Args:
        passes: implementation of what lies between the products, if not the preset's.
        attention: that of attention, likewise.
    """
    cuda = torch.cuda.is_available()
    config = RECORD if cuda else SMOKE
    chosen = replace(
        config,
        passes=passes or config.passes,
        attention=attention or config.attention,
    )
    return Scale(chosen, torch.device("cuda" if cuda else "cpu"))


def one_layer(config: ModelConfig) -> ModelConfig:
    """The same model with a single layer."""
    return replace(config, layers=1, value_embed_layers=())


# References: fixed work whose time stands for the speed of the machine at that moment.


def gemm_reference(scale: Scale, repeats: int = 1) -> tuple[str, Subject]:
    """Bare products of the MLP's shape on the GPU; float32 products of 384 on a CPU."""
    if not scale.cuda:
        return f"{8 * repeats} GEMMs 384^3 float32", _cpu_products(8 * repeats)
    rows = scale.windows * scale.config.model.seq_len
    width, mlp_width = scale.config.model.width, scale.config.model.mlp_width
    a_MD, b_FD = scale.normal(rows, width), scale.normal(mlp_width, width)

    def run(number: int) -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(a_MD, b_FD)

    return f"{repeats} GEMMs {rows}x{mlp_width}x{width} bfloat16", run


@cache
def _square() -> Tensor:
    return torch.randn(384, 384)


def _cpu_products(repeats: int) -> Subject:
    a = _square()

    def run(number: int) -> None:
        for _ in range(repeats):
            torch.mm(a, a)

    return run


def host_reference() -> tuple[str, Subject]:
    """zlib over fixed bytes: byte-wise work of one core, like data handling."""
    data = _fixed_bytes(1 << 19)
    return "zlib-6 of 512 KiB", lambda number: zlib.compress(data, 6)


def compression_reference(compressor: Compressor) -> tuple[str, Subject]:
    """The bare library over fixed bytes: neighbours disturb it as much as the artifact's packing.

    Another reference would not do: Brotli's tables live in memory, zlib's in the cache.
    """
    data = _fixed_bytes(1 << 18)
    if compressor == "brotli":
        return "Brotli-11 of 256 KiB", lambda number: brotli.compress(data, quality=11, lgwin=24)
    return "LZMA-9 of 256 KiB", lambda number: lzma.compress(data, preset=9)


def _fixed_bytes(count: int) -> bytes:
    return np.random.default_rng(0).integers(0, 31, count).astype(np.uint8).tobytes()
