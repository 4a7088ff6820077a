"""Cases around training: loader, whole step, calibration, GPTQ, pruning, compression, scoring.

Work that takes minutes at the record's size is measured on a part: one small layer, 32 tokens of
text. Each case says so.

Letters: N tokens, B windows of a batch, W windows of all batches, T positions, S = stride.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Case
from bench.scale import Scale, compression_reference, gemm_reference, host_reference, one_layer
from bench.stopwatch import Subject
from trainer import artifact, calibrate, compiling
from trainer.artifact import Compressor
from trainer.average import Averages
from trainer.config import MICRO_BATCHES, EvalConfig, MlpBackend, PassesBackend, SlotMode
from trainer.gptq import round_to_nearest, row_scales
from trainer.loader import Loader
from trainer.model import GPT
from trainer.optim import Optimizer
from trainer.plan import Plan
from trainer.prune import PruningOrder
from trainer.quantize import QuantizedMatrix, QuantizedModel, quantize_matrices, with_matrices
from trainer.scoring import Scorer
from trainer.windows import Window, plan_windows

SHARDS = 8
CALIBRATION_TOKENS = 32
SCORING_BATCHES = {"cuda": 16, "cpu": 4}
"""Batches of a scoring case's call, by device. On a GPU the upload of the windows and the first
launch took about 9 ms, 14 % of a call of four; a whole evaluation has 759 batches."""
GEMMS_PER_BATCH = 10


def _on_host(subject: Any) -> Case:
    name, reference = host_reference()
    return Case(subject, reference, name, "cpu")


def _on_device(scale: Scale, subject: Any, gemms: int, details: Any = dict) -> Case:
    """Work that the host drives: the host's clock, until the device is done."""
    name, gemm = gemm_reference(scale, gemms)

    def finished(work: Any) -> Any:
        def run(i: int) -> None:
            work(i)
            if scale.cuda:
                torch.cuda.synchronize()

        return run

    return Case(finished(subject), finished(gemm), name, "cpu", details)


def synthetic_loader(scale: Scale) -> Loader:
    c = scale.config
    rng = np.random.default_rng(0)
    tokens = 4 * c.train.sequences_per_step * c.model.seq_len
    shards = [rng.integers(0, c.model.vocab_size, tokens).astype(np.uint16) for _ in range(SHARDS)]
    plan = Plan([tokens] * SHARDS, c.model.seq_len, c.train.sequences_per_step, c.data, 0, 1.0)
    return Loader(shards, plan, rank=0, world_size=1, device=scale.device)


def loader(scale: Scale) -> Case:
    """Eight steps of micro-batches, taken as fast as they come."""
    source = synthetic_loader(scale)

    def run(i: int) -> None:
        for _ in range(8 * MICRO_BATCHES):
            source.next()

    case = _on_device(scale, run, 20) if scale.cuda else _on_host(run)
    return replace(case, close=source.close)


def training_step(scale: Scale, backend: MlpBackend) -> Case:
    """One micro-batch from the loader, forward, backward, optimizer, EMA; with the data stall."""
    model = scale.model(backend)
    loss: Any = compiling.compiled(model.loss) if scale.cuda else model.loss
    optimizer = Optimizer(model, scale.config.optim, scale.dtype)
    averages = Averages(model, scale.config.train)
    source = synthetic_loader(scale)
    steps = 0

    def run(i: int) -> None:
        nonlocal steps
        steps += 1
        x_BT, y_BT = source.next()
        loss(x_BT, y_BT).backward()
        optimizer.step(0.0, 0.95)
        optimizer.zero_grad()
        averages.update_ema(scale.config.train.ema_decay)

    def details() -> dict[str, Any]:
        return {"data_stall_ms_per_step": round(1000 * source.stall_s / max(1, steps), 4)}

    return replace(_on_device(scale, run, 20, details), close=source.close)


def calibration(scale: Scale) -> Case:
    """32 tokens of calibration text for every sequence, through the KV cache."""
    model = scale.model(scale.config.mlp).requires_grad_(False)
    quant = scale.config.quant

    def run(i: int) -> None:
        calibrate.generate(
            model, quant.calibration_sequences, CALIBRATION_TOKENS, quant.calibration_temperature, i
        )

    return _on_device(scale, run, 100)


def gptq(scale: Scale) -> Case:
    """GPTQ of every matrix of the model, all clip percentiles."""
    model = scale.model().requires_grad_(False)
    hessians = {name: _hessian(w.shape[1], scale) for name, w in model.matrices().items()}
    names = list(hessians)
    bits: dict[str, float] = {
        n: 6 if i < scale.config.quant.int6_matrices else 5 for i, n in enumerate(names)
    }

    def run(i: int) -> None:
        quantize_matrices(model.matrices(), hessians, bits, scale.config.quant)

    return _on_device(scale, run, 200)


def _hessian(columns: int, scale: Scale) -> Tensor:
    x = torch.randn(2 * columns, columns, device=scale.device)
    return x.T @ x


def _packed(scale: Scale) -> QuantizedModel:
    """A rounded model with one small layer: Brotli-11 takes seconds for every megabyte."""
    small = replace(one_layer(scale.config.model), mlp_width=scale.config.model.width)
    model: GPT = replace(scale, device=torch.device("cpu")).model(shape=small)
    matrices: dict[str, QuantizedMatrix] = {}
    for name, w in model.requires_grad_(False).matrices().items():
        scales = row_scales(w.unsqueeze(0), 5, 1.0)
        codes = round_to_nearest(w.unsqueeze(0), scales, 5)
        matrices[name] = QuantizedMatrix(codes[0], scales[0], 5)
    return with_matrices(model, matrices)


def pruning(scale: Scale) -> Case:
    """Ordering all +-1 codes and zeroing half of them, for one small layer, on one thread.

    On several its time is mostly that of waking them, which neighbours of the machine decide: it
    varied tenfold where one thread varied by a tenth. On a CPU's tiny layer it is done eight times.
    What counts is the thread's own time, without the time it waits for a core.
    """
    packed = _packed(scale)
    repeats = 1 if scale.cuda else 8

    def run(i: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(repeats):
            order = PruningOrder(packed)
            order.pruned(len(order) // 2)
        torch.set_num_threads(threads)

    return replace(_on_host(run), clock="thread")


def compression(scale: Scale, compressor: Compressor) -> Case:
    """Compressed container of one small layer; its size goes into the details."""
    packed = _packed(scale)
    size = 0

    def run(i: int) -> None:
        nonlocal size
        size = len(artifact.pack(packed, compressor))

    name, reference = compression_reference(compressor)
    return Case(run, reference, name, "cpu", lambda: {"bytes": size})


@dataclass(frozen=True)
class Scoring:
    """Scoring of a call's windows, and where it leaves the nats."""

    run: Subject
    nats_N: Tensor
    """float64 on the device; 0 where the call scores nothing."""
    tokens: int
    """Targets a call scores."""


def scoring(scale: Scale, mode: SlotMode) -> Case:
    """Batches of sliding windows, plain or with SLOT.

    Several in one call: as in a whole evaluation, the host prepares one while the GPU does another.
    """
    gemms = GEMMS_PER_BATCH * _scoring_batches(scale)
    return _on_device(scale, sliding(scale, mode).run, gemms)


def straight_scoring(scale: Scale) -> Case:
    """The same windows as published: every layer and the head for all positions, then a pick."""
    return _on_device(scale, straight(scale).run, GEMMS_PER_BATCH * _scoring_batches(scale))


def sliding(scale: Scale, mode: SlotMode) -> Scoring:
    """What a whole evaluation does for every batch but its first and last."""
    model, config, tokens_N, windows = windows_of_a_call(scale, scale.config.passes)
    scorer = Scorer(model, tokens_N, config, mode, compiled=scale.cuda)

    def run(i: int) -> None:
        scorer.run(windows)

    return Scoring(run, scorer.nats_N, config.stride * len(windows))


def straight(scale: Scale) -> Scoring:
    """The published formulation, compiled: all layers and the head for all positions.

    Plain PyTorch between the products, as the published code has it, and launched kernel by kernel;
    MLP and attention are those of `scale`. The windows come from a stream on the device, and the
    nats stay there, which spares it the published code's copies.
    """
    model, config, tokens_N, windows = windows_of_a_call(scale, "reference")
    ids_N = torch.from_numpy(tokens_N).to(scale.device)
    nats_N = torch.zeros(len(tokens_N) - 1, dtype=torch.float64, device=scale.device)
    steps_T = torch.arange(scale.config.model.seq_len, device=scale.device)

    def nats(x_BT: Tensor, y_BT: Tensor) -> Tensor:
        logits_BTV = model.logits(model.hidden(x_BT))
        losses = F.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten(), reduction="none")
        return losses.view_as(y_BT)[:, -config.stride :]

    program: Any = compiling.compiled(nats, dynamic=False) if scale.cuda else nats

    @torch.no_grad()
    def run(i: int) -> None:
        first_W = torch.tensor([w.first for w in windows]).to(scale.device)
        for first_B in first_W.split(config.batch_windows):
            at_BT = first_B.unsqueeze(1) + steps_T
            scored_BS = program(ids_N[at_BT], ids_N[at_BT + 1])
            nats_N[at_BT[:, -config.stride :]] = scored_BS.double()

    return Scoring(run, nats_N, config.stride * len(windows))


def _scoring_batches(scale: Scale) -> int:
    return SCORING_BATCHES["cuda" if scale.cuda else "cpu"]


def windows_of_a_call(
    scale: Scale, passes: PassesBackend
) -> tuple[GPT, EvalConfig, np.ndarray, list[Window]]:
    """Model, settings, random tokens, and the call's windows, which score a stride each."""
    model = scale.model(scale.config.mlp, passes=passes).requires_grad_(False)
    model.tok_emb.weight.normal_(std=0.1)  # else all logits are near 0, and hide a wrong one
    config = scale.config.eval
    if not scale.cuda:
        config = replace(config, batch_windows=2)
    scored = config.stride * config.batch_windows * _scoring_batches(scale)
    tokens = scale.config.model.seq_len + scored
    tokens_N = np.random.default_rng(0).integers(0, scale.config.model.vocab_size, tokens + 1)
    windows = plan_windows(tokens, scale.config.model.seq_len, config.stride)[1:]
    return model, config, tokens_N, windows
