"""Claims about benches that compare paths: verdicts follow figures, bad choices are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import loss_curves, passes, step_time
from bench.loss_curves import OLD, permuted


def _results(new_offset: float) -> dict[str, Any]:
    """Losses of 30 steps: permuted windows differ by 1e-3, and one new path of two by more."""
    base = [7.0 - 0.1 * step for step in range(30)]
    shifted = {
        OLD: 0.0,
        permuted(1): 1e-3,
        permuted(2): 1e-3,
        "fused MLP and passes": 1e-3,
        "with flash4": new_offset,
    }
    return {
        name: {"losses": [loss + by for loss in base], "environment": {}}
        for name, by in shifted.items()
    }


@pytest.mark.parametrize(("offset", "status"), [(1e-3, 0), (5e-3, 0), (0.1, 1)])
def test_curves_agree_within_the_yardstick(
    offset: float,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The new path passes as far as permuted windows explain its difference, and fails beyond."""
    monkeypatch.setattr(loss_curves, "run_all", lambda *_: _results(offset))
    out = tmp_path / "curves.json"
    own = ["--out", str(out), "--yardsticks", "2"]
    own += ["--paths", "fused MLP and passes", "with flash4"]
    assert loss_curves.main([*own, "--", "--train.sequences-per-step", "8"]) == status
    stored = json.loads(out.read_text())
    apart = {name: found["rms_nats"] for name, found in stored["agreement"].items()}
    wanted = {"fused MLP and passes": 1e-3, "with flash4": offset}
    assert apart == pytest.approx(wanted)
    assert stored["trainer"] == ["--train.sequences-per-step", "8"]
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert f"{offset / 1e-3:.2f} times" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--paths", "--starts"])
def test_an_unknown_path_is_named(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path that does not exist ends the step-time bench with the list of those that do."""
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["step_time", "--out", str(out), option, "fast"])
    assert step_time.main() == 2
    message = capsys.readouterr().err
    assert "no path fast" in message
    assert "fused MLP and passes" in message
    assert not out.exists()


def test_a_start_without_its_path_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Starts are measured of the paths that are timed; left out, all of those are."""
    options = ["step_time", "--out", str(tmp_path / "out.json"), "--paths", "plain"]
    monkeypatch.setattr(step_time.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [*options, "--starts", "fused MLP"])
    assert step_time.main() == 2
    assert "--starts fused MLP: name it" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", options)
    assert step_time.main() == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_curves_are_compared_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a GPU all paths would be the plain one, and agree: refused. So are strange names."""
    monkeypatch.setattr(loss_curves.torch.cuda, "is_available", lambda: False)
    for options, message in (
        ([], "needs a CUDA GPU"),
        (["--paths", "fast"], "no path fast; choose of plain"),
        (["--yardsticks", "0"], "must be at least 1"),
    ):
        assert loss_curves.main(options) == 2
        assert message in capsys.readouterr().err


def test_passes_are_timed_on_a_gpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a GPU the bench of the fused passes says so instead of timing an interpreter."""
    monkeypatch.setattr(passes.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["passes", "--out", str(tmp_path / "out.json")])
    assert passes.main() == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
