"""Claims about the ablations: rows change what they say and nothing else, and finished work stays.

Most checks run the harness over a trainer that only writes results.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

import trainer.run
from trainer import checkpoint, codesize
from trainer.__main__ import main as trainer_main
from trainer.__main__ import parse
from trainer.ablations import report as ablations_report
from trainer.ablations.__main__ import Arguments, ablate, main
from trainer.ablations.claims import CLAIMS, Claim, noise_bpb, verdict
from trainer.ablations.execute import Common, Stopped, launcher
from trainer.ablations.report import Ablations, markdown, picture
from trainer.ablations.rows import NO_LIMIT_BYTES, ROWS, RowName, Run, needed, runs, seed_runs
from trainer.errors import ConfigError
from trainer.folder import RunFolder
from trainer.record import RECORD
from verify.test_resume import ROOT, SETTINGS

TINY = [s for s in SETTINGS[1:] if not s.startswith(("--train.max-steps", "--train.average"))]
"""Settings of a tiny model, without those the harness gives."""
EVERY = runs(RECORD.model)


def score(bpb: float) -> dict[str, Any]:
    return {"bpb": bpb, "nats": bpb * math.log(2) * 2, "tokens": 100, "causal": True}


def stages(bpb: float, size: int = 15_000_000) -> dict[str, dict[str, Any]]:
    """Stage results of a run, `post_ema` scoring `bpb`."""
    return {
        "data": {"name": "made up"},
        "train": {"steps": 3, "world_size": 1},
        "post_ema": score(bpb),
        "calibrate": {},
        "hessians": {},
        "quantize": {"matrices": [1, 2]},
        "artifact": {"artifact_bytes": size, "code_bytes": 100_000, "baseline_bytes": size + 10},
        "round_trip": score(bpb + 0.002),
        "sliding": score(bpb - 0.01),
        "slot_context": score(bpb - 0.011),
        "slot_shared": score(bpb - 0.014),
    }


def result(name: str, bpb: float, size: int = 15_000_000) -> dict[str, Any]:
    return {"name": name, "stages": stages(bpb, size), "seed": 1, "source": None, "command": ""}


class FakeTrainer:
    """Stands in for `python -m trainer`: keeps every call, writes files and results."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.fail: set[str] = set()
        self.stop_at = ""

    def __call__(self, arguments: list[str]) -> int:
        self.calls.append(arguments)
        if arguments[0] == "--resume":
            folder, _ = RunFolder.open(Path(arguments[1]))
        else:
            preset, config = parse(arguments)
            folder = RunFolder.create(config, preset)
        name = folder.path.name
        if name in self.fail:
            return 2
        if name == self.stop_at:
            raise Stopped(signal.SIGTERM)
        for stage, values in stages(1 + len(name) / 1000).items():
            folder.stage(stage, lambda values=values: values)
        weights = {kind: {f"{kind}.w": torch.tensor([float(len(kind))])} for kind in ("ema", "swa")}
        checkpoint.save_tensors(folder.averages, weights["ema"] | weights["swa"], {})
        for path in (folder.model, folder.calibration, folder.hessians):
            if not path.exists():
                checkpoint.save_tensors(path, {"w": torch.zeros(1)}, {})
        return 0

    @property
    def names(self) -> list[str]:
        """Names of the runs called, in order."""
        where = [
            Path(c[1]).name if c[0] == "--resume" else c[c.index("--name") + 1] for c in self.calls
        ]
        self.calls = []
        return where


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and reports of single runs take longer than everything else here."""
    monkeypatch.setattr(trainer.run, "write_report", lambda folder, _: folder.report.write_text(""))
    monkeypatch.setattr(ablations_report, "picture", lambda _: Figure())


def harness(
    out: Path, launch: Any, *rows: RowName, overrides: tuple[str, ...] = (), **more: Any
) -> int:
    arguments = Arguments(out=out, rows=rows, preset="smoke", **more)
    return ablate(arguments, list(overrides), ["--out", str(out)], launch)


# Rows.

CHANGES: dict[str, set[str]] = {
    "base": set(),
    "ema-swa": {"train.average"},
    "swa": {"train.average"},
    "int5": {"quant.bits"},
    "int6": {"quant.bits"},
    "budgeted": {"quant.bits", "quant.limit_bytes"},
    "measured": {"quant.bits", "quant.limit_bytes"},
    "mlp-3x": {"model.mlp_width"},
    "turbo-muon": {"optim.muon_variant"},
    "lr-floor-0": {"train.lr_floor"},
    "qat-off": {"train.late_qat"},
    "qat-linears": {"train.late_qat"},
}


def flat(config: Any) -> dict[str, Any]:
    values = asdict(config)
    return {
        f"{section}.{name}": value
        for section, settings in values.items()
        for name, value in (settings.items() if isinstance(settings, dict) else [("", settings)])
    }


def test_every_run_changes_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    """A run differs from the base in its named settings alone; SLOT is scored in the base only."""
    overrides = ("--quant.limit-bytes", str(NO_LIMIT_BYTES), "--eval.slot-modes")
    common = Common(tmp_path, "record", 1337, overrides)
    base = flat(common.config(EVERY["base"]))
    assert EVERY.keys() == CHANGES.keys()
    for name, run in EVERY.items():
        settings = flat(common.config(run))
        changed = {key for key in base if settings[key] != base[key]}
        assert changed - {"name.", "eval.slot_modes"} == CHANGES[name], name
        assert bool(settings["eval.slot_modes"]) == (name == "base")
    assert flat(common.config(EVERY["mlp-3x"]))["model.mlp_width"] == 1536
    assert base["model.mlp_width"] == 1792
    assert base["eval.slot_modes"] == ("context", "shared")


def test_sources_come_first_and_only_what_is_needed() -> None:
    """Runs are in an order that can be run; a row brings its sources and no more."""
    for row in ROWS:
        order = [run.name for run in needed(EVERY, [row])]
        assert set(order) == {"base", "ema-swa", row.run}
    everything = needed(EVERY, ROWS)
    order = [run.name for run in everything]
    assert set(order) == set(EVERY)
    for run in everything:
        assert run.source is None or order.index(run.source) < order.index(run.name)
    assert {row.name for row in ROWS} == set(get_args(RowName))


def test_noise_is_in_rows_that_train_anew() -> None:
    """A row counts as trained anew exactly if its run shares no training with the base."""
    shared = {name for name, run in EVERY.items() if run.source is not None} | {"ema-swa"}
    for row in ROWS:
        assert row.trains == (row.run not in shared), row.name


# Sharing.


def test_shared_rows_equal_their_commands_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that takes over the base's training has the very artifact and scores of its stand-alone
    command."""
    monkeypatch.setattr(codesize, "code_bytes", lambda: 1000)  # packing the code takes seconds
    tiny = (*TINY, "--train.swa-below", "0.9", "--model.bigram-buckets", "97")
    more: dict[str, Any] = {"steps": 5, "max_eval_tokens": 400}
    out = tmp_path / "a"
    assert harness(out, trainer_main, "int5", "swa", overrides=tiny, **more) == 0
    for name in ("int5", "swa"):
        here = json.loads((out / "results" / f"{name}.json").read_text())
        command = here["command"].removeprefix("python -m trainer ").split(" ")
        assert trainer_main([*command, "--out", str(tmp_path / "b"), "--name", name]) == 0
        for stage in ("artifact", "post_ema", "round_trip", "sliding"):
            path = tmp_path / "b" / name / "stages" / f"{stage}.json"
            alone = json.loads(path.read_text())
            keys = ("sha256", "baseline_bytes", "nats", "bpb")
            expected = {key: alone[key] for key in keys if key in alone}
            assert {key: here["stages"][stage][key] for key in expected} == expected, (name, stage)
    assert "not done yet" not in (out / "ablations.md").read_text()


def test_base_takes_the_ema_and_swa_the_snapshots(tmp_path: Path) -> None:
    """Of the two averages of one training, the base has the EMA and `swa` the SWA."""
    assert harness(tmp_path, FakeTrainer(), "swa", "int5") == 0
    for name, value in (("base", 3.0), ("swa", 3.0), ("int5", 3.0)):
        weights = load_file(tmp_path / "runs" / name / "model.safetensors")
        assert weights["w"].item() == value
    folder = tmp_path / "runs"
    averages = {"ema.w": torch.tensor([1.0]), "swa.w": torch.tensor([2.0])}
    checkpoint.save_tensors(folder / "ema-swa" / "averages.safetensors", averages, {})
    for name, value in (("base", 1.0), ("swa", 2.0)):
        for path in ("config.json", f"../../results/{name}.json"):
            (folder / name / path).unlink()
        harness(tmp_path, FakeTrainer(), "swa", "int5")
        assert load_file(folder / name / "model.safetensors")["w"].item() == value


# Going on.


def test_finished_runs_are_not_done_again(tmp_path: Path) -> None:
    """The same command again runs nothing; one more row or seed runs what is new."""
    fake = FakeTrainer()
    assert harness(tmp_path, fake, "int5") == 0
    assert fake.names == ["ema-swa", "base", "int5"]
    assert harness(tmp_path, fake, "int5") == 0
    assert fake.names == []
    assert harness(tmp_path, fake, "int5", "lzma", "qat-off", seeds=2) == 0
    assert fake.names == ["qat-off", "base-seed+1"]


def test_a_stopped_command_goes_on(tmp_path: Path) -> None:
    """A run that was stopped is resumed, and those before it are kept."""
    fake = FakeTrainer()
    fake.stop_at = "qat-off"
    with pytest.raises(Stopped):
        harness(tmp_path, fake, "int5", "qat-off")
    assert fake.names == ["ema-swa", "base", "int5", "qat-off"]
    fake.stop_at = ""
    assert harness(tmp_path, fake, "int5", "qat-off") == 0
    assert fake.calls == [["--resume", str(tmp_path / "runs" / "qat-off")]]


def test_a_half_made_folder_is_made_anew(tmp_path: Path) -> None:
    """A harness killed while it shared a training leaves a folder that the next one completes."""
    fake = FakeTrainer()
    fake.fail = {"int5"}
    harness(tmp_path, fake, "int5")
    run = tmp_path / "runs" / "int5"
    (run / "config.json").unlink()
    (run / "hessians.safetensors").unlink()
    (run / "stages" / "train.json").unlink()
    (run / "stages" / "train.json").write_text("half")
    fake.fail = set()
    assert harness(tmp_path, fake, "int5") == 0
    assert load_file(run / "hessians.safetensors")
    assert json.loads((run / "stages" / "train.json").read_text())["steps"] == 3
    source = tmp_path / "runs" / "base" / "stages" / "train.json"
    assert json.loads(source.read_text())["steps"] == 3


def test_a_failed_run_is_told_and_tried_again(tmp_path: Path) -> None:
    """A failed run ends neither the others nor silently; its dependents wait; it is tried again."""
    fake = FakeTrainer()
    fake.fail = {"qat-off"}
    assert harness(tmp_path, fake, "qat-off", "turbo-muon") == 1
    assert "turbo-muon" in fake.names
    assert "| Late QAT | off | failed |" in (tmp_path / "ablations.md").read_text()
    fake.fail = {"base"}
    assert harness(tmp_path / "b", fake, "int5") == 1
    assert fake.names == ["ema-swa", "base"]
    assert "`base` failed" in (tmp_path / "b" / "ablations.md").read_text()
    fake.fail = set()
    assert harness(tmp_path, fake, "qat-off", "turbo-muon") == 0
    assert fake.names == ["qat-off"]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    """Rows of other settings never get into one table."""
    fake = FakeTrainer()
    harness(tmp_path, fake)
    with pytest.raises(ConfigError, match="overrides"):
        harness(tmp_path, fake, max_eval_tokens=5)
    with pytest.raises(ConfigError, match="seed"):
        harness(tmp_path, fake, seed=5)


def test_a_wrong_override_ends_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that does not exist ends with status 2, and nothing was run."""
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path), "--preset", "smoke", "--train.lr-flor", "0"])
    assert stop.value.code == 2
    assert "lr-floor" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_one_harness_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second harness in the same folder is refused with advice."""
    with launcher(tmp_path):
        assert main(["--out", str(tmp_path), "--preset", "smoke"]) == 2
    assert "another --out" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there can be no folder, the command ends with its name and advice."""
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert main(["--out", str(taken), "--preset", "smoke"]) == 2
    assert f"cannot write into {taken}" in capsys.readouterr().err


def test_a_signal_reaches_the_run(tmp_path: Path) -> None:
    """SIGTERM stops the run at a checkpoint and then the harness; nothing is left behind."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trainer.ablations", "--out", str(out), "--rows", "lzma"]
    command += ["--preset", "smoke", "--steps", "1000000", *TINY, "--train.log-every", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    saved = out / "runs" / "ema-swa" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = f"{process.wait(timeout=60)} {(tmp_path / 'log').read_text()}"
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "a checkpoint is written" in said
    with launcher(out):  # the run is gone too, or it would hold the lock
        pass


# Claims.

SLOT = next(claim for claim in CLAIMS if "SLOT" in claim.text)
TURBO = next(claim for claim in CLAIMS if "Turbo" in claim.text)


def test_claims_measure_what_they_say() -> None:
    """Each claim's figure, from results made up for it."""
    results = {
        "base": result("base", 1.2, 9_412),
        "int5": result("int5", 1.2),
        "int6": result("int6", 1.2, 17_000_000),
        "turbo-muon": result("turbo-muon", 1.203, 15_950_000),
    }
    results["base"]["stages"]["artifact"]["baseline_bytes"] = 10_000
    results["int5"]["stages"]["round_trip"] = score(1.22)
    found = [claim.measure(results) for claim in CLAIMS]
    expected = [5.88, 0.02, 0.002, 17_100_000, 0.003, 16_050_000, 0.004]
    assert found == pytest.approx(expected)
    assert [verdict(claim, results, None) for claim in CLAIMS] == ["held"] * len(CLAIMS)


@pytest.mark.parametrize(
    ("claim", "value", "noise", "expected"),
    [
        (SLOT, 0.0019, None, "held"),
        (SLOT, 0.0018, None, "did not hold"),
        (SLOT, -0.0037, 1.0, "did not hold"),
        (TURBO, 0.0018, 0.001, "held"),
        (TURBO, 0.0018, 0.002, "within noise"),
        (TURBO, -0.0018, 0.001, "did not hold"),
        (CLAIMS[2], 0.0029, None, "held"),
        (CLAIMS[2], 0.0031, None, "did not hold"),
        (CLAIMS[3], 16_000_001, None, "held"),
        (CLAIMS[3], 16_000_000, None, "did not hold"),
    ],
)
def test_verdicts(claim: Claim, value: float, noise: float | None, expected: str) -> None:
    """Half the effect holds, less does not; limits are sharp; noise counts where two trained."""
    stated = Claim(
        claim.text, (), lambda _: value, claim.published, claim.rule, "BPB", claim.trains
    )
    assert verdict(stated, {}, noise) == expected
    assert verdict(claim, {}, noise) == "not measured"


def test_noise_is_twice_the_deviation_of_a_difference() -> None:
    """Noise is 2 sqrt(2) standard deviations of the seeds, and unknown with one."""
    values = [1.2, 1.21, 1.19]
    bases = [result("base", value) for value in values]
    assert noise_bpb(bases[:1], "post_ema") is None
    expected = 2 * math.sqrt(2) * statistics.stdev(values)
    assert noise_bpb(bases, "post_ema") == pytest.approx(expected)


def test_seeds_differ_in_the_seed_alone(tmp_path: Path) -> None:
    """Further seeds train the base with the next seeds and change nothing else."""
    common = Common(tmp_path, "record", 10, ())
    base = flat(common.config(Run("base")))
    configs = [flat(common.config(run)) for run in seed_runs(3)]
    assert [config["seed."] for config in configs] == [11, 12]
    for config in configs:
        assert {key for key in base if config[key] != base[key]} == {"seed.", "name."}


def test_the_report_says_what_is_missing() -> None:
    """Before the base is done, and without further seeds, the report says so."""
    text = markdown(Ablations("command", ROWS, {}, [], {"int5": "failed"}))
    assert "The base run is not done yet" in text
    assert "| Bits | uniform int5 | failed |" in text
    assert text.count("not done yet") == len(ROWS)
    assert text.count("not measured") == len(CLAIMS)
    assert "`--seeds 2`" in text


def test_the_picture_shows_the_differences() -> None:
    """Bars are as long as BPB minus the base's and MB, and noise lies behind trained rows alone."""
    rows = [row for row in ROWS if row.name in ("int5", "qat-off", "lzma")]
    results = {name: result(name, 1.2) for name in ("base", "int5", "qat-off")}
    results["int5"]["stages"]["round_trip"] = score(1.252)
    seeds = [results["base"], result("other seed", 1.21)]
    figure = picture(Ablations("command", rows, results, seeds, {}))
    scores, sizes = ([p.get_width() for p in axes.patches] for axes in figure.axes)  # pyright: ignore[reportAttributeAccessIssue]
    noise = noise_bpb(seeds, "post_ema")
    assert noise is not None
    assert scores == pytest.approx([2 * noise, 0.05, 0.0])  # noise behind qat-off; int5; qat-off
    assert sizes == pytest.approx([15.0, 15.0, 15.00001])  # base; int5; LZMA-9
