"""Claims about bad input to a run: one clear line that says what to do, and nothing lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer import checkpoint, corpus
from trainer.__main__ import main
from trainer.errors import RunError
from verify.test_resume import SETTINGS


def _error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error of a command that must end with status 2 and without a traceback."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2, captured
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["smoke", "--train.max-stepz", "3"], "max-steps"),
        (["smoke", "--train.max-steps", "many"], "max-steps"),
        (["smoke", "--model.width", "100", "--model.query-heads", "3"], "must divide"),
        (["smoke", "--train.sequences-per-step", "12"], "multiple of 8"),
        (["smoke", "--attention", "cudnn"], "--attention sdpa"),
        (["smoke", "--attention", "flash4"], "--attention sdpa"),
        (["smoke", "--mlp", "triton"], "--mlp"),
        (["smoke", "--passes", "triton"], "--passes triton"),
        (["smoke", "--eval.stride", "300"], "1..256"),
        (["smoke", "--eval.batch-windows", "0"], "eval.batch_windows"),
        (["smoke", "--eval.max-tokens", "-5"], "eval.max_tokens"),
        (["smoke", "--eval.slot-modes", "off"], "Invalid choice"),
        (["smoke", "--quant.calibration-temperature", "0"], "calibration_temperature"),
        (["--resume", "no-such-run"], "config.json"),
        (["smoke", "--data.dir", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_settings_are_explained(
    arguments: list[str], advice: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A setting that cannot work ends the command with status 2 and says what to change."""
    if "--resume" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    assert advice in _error(arguments, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_record_preset_without_cuda_is_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The record preset on a machine without CUDA names the preset that works there."""
    assert "smoke" in _error(["record", "--out", str(tmp_path)], capsys)
    assert not list(tmp_path.iterdir())


def test_a_name_in_use_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A run never writes into another run's folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    message = _error([*SETTINGS, f"--out={tmp_path}", "--name=mine"], capsys)
    assert "--resume" in message
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"


def test_an_unwritable_run_folder_is_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A run folder that cannot be made is explained, naming its path."""
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    message = _error([*SETTINGS, f"--out={blocker}"], capsys)
    assert str(blocker) in message


def test_a_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that cannot be written leaves the one before it, and says what to do."""
    path = tmp_path / "checkpoint.safetensors"
    first = checkpoint.Checkpoint({"a": torch.ones(3)}, {}, {}, {"step": 1})
    checkpoint.save(path, first)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="No space left"):
        checkpoint.save(path, checkpoint.Checkpoint({"a": torch.zeros(3)}, {}, {}, {"step": 2}))
    assert checkpoint.load(path).counters == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", ["truncate", "garbage", "missing"])
def test_a_damaged_checkpoint_is_explained(tmp_path: Path, damage: str) -> None:
    """A damaged or missing checkpoint is refused with its path, never half loaded."""
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, checkpoint.Checkpoint({"a": torch.ones(99)}, {}, {}, {}))
    whole = path.read_bytes()
    path.unlink()
    if damage == "truncate":
        path.write_bytes(whole[:-7])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(RunError, match="checkpoint"):
        checkpoint.load(path)


def test_a_nan_loss_stops_the_run_and_keeps_the_good_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A loss that becomes NaN stops training; the checkpoint on disk is finite."""
    settings = [*SETTINGS, f"--out={tmp_path}", "--name=nan", "--train.checkpoint-every-steps=1"]
    message = _error([*settings, "--optim.scalar-lr=1e30"], capsys)
    assert "is nan" in message or "is inf" in message
    assert "lr" in message
    path = tmp_path / "nan" / "checkpoint.safetensors"
    if path.exists():
        for name, tensor in checkpoint.load(path).model.items():
            assert tensor.isfinite().all(), name
    assert not (tmp_path / "nan" / "model.safetensors").exists()


def test_a_damaged_config_is_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A run folder whose settings cannot be read is refused, naming the file."""
    (tmp_path / "config.json").write_text(json.dumps({"unknown": 1}))
    assert "config.json" in _error(["--resume", str(tmp_path)], capsys)


def test_a_validation_split_shorter_than_a_window_is_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A validation split too short for one window ends the run before training."""
    data = corpus.embedded_corpus()
    folder = tmp_path / "data"
    folder.mkdir()
    for source in (*data.train_paths, data.tokenizer):
        (folder / source.name).write_bytes(source.read_bytes())
    header = np.zeros(256, dtype="<i4")
    header[:3] = (20240520, 1, 5)
    short = header.tobytes() + np.arange(5, dtype="<u2").tobytes()
    (folder / "short_val_000000.bin").write_bytes(short)
    message = _error([*SETTINGS, f"--out={tmp_path}", f"--data.dir={folder}"], capsys)
    assert "valid" in message
