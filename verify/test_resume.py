"""Claims about interrupted runs: nothing is lost, and the result is the same to the bit.

Real processes are really killed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from verify.models import TINY_RUN

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24
SETTINGS = [
    "smoke",
    *TINY_RUN,
    "--train.sequences-per-step=8",
    f"--train.max-steps={STEPS}",
    "--train.checkpoint-every-steps=4",
    "--train.swa-every=1",
    "--train.average=both",
    "--train.log-every=1",
    "--quant.calibration-sequences=4",
    "--quant.int6-matrices=2",
    "--eval.max-tokens=400",
]


def _start(arguments: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(arguments: list[str]) -> str:
    process = _start(arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def _wait_for_step(folder: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Until metrics show `step` and a checkpoint exists."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        metrics = folder / "metrics.jsonl"
        if (
            metrics.exists()
            and f'"step": {step},' in metrics.read_text()
            and (folder / "checkpoint.safetensors").exists()
        ):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def _losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train_nats" in row]
    assert len(steps) == len(set(steps)), "a step is logged twice"
    return {row["step"]: row["train_nats"] for row in rows if "train_nats" in row}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    _finish([*SETTINGS, f"--out={out}", "--name=whole"])
    return out / "whole"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_run_resumes_to_the_same_weights(
    uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A run stopped in mid-training and resumed ends with the uninterrupted run's exact weights."""
    folder = tmp_path / "cut"
    process = _start([*SETTINGS, f"--out={tmp_path}", "--name=cut"])
    _wait_for_step(folder, 9, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), output
    assert not (folder / "model.safetensors").exists(), "training had ended before the signal"
    output = _finish(["--resume", str(folder)])
    assert "continuing at step" in output
    whole, cut = (load_file(f / "model.safetensors") for f in (uninterrupted, folder))
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert tensor.equal(cut[name]), name
    assert _losses(folder) == _losses(uninterrupted)
    assert (folder / "artifact.fwy").read_bytes() == (uninterrupted / "artifact.fwy").read_bytes()


def test_finished_stages_are_not_redone(uninterrupted: Path) -> None:
    """Resuming a finished run redoes nothing and reports the same figures."""
    stages = {p: p.stat().st_mtime_ns for p in (uninterrupted / "stages").iterdir()}
    artifact = (uninterrupted / "artifact.fwy").stat().st_mtime_ns
    report = (uninterrupted / "report.md").read_text()
    _finish(["--resume", str(uninterrupted)])
    assert stages == {p: p.stat().st_mtime_ns for p in (uninterrupted / "stages").iterdir()}
    assert artifact == (uninterrupted / "artifact.fwy").stat().st_mtime_ns
    assert report == (uninterrupted / "report.md").read_text()


def test_a_single_lost_stage_is_redone_alone(uninterrupted: Path) -> None:
    """Removing one stage's result redoes that stage, with the same figures, and no other."""
    record = uninterrupted / "stages" / "sliding.json"
    before = json.loads(record.read_text())
    train = (uninterrupted / "stages" / "train.json").stat().st_mtime_ns
    record.unlink()
    _finish(["--resume", str(uninterrupted)])
    after = json.loads(record.read_text())
    assert {k: v for k, v in before.items() if "second" not in k} == {
        k: v for k, v in after.items() if "second" not in k
    }
    assert train == (uninterrupted / "stages" / "train.json").stat().st_mtime_ns


def test_bits_can_be_allocated_anew_until_there_is_an_artifact(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """A run that has no artifact yet goes on with other bits and the same weights."""
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted, folder)
    refused = _start(["--resume", str(folder), "--bits", "int5"])
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "has its artifact already" in output
    for stage in ("artifact", "round_trip", "sliding", "slot_context", "slot_shared", "causality"):
        (folder / "stages" / f"{stage}.json").unlink(missing_ok=True)
    train = (folder / "stages" / "train.json").read_text()
    _finish(["--resume", str(folder), "--bits", "int5"])
    assert train == (folder / "stages" / "train.json").read_text()
    rows = json.loads((folder / "stages" / "quantize.json").read_text())["matrices"]
    assert {row["bits"] for row in rows} == {5}
    assert json.loads((folder / "config.json").read_text())["quant"]["bits"] == "int5"
    sizes = [(f / "artifact.fwy").stat().st_size for f in (folder, uninterrupted)]
    assert sizes[0] < sizes[1]


def test_same_seed_same_artifact(uninterrupted: Path, tmp_path: Path) -> None:
    """Same seed, same data, same device: the artifact is the same to the byte."""
    _finish([*SETTINGS, f"--out={tmp_path}", "--name=again"])
    first = (uninterrupted / "artifact.fwy").read_bytes()
    assert (tmp_path / "again" / "artifact.fwy").read_bytes() == first
