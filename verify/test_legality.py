"""Claims about legality: held-out text stays shut until scoring, and every rule is looked at."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import codesize, corpus, evaluate, legality, scoring
from trainer.__main__ import main
from trainer.config import EvalConfig
from trainer.corpus import DataFolder
from trainer.errors import RunError
from trainer.folder import RunFolder
from trainer.held_out import CLOSED_STAGES, OPENINGS, ValidationGate
from trainer.legality import findings, run_findings
from trainer.report import (
    _scaled_table,  # pyright: ignore[reportPrivateUsage]
    _size_table,  # pyright: ignore[reportPrivateUsage]
)
from trainer.run import _Run  # pyright: ignore[reportPrivateUsage]
from trainer.shards import TOKEN_DTYPE, read_shard, write_shard
from verify.models import TINY, random_model
from verify.test_resume import SETTINGS

QUICK = [*SETTINGS, "--train.max-steps=2", "--train.average=ema"]
CONFIG = EvalConfig(stride=6, batch_windows=3, slot_lr=0.05)


def _data_with(folder: Path, val_N: np.ndarray) -> Path:
    """The embedded corpus with another validation split, in `folder`."""
    source = corpus.embedded_corpus()
    folder.mkdir()
    for path in (*source.train_paths, source.tokenizer):
        (folder / path.name).symlink_to(path)
    write_shard(folder / "text_val_000000.bin", val_N)
    return folder


def _validation() -> np.ndarray:
    source = corpus.embedded_corpus()
    return np.array(read_shard(source.val_paths[0], source.vocab_size)[:2000])


@pytest.fixture(scope="module", autouse=True)
def _known_code_size() -> Iterator[None]:
    """Packing the code takes seconds and is not what is checked here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codesize, "code_bytes", lambda: 50_000)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder = _data_with(tmp_path_factory.mktemp("text") / "data", _validation())
    return corpus.open_folder(folder, 1024)


@pytest.fixture(scope="module")
def finished(data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, 2 steps long."""
    root = tmp_path_factory.mktemp("legal")
    assert main([*QUICK, f"--data.dir={data.dir}", f"--out={root}", "--name=run"]) == 0
    return root / "run"


def _stages(run: Path) -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in (run / "stages").glob("*.json")}


# The gate.


def test_the_gate_opens_for_scoring_alone(data: DataFolder) -> None:
    """Held-out text is handed out in scoring stages, counted, and refused in all others."""
    gate = ValidationGate(data, 16, 500)
    with gate.watched():
        result = gate.during("sliding", lambda: {"n": len(gate.tokens())})
        assert result["n"] == 500
        assert result[OPENINGS] > 0
        assert gate.during("train", lambda: {"a": 1}) == {"a": 1, OPENINGS: 0}
        for stage in CLOSED_STAGES:
            with pytest.raises(RunError, match=stage):
                gate.during(stage, lambda: {"n": len(gate.tokens())})
        with pytest.raises(RunError, match="set-up"):
            gate.tokens()
    assert len(gate.tokens()) == 500


@pytest.mark.parametrize("how", ["open", "memmap", "link", "bytes"])
def test_the_gate_sees_every_way_in(data: DataFolder, tmp_path: Path, how: str) -> None:
    """Whoever opens a validation file, by whatever name, is refused; other files are not."""
    gate = ValidationGate(data, 16, 500)
    path = data.val_paths[0]
    link = tmp_path / "innocent.bin"
    link.symlink_to(path)
    ways = {
        "open": lambda: path.open("rb").close(),
        "memmap": lambda: np.memmap(path, dtype=TOKEN_DTYPE, mode="r"),
        "link": lambda: link.read_bytes(),
        "bytes": lambda: open(str(path).encode(), "rb").close(),  # noqa: PTH123
    }

    def work() -> dict[str, Any]:
        data.train_paths[0].open("rb").close()
        ways[how]()
        return {}

    with gate.watched(), pytest.raises(RunError, match="calibrate"):
        gate.during("calibrate", work)


@pytest.mark.parametrize("stage", CLOSED_STAGES)
def test_a_run_that_looks_ahead_is_stopped(
    finished: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, calibration, quantization and packing cannot read held-out text: the run ends."""
    record = finished / "stages" / f"{stage}.json"
    kept = record.read_bytes()
    record.unlink()
    honest = getattr(_Run, f"_{stage}")

    def peeking(self: _Run) -> dict[str, Any]:
        corpus.load_split(self.data, "val")
        return honest(self)

    monkeypatch.setattr(_Run, f"_{stage}", peeking)
    assert main(["--resume", str(finished)]) == 2
    assert f"stage {stage} tried to open held-out text" in capsys.readouterr().err
    assert not record.exists()
    record.write_bytes(kept)


def test_the_validation_body_is_not_read_before_training_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A validation split of impossible tokens is noticed once scored, so no stage before read it.

    Its header, which tells its length, is read at the start.
    """
    data = _data_with(tmp_path / "data", np.full(2000, 0xFFFF, dtype=TOKEN_DTYPE))
    assert main([*QUICK, f"--data.dir={data}", f"--out={tmp_path}", "--name=run"]) == 2
    assert "token id 65535" in capsys.readouterr().err
    assert (tmp_path / "run" / "stages" / "train.json").exists()
    assert not (tmp_path / "run" / "stages" / "post_ema.json").exists()


def test_the_artifact_does_not_depend_on_held_out_text(finished: Path, tmp_path: Path) -> None:
    """Other held-out text gives other scores and the same artifact, to the byte."""
    data = _data_with(tmp_path / "data", _validation()[::-1])
    assert main([*QUICK, f"--data.dir={data}", f"--out={tmp_path}", "--name=run"]) == 0
    other = tmp_path / "run"
    assert (other / "artifact.fwy").read_bytes() == (finished / "artifact.fwy").read_bytes()
    mine, its = _stages(finished), _stages(other)
    assert mine["post_ema"]["nats"] != its["post_ema"]["nats"]
    assert mine["causality"]["text_sha256"] != its["causality"]["text_sha256"]


# The probe as a stage.


def test_modes_are_probed_and_the_text_is_named() -> None:
    """Plain and `context` are found causal, `shared` is not; the digest is the whole text's."""
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, 90).astype(np.uint16)
    found = legality.probe_modes(random_model(), tokens, CONFIG, ("off", "context", "shared"))
    assert {m: v["causal"] for m, v in found["modes"].items()} == {
        "off": True,
        "context": True,
        "shared": False,
    }
    assert found["text_tokens"] == 90
    changed = tokens.copy()
    changed[-1] ^= 1
    assert found["text_sha256"] == legality.text_sha256(tokens.astype(np.int64))
    assert found["text_sha256"] != legality.text_sha256(changed)


def test_one_rank_of_several_probes_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe on one rank of two covers the batches that scoring would leave to the other."""
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, 90).astype(np.uint16)
    alone = legality.probe_modes(random_model(), tokens, CONFIG, ("off", "shared"))
    monkeypatch.setattr(scoring, "_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(scoring, "_rank", lambda rank=rank: rank)
        assert legality.probe_modes(random_model(), tokens, CONFIG, ("off", "shared")) == alone


# Findings.

GOOD: dict[str, dict[str, Any]] = {
    "train": {"train_s": 600.05, "ms_per_step": 87.7, "world_size": 8, OPENINGS: 0},
    "post_ema": {OPENINGS: 2},
    "calibrate": {"source": "generated by the model", OPENINGS: 0},
    "hessians": {OPENINGS: 0},
    "quantize": {OPENINGS: 0},
    "artifact": {"artifact_bytes": 15_900_000, "code_bytes": 100_000, OPENINGS: 0},
    "sliding": {"seconds": 100.0},
    "slot_shared": {"seconds": 150.0},
    "causality": {
        "modes": {
            "off": {"causal": True, "moved": 0.0, "probed": 8, "worst_target": 0},
            "shared": {"causal": False, "moved": 0.1, "probed": 8, "worst_target": 3},
        }
    },
}


def _changed(stage: str, **values: Any) -> dict[str, dict[str, Any]]:
    return {**GOOD, stage: {**GOOD[stage], **values}}


def test_a_good_run_is_legal_in_its_causal_mode_alone() -> None:
    """With every rule kept, a plain score is legal and SLOT `shared` is not."""
    found = run_findings(GOOD)
    assert legality.legal(found, "off")
    assert not legality.legal(found, "shared")
    assert [f.verdict for f in found].count("broken") == 1


@pytest.mark.parametrize(
    ("stage", "values", "rule", "verdict"),
    [
        ("train", {"train_s": 600.2}, "training within", "broken"),
        ("train", {OPENINGS: 1}, "untouched", "broken"),
        ("quantize", {OPENINGS: 1}, "untouched", "broken"),
        ("hessians", {OPENINGS: None}, "untouched", "unknown"),
        ("artifact", {"artifact_bytes": 15_900_001}, "16,000,000", "broken"),
        ("artifact", {"code_bytes": 100_001}, "16,000,000", "broken"),
        ("calibrate", {"source": "the training split"}, "calibration", "unknown"),
        ("sliding", {"seconds": 600.1}, "evaluation within", "broken"),
        ("causality", {"modes": {}}, "causal, SLOT `off`", "unknown"),
    ],
)
def test_each_rule_is_looked_at(
    stage: str, values: dict[str, Any], rule: str, verdict: str
) -> None:
    """One rule not kept, or not known to be, makes a score not legal, and is named."""
    found = run_findings(_changed(stage, **values))
    assert not legality.legal(found, "off")
    (named,) = [f for f in found if rule in f.rule and f.mode in (None, "off")]
    assert named.verdict == verdict


def test_an_artifact_alone_does_not_tell_how_it_was_made() -> None:
    """Without its run, training time, validation data and calibration are unknown, not kept."""
    verdict = GOOD["causality"]["modes"]["off"]
    found = findings({"off": verdict}, {"off": 1.0}, 1, 1, {})
    assert [f.verdict for f in found] == ["kept", "unknown", "kept", "kept", "unknown", "unknown"]


# Where people read it.


def test_the_report_states_legality_and_scaled_settings(finished: Path) -> None:
    """The report shows the verdicts, the settings as scaled, and that this is less work."""
    text = (finished / "report.md").read_text()
    for finding in run_findings(_stages(finished)):
        assert f"| {finding.rule} | {finding.found} |" in text
    scale = _stages(finished)["train"]["step_scale"]
    assert f"| warmdown | 4,000 | 4,000 | {4000 * scale:,.1f} |" in text
    assert f"| Muon momentum warm-up | 1,500 | 1,500 | {1500 * scale:,.1f} |" in text
    assert "fraction of the record's work" in text
    assert "| calibrate | " in text
    assert " | 197 |" in text


def test_the_report_judges_the_size_by_the_limit_of_the_run(finished: Path) -> None:
    """A run with a limit of its own is held to that one."""
    stage = {**_stages(finished)["artifact"], "limit_bytes": 12_345}
    assert "| total, limit 12,345 (**over**) |" in _size_table(stage)
    stage = {**stage, "limit_bytes": 10**9}
    assert "| total, limit 1,000,000,000 (fits) |" in _size_table(stage)


@pytest.mark.parametrize(("decay", "steps"), [(0.0, "0"), (0.5, "1"), (1.0, "inf")])
def test_any_decay_of_the_average_can_be_reported(finished: Path, decay: float, steps: str) -> None:
    """A run without an EMA, or with one that never forgets, still gets its report."""
    _, config = RunFolder.open(finished)
    config = replace(config, train=replace(config.train, ema_decay=decay))
    last = _scaled_table(_stages(finished)["train"], config).splitlines()[-1]
    assert f"| 333 | {steps} |" in last


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--slot"], "at least one mode"),
        (["--batch-windows", "0"], "batch_windows 0"),
        (["--max-tokens", "-5"], "max_tokens -5"),
    ],
)
def test_evaluate_refuses_what_scores_nothing(
    arguments: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings without a score end with one line, before the artifact is read."""
    assert evaluate.main(["none.fwy", "--device", "cpu", *arguments]) == 2
    assert advice in capsys.readouterr().err


def test_evaluate_knows_a_run_by_its_artifact(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scored in its run folder an artifact has a known history; elsewhere it has not."""
    copy = tmp_path / "copy.fwy"
    copy.write_bytes((finished / "artifact.fwy").read_bytes())
    for path, known in ((finished / "artifact.fwy", True), (copy, False)):
        arguments = [str(path), "--device", "cpu", "--max-tokens", "60", "--slot", "off"]
        assert evaluate.main([*arguments, "--stride", "8"]) == 0
        output = " ".join(capsys.readouterr().out.split())
        assert "Legality" in output
        assert ("does not tell" in output) != known
        assert "causal, SLOT" in output
