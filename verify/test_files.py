"""Claims about files: a write is whole or not at all, and its failure is explained."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from trainer import files
from trainer.config import RunConfig
from trainer.errors import RunError
from trainer.folder import RunFolder
from trainer.record import PRESETS, SMOKE


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A write that fails half-way leaves the old file and no litter."""
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def break_half_way() -> None:
        with files.atomic_path(path) as partial:
            partial.write_text("half of the n")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        break_half_way()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]  # noqa: PTH208


def test_a_successful_write_replaces_the_file(tmp_path: Path) -> None:
    """A write creates missing folders, replaces the file and leaves no litter."""
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"x": 1})
    files.write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 2}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_an_impossible_path_is_explained(tmp_path: Path) -> None:
    """A path that cannot be written gives an error with the path and advice."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(RunError, match=r"file/a\.txt.*choose a writable folder"):
        files.write_text(blocker / "a.txt", "x")


@pytest.mark.parametrize("preset", list(PRESETS))
def test_settings_survive_the_run_folder(tmp_path: Path, preset: str) -> None:
    """Settings read back from a run folder equal those written, paths and tuples included."""
    _, config = PRESETS[preset]
    folder = RunFolder.create(RunConfig(**{**vars(config), "out": tmp_path}), preset)
    opened, settings = RunFolder.open(folder.path)
    assert settings == RunConfig(**{**vars(config), "out": tmp_path})
    assert opened.path == folder.path


def test_a_run_on_the_cpu_does_not_name_an_idle_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment of a run names what did its work, whatever else the machine has."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    for preset, device in (("record", "a GPU"), ("smoke", "cpu")):
        config = dataclasses.replace(PRESETS[preset][1], out=tmp_path)
        path = RunFolder.create(config, preset).path / "environment.json"
        assert json.loads(path.read_text())["device"] == device


def test_a_run_from_before_the_fused_passes_keeps_its_plain_ones(tmp_path: Path) -> None:
    """Settings that do not name the passes are those of plain PyTorch, not the record's."""
    folder = RunFolder.create(RunConfig(out=tmp_path, name="old"), "record")
    path = folder.path / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("passes") == RunConfig.passes != "reference"
    path.write_text(json.dumps(settings))
    assert RunFolder.open(folder.path)[1].passes == "reference"


def test_metrics_cut_short_by_a_crash_are_readable(tmp_path: Path) -> None:
    """A metrics line cut short by a crash is dropped; later steps are forgotten on resume."""
    folder = RunFolder(tmp_path)
    for step in range(1, 6):
        folder.append_metric(step=step, train_nats=1.0 / step)
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "train_')
    assert [row["step"] for row in folder.read_metrics()] == [1, 2, 3, 4, 5]
    folder.forget_metrics_after(3)
    assert [row["step"] for row in folder.read_metrics()] == [1, 2, 3]


def test_unnamed_runs_never_collide(tmp_path: Path) -> None:
    """Two unnamed runs started in the same second get folders of their own."""
    config = RunConfig(**{**vars(SMOKE), "out": tmp_path})
    paths = {RunFolder.create(config, "smoke").path for _ in range(3)}
    assert len(paths) == 3
