"""Claims about the submission folder: its one script is the whole record, small and exact.

Real processes run the packed script in an empty folder.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import triton

from kernels import build, flash4_package, variants
from trainer import codesize, corpus
from trainer.__main__ import parse
from trainer.config import SIZE_LIMIT_BYTES, ModelConfig
from trainer.errors import ArtifactError, RunError
from trainer.record import RECORD
from trainer.statistics import PUBLISHED
from trainer.submission import __main__ as command
from trainer.submission import contents, cplusplus, pack
from trainer.submission.arguments import arguments_for, shared_settings
from trainer.submission.contents import Submission
from trainer.submission.readme import readme
from trainer.submission.runs import load_runs
from verify.models import TINY_RUN

ROOT = Path(__file__).resolve().parents[1]
TARGET_BYTES = 60_000
SETTINGS = [
    "smoke",
    *TINY_RUN,
    "--train.sequences-per-step=8",
    "--train.max-steps=8",
    "--train.log-every=1",
    "--quant.calibration-sequences=2",
    "--quant.int6-matrices=2",
    "--eval.max-tokens=100",
    "--eval.stride=16",
]


@pytest.fixture(scope="module")
def script() -> bytes:
    return pack.packed_script()


@pytest.fixture(scope="module")
def folder(script: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the packed script in it, and the runs of both forms of the code."""
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "train_gpt.py").write_bytes(script)
    data = corpus.embedded_corpus().dir
    cleared = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "FAIRWAY_COMMIT")
    environment = {k: v for k, v in os.environ.items() if k not in cleared}
    common = [*SETTINGS, f"--data.dir={data}", f"--out={folder / 'runs'}"]
    programs = {
        "packed": ([sys.executable, "train_gpt.py"], folder),
        "plain": ([sys.executable, "-m", "trainer"], ROOT),
    }
    started = [
        subprocess.Popen(
            [*program, *common, f"--name={name}"],
            cwd=where,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, (program, where) in programs.items()
    ]
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    return folder


@pytest.fixture(scope="module")
def submission(script: bytes, folder: Path) -> Submission:
    runs, found = load_runs([folder / "runs" / "plain"])
    return Submission(runs, found, "context", script, "A", "a", "Name")


def _unpacked(folder: Path) -> Path:
    (unpacked,) = folder.glob(".fairway-*")
    return unpacked


def _started(path: Path) -> dict[str, Any]:
    """Names of a packed script that is loaded and not run."""
    return runpy.run_path(str(path), run_name="loaded")


def test_packed_run_equals_the_unpacked_run(folder: Path) -> None:
    """The packed script, alone in a folder, repeats the losses, the artifact and the scores."""
    runs = {name: folder / "runs" / name for name in ("packed", "plain")}
    losses = {}
    for name, run in runs.items():
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [(row["step"], row["train_nats"], row["grad_norm"]) for row in rows]
    assert len(losses["plain"]) == 8
    assert losses["packed"] == losses["plain"]
    assert (runs["packed"] / "artifact.fwy").read_bytes() == (
        runs["plain"] / "artifact.fwy"
    ).read_bytes()
    for stage in ("round_trip", "sliding", "slot_context", "slot_shared"):
        packed, plain = (
            json.loads((run / "stages" / f"{stage}.json").read_text()) for run in runs.values()
        )
        assert packed["nats"] == plain["nats"], stage
    # It was the unpacked copy that ran, not this checkout.
    assert list((_unpacked(folder) / "trainer" / "__pycache__").glob("model.*.pyc"))
    environment = json.loads((runs["packed"] / "environment.json").read_text())
    assert environment["commit"].startswith("packed-")


def test_both_runs_count_the_script_as_their_code(script: bytes, folder: Path) -> None:
    """Code bytes are the size of the script, seen from inside it and from the sources."""
    for name in ("packed", "plain"):
        stage = json.loads((folder / "runs" / name / "stages" / "artifact.json").read_text())
        assert stage["code_bytes"] == len(script)


def test_script_meets_its_target(script: bytes) -> None:
    """The whole script is at most 60,000 bytes."""
    assert len(script) <= TARGET_BYTES


def test_packing_repeats_and_its_size_is_kept(
    script: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed again the script has the same size; asked again, the size is read, not packed."""
    monkeypatch.setattr(codesize, "CACHE", tmp_path)
    again: list[bytes] = []

    def counted() -> bytes:
        again.append(packed_script())
        return again[-1]

    packed_script = pack.packed_script
    monkeypatch.setattr(pack, "packed_script", counted)
    assert codesize.code_bytes() == codesize.code_bytes() == len(script)
    assert again == [script]


def test_changed_sources_are_counted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash by which sizes are kept changes with any source, Python or CUDA."""
    for package in pack.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    digests = {pack.source_digest()}
    for number, name in enumerate(("trainer/model.py", "kernels/cuda/gemm.cuh"), start=2):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        digests.add(pack.source_digest())
        assert len(digests) == number, name


def test_imports_decide_what_is_packed() -> None:
    """Modules imported anywhere below the commands are in, those of other commands are not."""
    names = pack.modules()
    for needed in ("trainer.model", "trainer.embedded", "kernels.cutlass", "kernels.triton_ops"):
        assert needed in names
    for needless in ("trainer.fetch", "trainer.submission.pack", "trainer.generate"):
        assert needless not in names
    for module, name in (("codesize", "size"), ("embedded", "corpus"), ("report", "report")):
        assert names[f"trainer.{module}"].name == f"own_{name}.py"
    assert {"torch", "numpy", "tyro", "brotli"} <= set(pack.third_party())
    assert not {"python_minifier", "matplotlib"} & set(pack.third_party())


def test_packed_library_holds_what_the_plans_name(folder: Path) -> None:
    """Of the variants the script can build exactly those that a plan uses."""
    packed = runpy.run_path(str(_unpacked(folder) / "kernels" / "variants.py"))
    planned = {plan.variant for plan in vars(variants).values() if isinstance(plan, variants.Plan)}
    assert set(packed["VARIANTS"]) == planned
    assert planned < set(variants.VARIANTS)
    for name, variant in packed["VARIANTS"].items():
        original = variants.VARIANTS[name]
        assert dataclasses.asdict(variant) == dataclasses.asdict(original), name


def test_packed_cuda_sources_are_the_same_tokens(folder: Path) -> None:
    """Comments and white space aside, the compiler is given the repository's device code."""
    paths = sorted((ROOT / "kernels" / "cuda").iterdir())
    packed = _unpacked(folder) / "kernels" / "cuda"
    assert sorted(path.name for path in packed.iterdir()) == [path.name for path in paths]
    for path in paths:
        source, text = path.read_text(), (packed / path.name).read_text()
        assert cplusplus.tokens(text) == cplusplus.tokens(source), path.name
        assert len(text) < len(source), path.name
        assert build.INCLUDE.findall(text) == build.INCLUDE.findall(source), path.name


@pytest.mark.nvcc
@pytest.mark.parametrize("plan", [variants.HEADS_PLAN, variants.NORM_GRADIENT_PLAN])
def test_packed_cuda_sources_are_preprocessed_alike(
    plan: variants.Plan, folder: Path, tmp_path: Path
) -> None:
    """What the compiler proper sees is the repository's: macros, pragmas and includes resolved."""
    variant = variants.VARIANTS[plan.variant]
    seen: list[str] = []
    for number, sources in enumerate(
        (ROOT / "kernels" / "cuda", _unpacked(folder) / "kernels" / "cuda")
    ):
        unit = tmp_path / f"{number}.cu"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "SOURCES", sources)
            unit.write_text(build.instantiate(variant))
        folders = (sources, *build.find_headers())
        result = subprocess.run(
            [build.find_nvcc(), "-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_90a",
             *(f"-I{path}" for path in folders), "-E", unit],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        lines = [line for line in result.stdout.splitlines() if not line.startswith("# ")]
        seen.append("".join("".join(lines).split()))  # white space apart, as the tokens are equal
    assert seen[0] == seen[1]
    assert f"fairway_{plan.variant}" in seen[0]


def test_script_says_what_it_leaves_out(folder: Path) -> None:
    """Without data it names the option that brings some; a run's report says who writes it."""
    result = subprocess.run(
        [sys.executable, "train_gpt.py", "smoke", f"--out={folder / 'none'}"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "the packed script holds no corpus" in result.stderr
    assert "--data.dir" in result.stderr
    run = folder / "runs" / "packed"
    report = (run / "report.md").read_text()
    assert f"`python -m trainer --resume {run}`" in report


def test_device_code_is_packed_unchanged(folder: Path) -> None:
    """What Triton compiles of the packed modules is the repository's code, docstrings aside."""
    kernels = [name for name in pack.modules() if name.endswith("_triton") or "persist" in name]
    assert len(kernels) >= 4
    seen = 0
    for name in kernels:
        path = _unpacked(folder) / f"{name.replace('.', '/')}.py"
        spec = importlib.util.spec_from_file_location(f"packed_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        packed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(packed)
        for function, original in vars(importlib.import_module(name)).items():
            if isinstance(original, triton.JITFunction) and original.__module__ == name:
                assert _device_code(getattr(packed, function)) == _device_code(original), function
                seen += 1
    assert seen >= 8


def _device_code(function: Any) -> str:
    """Syntax tree of a Triton function without its docstring."""
    tree = ast.parse(function.src)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return ast.dump(tree)


def test_ranks_may_unpack_at_once(script: bytes, folder: Path, tmp_path: Path) -> None:
    """Eight ranks that start together end with one whole folder and no remains."""
    path = tmp_path / "train_gpt.py"
    path.write_bytes(script)
    started = _started(path)
    program, archive = started["program"](), started["number"](started["ARCHIVE"])
    text = program["decode"](archive)
    program["decode"] = lambda _: text  # threads would take turns at it
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: program["unpack"](path, archive, "x"), range(8)))
    assert folders == {_unpacked(tmp_path)}
    for name in (*pack.modules(), "kernels.cuda.gemm"):
        stem = name.replace(".", "/")
        assert list(_unpacked(tmp_path).glob(f"{stem}*")), name
    for path in _unpacked(tmp_path).rglob("*.*"):
        twin = _unpacked(folder) / path.relative_to(_unpacked(tmp_path))
        assert path.is_dir() or path.read_bytes() == twin.read_bytes(), path


def test_a_changed_script_does_not_start(script: bytes, tmp_path: Path) -> None:
    """A script re-encoded on its way says so instead of running."""
    path = tmp_path / "train_gpt.py"
    path.write_bytes(script.decode("latin-1").encode("utf-8"))
    with pytest.raises(SystemExit, match="copy it again"):
        _started(path)["program"]()
    assert not list(tmp_path.glob(".fairway-*"))


def test_folder_tells_what_the_run_measured(
    submission: Submission, script: bytes, tmp_path: Path
) -> None:
    """Every figure of the folder is that of the run's stages and of the script itself."""
    command.write(submission, tmp_path / "out")
    out, run = tmp_path / "out", submission.runs[0]
    assert {path.name for path in out.iterdir()} == {
        "README.md", "submission.json", "requirements.txt", "train_gpt.py", "train_seed1337.log",
    }  # fmt: skip
    assert (out / "train_gpt.py").read_bytes() == script
    told = json.loads((out / "submission.json").read_text())
    score = run.stages["slot_context"]
    assert (told["val_loss"], told["val_bpb"]) == (score["nats"], score["bpb"])
    assert told["bytes_code"] == len(script)
    assert told["bytes_total"] == len(script) + run.folder.artifact.stat().st_size
    assert told["causal"] is True
    log = (out / "train_seed1337.log").read_text()
    for row in run.metrics:
        assert f"step:{row['step']}/8 train_loss:{row['train_nats']:.4f} " in log
    assert f"final slot:context causal:yes val_loss:{score['nats']:.8f} " in log
    assert f"final slot:shared causal:NO val_loss:{run.stages['slot_shared']['nats']:.8f} " in log
    assert str(run.folder.path.parent) not in log
    text = (out / "README.md").read_text()
    assert f"{told['bytes_total']:,}" in text
    for earlier in PUBLISHED:
        assert (earlier.name in text) == earlier.causal, "causal is set against causal alone"
    assert "not comparable" in text, "the embedded corpus is not the record's text"
    assert f"**{score['bpb']:.4f} bits per byte** (SLOT `context`, causal by probe" in text
    pins = dict(line.split("==") for line in (out / "requirements.txt").read_text().split())
    recorded = run.environment["packages"]
    assert pins["torch"] == recorded["torch"].split("+")[0]
    assert pins["numpy"] == recorded["numpy"]


def test_requirements_name_flash4_where_it_is_chosen(submission: Submission) -> None:
    """The package behind attention `flash4`, which the script imports by name, is asked for."""
    run = submission.runs[0]
    assert "flash-attn" not in contents.requirements(run)
    chosen = dataclasses.replace(run, config=dataclasses.replace(run.config, attention="flash4"))
    assert flash4_package.REQUIREMENT in contents.requirements(chosen).splitlines()


def test_several_seeds_give_their_mean_and_largest_total(submission: Submission) -> None:
    """Means and deviations over seeds are those of the seeds; the total is the largest one."""
    first = submission.runs[0]
    better = json.loads(json.dumps(first.stages))
    better["slot_context"]["nats"] = first.stages["slot_context"]["nats"] - 0.5
    better["artifact"]["artifact_bytes"] = first.artifact_bytes + 77
    other = dataclasses.replace(
        first, stages=better, config=dataclasses.replace(first.config, seed=7)
    )
    told = contents.submission_json(dataclasses.replace(submission, runs=[other, first]))
    nats = first.stages["slot_context"]["nats"]
    assert told["val_loss"] == pytest.approx(nats - 0.25)
    assert told["val_loss_std"] == pytest.approx(0.5 / 2**0.5)
    assert told["bytes_total"] == first.artifact_bytes + 77 + submission.bytes_code
    assert list(told["seed_results"]) == ["7", "1337"]


def test_a_score_that_is_not_causal_is_never_called_causal(submission: Submission) -> None:
    """A folder headed by SLOT `shared` says in every place that it is not causal."""
    shared = dataclasses.replace(submission, mode="shared")
    told = contents.submission_json(shared)
    assert told["causal"] is False
    assert "NOT causal" in told["blurb"]
    assert "NOT causal by probe" in readme(shared)
    assert "a reproduction, not a claim" in readme(shared)


def test_too_many_bytes_are_refused(submission: Submission, tmp_path: Path) -> None:
    """One byte over the limit is refused, and nothing is written."""
    room = SIZE_LIMIT_BYTES - submission.runs[0].artifact_bytes
    command.write(dataclasses.replace(submission, script=bytes(room)), tmp_path / "fits")
    with pytest.raises(ArtifactError, match="16,000,001 bytes"):
        command.write(dataclasses.replace(submission, script=bytes(room + 1)), tmp_path / "over")
    assert not (tmp_path / "over").exists()


def _copied(folder: Path, tmp_path: Path, **settings: Any) -> Path:
    """A copy of the plain run with other settings."""
    copy = tmp_path / "copy"
    shutil.copytree(folder / "runs" / "plain", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **settings}))
    return copy


def test_runs_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    """Two runs of one seed, or of different settings, make no submission; another seed does."""
    plain, copy = folder / "runs" / "plain", _copied(folder, tmp_path)
    with pytest.raises(RunError, match="a seed occurs twice"):
        load_runs([plain, copy])
    shutil.rmtree(copy)
    copy = _copied(folder, tmp_path, seed=3, compute_dtype="bfloat16")
    with pytest.raises(RunError, match="differ in their settings"):
        load_runs([plain, copy])
    shutil.rmtree(copy)
    runs, _ = load_runs([plain, _copied(folder, tmp_path, seed=3)])
    assert [run.seed for run in runs] == [3, 1337]


def test_unfinished_and_altered_runs_are_explained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is not finished, or whose artifact is another, is refused with what to do."""
    copy = _copied(folder, tmp_path)
    (copy / "stages" / "slot_context.json").unlink()
    assert command.main(["--runs", str(copy), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "no result of stage slot_context" in message
    assert f"--resume {copy}" in message
    shutil.rmtree(copy)
    copy = _copied(folder, tmp_path)
    with (copy / "artifact.fwy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(RunError, match="not the artifact this run scored"):
        load_runs([copy])
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used_are_explained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No run at all, or a place for the result that is taken, ends with one line of advice."""
    assert command.main(["--runs", "--out", str(tmp_path / "out")]) == 2
    assert "--runs" in capsys.readouterr().err
    taken = tmp_path / "taken"
    taken.write_text("a file")
    for out in (taken, tmp_path):
        assert command.main(["--runs", str(folder / "runs" / "plain"), "--out", str(out)]) == 2
        assert "choose a new --out" in capsys.readouterr().err
    assert taken.read_text() == "a file"


def test_recorded_settings_come_back_from_their_command_line() -> None:
    """The command line in the README gives the settings of the run, whatever their types."""
    changed = dataclasses.replace(
        RECORD,
        compile=False,
        model=ModelConfig(width=256, query_heads=4, kv_heads=2, value_embed_layers=(3, 5)),
        train=dataclasses.replace(RECORD.train, max_seconds=None, max_steps=50),
        eval=dataclasses.replace(RECORD.eval, slot_modes=("context",)),
    )
    arguments = arguments_for(changed)
    assert arguments[0] == "record"
    assert arguments_for(RECORD) == ["record"]
    _, config = parse(arguments)
    assert shared_settings(config) == shared_settings(changed)
