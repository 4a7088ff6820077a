"""The record as a list of stages. A finished stage is read back, not redone."""

from collections.abc import Callable
from typing import Any

import torch

from kernels.flash4 import HEAD_SIZE, require_flash4
from kernels.heads_cutlass import require_heads
from kernels.mlp import require_backend
from kernels.passes import require_passes
from trainer import artifact, calibrate, checkpoint, corpus, quantize
from trainer.compress import quantize_run, write_artifact
from trainer.config import RunConfig, SlotMode
from trainer.errors import ConfigError
from trainer.folder import RunFolder
from trainer.held_out import MODE_STAGES, ValidationGate
from trainer.legality import probe_modes
from trainer.model import GPT
from trainer.progress import is_main_process, log
from trainer.ranks import Ranks
from trainer.report import write_report
from trainer.scoring import full_windows, score
from trainer.tokens import token_bytes
from trainer.train import train

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def preflight(config: RunConfig) -> None:
    """Fail before any work when a chosen piece is missing here.

    Raises:
        ConfigError: no CUDA, an implementation that cannot run here, or settings that do not fit.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device cuda was asked for, but torch finds no CUDA GPU. "
            "Run `python -m trainer smoke` for the CPU preset."
        )
    if config.train.sequences_per_step % 8:
        raise ConfigError(
            f"train.sequences-per-step {config.train.sequences_per_step} must be a multiple of 8"
        )
    if not 1 <= config.eval.stride <= config.model.seq_len:
        raise ConfigError(
            f"eval.stride {config.eval.stride} must lie in 1..{config.model.seq_len} "
            "(model.seq-len)"
        )
    check_implementations(config)


def check_implementations(config: RunConfig) -> None:
    """The implementations chosen by name can run here, for this model.

    Raises:
        ConfigError: one cannot; the message names its option.
    """
    _check_attention(config)
    try:
        require_backend(config.mlp, config.device)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--mlp {config.mlp} cannot run here: {error}") from error
    if config.mlp != "reference" and config.compute_dtype != "bfloat16":
        raise ConfigError(
            f"--mlp {config.mlp} computes in bfloat16: choose --compute-dtype bfloat16, or "
            "--mlp reference --passes triton"
        )
    try:
        model = config.model
        require_passes(
            config.passes,
            config.device,
            width=model.width,
            query_heads=model.query_heads,
            kv_heads=model.kv_heads,
            head_size=model.head_size,
        )
        if config.passes == "epilogue" and config.attention == "flash4":
            require_heads(model.head_size, model.rotary_dims)
    except ValueError as error:
        raise ConfigError(f"--passes {config.passes} cannot run here: {error}") from error
    if config.passes == "epilogue" and config.mlp != "cutlass":
        raise ConfigError(
            f"--passes epilogue lives in the CUTLASS products, not in --mlp {config.mlp}: choose "
            "--mlp cutlass, or --passes triton"
        )


def _check_attention(config: RunConfig) -> None:
    """The chosen attention can run here. Raises ConfigError."""
    name = config.attention
    if config.device == "cpu" and name != "sdpa":
        raise ConfigError(f"attention {name} needs --device cuda; on a CPU use --attention sdpa")
    if name != "flash4":
        return
    if config.compute_dtype != "bfloat16":
        raise ConfigError("attention flash4 needs --compute-dtype bfloat16; for float32 use sdpa")
    if config.passes != "reference" and config.model.head_size != HEAD_SIZE:
        raise ConfigError(
            f"attention flash4 between fused passes takes heads of {HEAD_SIZE}, not of "
            f"{config.model.head_size}: choose --attention cudnn, or --passes reference"
        )
    try:
        require_flash4(config.device)
    except RuntimeError as error:
        raise ConfigError(f"--attention flash4 cannot run here: {error}") from error


def new_model(config: RunConfig, device: torch.device) -> GPT:
    """The model of a run, seeded; the same weights on every device."""
    torch.manual_seed(config.seed)
    model = GPT(
        config.model,
        compute_dtype=DTYPES[config.compute_dtype],
        mlp=config.mlp,
        attention=config.attention,
        passes=config.passes,
    )
    return model.to(device)


def run(config: RunConfig, folder: RunFolder, ranks: Ranks) -> None:
    """Run every unfinished stage of `folder`, then write its report.

    Raises:
        FairwayError: anything a user can mend.
        trainer.train.Interrupted: a signal stopped training after a checkpoint.
    """
    this = _Run(config, folder, ranks)
    with this.held_out.watched():
        this.stages()


class _Run:
    """One run: what its stages share."""

    def __init__(self, config: RunConfig, folder: RunFolder, ranks: Ranks) -> None:
        self.config, self.folder, self.ranks = config, folder, ranks
        self.data = corpus.open_data(config.data.dir, config.model.vocab_size)
        self.held_out = ValidationGate(self.data, config.model.seq_len, config.eval.max_tokens)
        sizes = token_bytes(self.data.tokenizer, config.model.vocab_size)
        self.sizes = sizes.to(ranks.device)
        self.model = new_model(config, ranks.device)

    def stages(self) -> None:
        stage = self._stage
        stage("data", self.data.describe)
        if self.folder.finished("train"):
            self._load_averaged()
        stage("train", self._train)
        self.model.requires_grad_(False)
        stage("post_ema", self._full_window_score)
        stage("calibrate", self._calibrate)
        stage("hessians", self._hessians)
        stage("quantize", self._quantize)
        stage("artifact", self._artifact)
        self.ranks.wait_for_all()  # rank 0 alone wrote the artifact
        self.model.load_state_dict(quantize.dequantize(artifact.load(self.folder.artifact)))
        stage("round_trip", self._full_window_score)
        stage("sliding", lambda: self._sliding_score("off"))
        for mode in self.config.eval.slot_modes:
            stage(MODE_STAGES[mode], lambda mode=mode: self._sliding_score(mode))
        stage("causality", self._causality)
        if is_main_process():
            write_report(self.folder, self.config)
            log(f"\n{self.folder.report.read_text()}\nReport: {self.folder.report}")

    def _stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self.folder.stage(name, lambda: self.held_out.during(name, work))

    def _train(self) -> dict[str, Any]:
        summary = train(self.config, self.model, self.data, self.ranks, self.folder)
        summary["parameters"] = sum(p.numel() for p in self.model.parameters())
        if is_main_process():
            checkpoint.save_tensors(self.folder.model, dict(self.model.state_dict()), {})
        return summary

    def _load_averaged(self) -> None:
        tensors, _ = checkpoint.load_tensors(self.folder.model)
        self.model.load_state_dict(tensors)

    def _full_window_score(self) -> dict[str, Any]:
        """Whole windows side by side: cheap, and the same before and after quantization."""
        whole = full_windows(self.config.eval, self.config.model.seq_len)
        return score(self.model, self.held_out.tokens(), self.sizes, whole).summary()

    def _sliding_score(self, mode: SlotMode) -> dict[str, Any]:
        tokens_N = self.held_out.tokens()
        scored = score(
            self.model, tokens_N, self.sizes, self.config.eval, mode, compiled=self.config.compile
        )
        return scored.summary()

    def _causality(self) -> dict[str, Any]:
        """Probe every mode that was scored; rank 0 alone, for it takes seconds."""
        if not is_main_process():
            return {}
        modes: tuple[SlotMode, ...] = ("off", *self.config.eval.slot_modes)
        return probe_modes(self.model, self.held_out.tokens(), self.config.eval, modes)

    # Quantization needs no peers: rank 0 does it, the others wait for the artifact.

    def _calibrate(self) -> dict[str, Any]:
        quant = self.config.quant
        if is_main_process():
            ids_BT = calibrate.generate(
                self.model,
                quant.calibration_sequences,
                self.config.model.seq_len,
                quant.calibration_temperature,
                self.config.seed,
            )
            checkpoint.save_tensors(self.folder.calibration, {"ids_BT": ids_BT}, {})
        return {"sequences": quant.calibration_sequences, "source": "generated by the model"}

    def _hessians(self) -> dict[str, Any]:
        if not is_main_process():
            return {}
        tensors, _ = checkpoint.load_tensors(self.folder.calibration)
        hessians = calibrate.collect_hessians(self.model, tensors["ids_BT"].to(self.ranks.device))
        checkpoint.save_tensors(self.folder.hessians, hessians, {})
        return {"matrices": len(hessians)}

    def _quantize(self) -> dict[str, Any]:
        """GPTQ at the chosen bits; the codes go on to the artifact stage through a file."""
        if not is_main_process():
            return {}
        hessians, _ = checkpoint.load_tensors(self.folder.hessians)
        calibration, _ = checkpoint.load_tensors(self.folder.calibration)
        return quantize_run(
            self.model, hessians, calibration["ids_BT"], self.config, self.folder.quantized
        )

    def _artifact(self) -> dict[str, Any]:
        if not is_main_process():
            return {}
        return write_artifact(self.config, self.folder)
