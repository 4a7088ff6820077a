"""A run folder that takes over another run's training, so that only later stages remain."""

import os
import shutil
from pathlib import Path

from trainer import checkpoint, files
from trainer.ablations.rows import Run
from trainer.config import RunConfig
from trainer.folder import RunFolder

TRAINING_STAGES = ("data", "train")
CALIBRATION_STAGES = ("post_ema", "calibrate", "hessians")


def take_over(source: RunFolder, run: Run, config: RunConfig, preset: str) -> None:
    """Make `run`'s folder from a finished `source`. Its settings are written last.

    A folder without settings is one whose making was cut short: it is made anew.

    Args:
        source: the run that trained, or took its training over itself.
        run: what to take over.
        config: settings of the new run; `out` and `name` say where it lies.
        preset: the preset they come from.

    Raises:
        RunError: the folder cannot be written, or the source lacks a file.
    """
    assert config.name is not None
    target = RunFolder(config.out / config.name)
    stages = TRAINING_STAGES
    if run.weights == "averaged":
        stages += CALIBRATION_STAGES
        for path in (source.model, source.calibration, source.hessians):
            _link(path, target.path / path.name)
    else:
        averages, _ = checkpoint.load_tensors(source.averages)
        prefix = f"{run.weights}."
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in averages.items()
            if name.startswith(prefix)
        }
        checkpoint.save_tensors(target.model, weights, {})
    if source.metrics.exists():
        files.write_bytes(target.metrics, source.metrics.read_bytes())
    for stage in stages:
        _link(source.path / "stages" / f"{stage}.json", target.path / "stages" / f"{stage}.json")
    RunFolder.create(config, preset)


def _link(source: Path, target: Path) -> None:
    """Give a file a second place. Files are replaced and never changed, so a hard link is safe."""
    with files.atomic_path(target) as partial:
        partial.unlink()
        try:
            os.link(source, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, partial)
