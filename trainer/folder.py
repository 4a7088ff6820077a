"""The run folder: settings, environment, metrics, checkpoint, stage results.

config.json             settings of the run
environment.json        versions, device, commit, command
metrics.jsonl           one JSON object a line: training losses
checkpoint.safetensors  newest training state; of no use once training is done
model.safetensors       averaged weights after training
averages.safetensors    EMA and SWA apart, where both were kept
calibration.safetensors text that the model wrote
hessians.safetensors    a Hessian of every matrix on that text
quantized.fwy           the quantized model, before pruning
stages/NAME.json        result and duration of a finished stage
artifact.fwy            the compressed, quantized model
report.md, plots/       what people read
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dacite

from trainer import environment, files
from trainer.config import BitScheme, RunConfig
from trainer.errors import ConfigError, RunError
from trainer.progress import is_main_process, log


class RunFolder:
    """Paths of one run, and reading and writing of what lies there. Only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint.safetensors"
        self.model = path / "model.safetensors"
        self.averages = path / "averages.safetensors"
        self.calibration = path / "calibration.safetensors"
        self.hessians = path / "hessians.safetensors"
        self.quantized = path / "quantized.fwy"
        self.artifact = path / "artifact.fwy"
        self.report = path / "report.md"
        self.plots = path / "plots"

    @classmethod
    def create(cls, config: RunConfig, preset: str) -> "RunFolder":
        """Make a new folder for `config`.

        Raises:
            ConfigError: a run of the given name exists.
            RunError: the folder cannot be written.
        """
        if config.name is not None:
            path = config.out / config.name
            if (path / "config.json").exists():
                raise ConfigError(
                    f"{path} holds a run already: continue it with --resume {path}, "
                    "or choose another --name"
                )
        else:
            stem = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}"
            path, copy = config.out / stem, 2
            while path.exists():
                path, copy = config.out / f"{stem}-{copy}", copy + 1
        folder = cls(path)
        files.write_json(path / "environment.json", environment.describe(config.device))
        files.write_json(path / "config.json", _plain(dataclasses.asdict(config)))
        return folder

    @classmethod
    def open(cls, path: Path) -> tuple["RunFolder", RunConfig]:
        """Folder and settings of an earlier run. Raises RunError when there is none."""
        settings = path / "config.json"
        if not settings.exists():
            raise RunError(f"{path} is not a run folder: it has no config.json")
        try:
            # Runs from before there was a choice of passes had plain ones.
            values = {"passes": "reference", **json.loads(settings.read_text())}
            strict = dacite.Config(strict=True, cast=[Path, tuple])
            return cls(path), dacite.from_dict(RunConfig, values, strict)
        except (TypeError, ValueError, dacite.DaciteError) as error:
            raise RunError(f"{settings} cannot be read as settings: {error}") from error

    def with_bits(self, config: RunConfig, bits: BitScheme) -> RunConfig:
        """`config` with bits allocated another way.

        Raises:
            ConfigError: the run has its artifact already.
        """
        if self.finished("artifact"):
            raise ConfigError(
                f"{self.path} has its artifact already: copy the folder, without artifact.json and "
                "what came after it in stages/, to quantize the same weights another way"
            )
        return replace(config, quant=replace(config.quant, bits=bits))

    def quantize_anew(self, config: RunConfig) -> None:
        """Store `config` and forget what was quantized under other settings."""
        self._record("quantize").unlink(missing_ok=True)
        files.write_json(self.path / "config.json", _plain(dataclasses.asdict(config)))

    def _record(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def append_metric(self, **values: Any) -> None:
        """Add one line to metrics.jsonl."""
        if not is_main_process():
            return
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise RunError(
                f"cannot write {self.metrics}: {error.strerror}. Free some space, then continue "
                f"with --resume {self.path}"
            ) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metrics so far; a last line cut short by a crash is left out."""
        if not self.metrics.exists():
            return []
        rows: list[dict[str, Any]] = []
        for line in self.metrics.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def forget_metrics_after(self, step: int) -> None:
        """Drop training metrics of steps past a checkpoint that is being continued."""
        kept = [row for row in self.read_metrics() if row.get("step", 0) <= step]
        files.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Result of stage `name`: computed now, or read back when an earlier try finished it.

        Every rank runs `work`; rank 0 records its result with the duration in seconds.
        """
        record = self._record(name)
        if record.exists():
            log(f"[{name}] already done")
            return json.loads(record.read_text())
        log(f"[{name}]")
        started = time.perf_counter()
        result = work()
        result = {**result, "seconds": time.perf_counter() - started}
        if is_main_process():
            files.write_json(record, result)
        return result

    def finished(self, name: str) -> bool:
        """True when stage `name` has a recorded result."""
        return self._record(name).exists()


def _plain(value: Any) -> Any:
    """`value` with paths as strings, for JSON."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
