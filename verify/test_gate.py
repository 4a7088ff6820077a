"""Claims about the bench's gate: it catches slower code and leaves the same code alone."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import gate
from bench.baseline import main as make_baseline
from bench.gate import Baseline, judge, machine_class, merged
from bench.kernel_table import table
from bench.measure import Case, Measurement, measure, repeated
from bench.stopwatch import Subject, times_interleaved

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "a fixed product"
NO_PAUSES = (0.0, 0.0)


def measured(ratio: float, reference: str = REFERENCE) -> Measurement:
    return Measurement(reference, ratio, ratio, 1.0, (ratio,))


def script(*ratios: float) -> Callable[[], Measurement]:
    """A stand-in for measuring: the given ratios, one a call."""
    left = iter(ratios)
    return lambda: measured(next(left))


def baseline_of(*processes: tuple[float, ...]) -> Baseline:
    return Baseline(REFERENCE, processes)


def test_margin_follows_the_noise_inside_processes_and_between_them() -> None:
    """The margin is four deviations: robust inside a process, with an expectation between them."""
    alone = 4 * gate.PRIOR_BETWEEN * math.sqrt(2)
    assert baseline_of((2.0, 2.0, 2.0)).margin == pytest.approx(alone)
    assert baseline_of((2.0,)).margin == pytest.approx(alone)
    noisy = baseline_of((1.8, 1.9, 2.0, 2.1, 2.3))
    assert noisy.ratio == 2.0
    within = 1.4826 * (0.1 / 2.0) * math.sqrt(5 / 4)
    assert noisy.margin == pytest.approx(4 * math.hypot(within, gate.PRIOR_BETWEEN * math.sqrt(2)))
    disturbed = baseline_of((1.8, 1.9, 2.0, 2.1, 20.0))
    assert disturbed.margin == pytest.approx(noisy.margin)
    assert baseline_of(*[(2.0, 2.0)] * 20).margin == gate.SMALLEST_MARGIN


def test_processes_that_differ_widen_the_margin() -> None:
    """What lies between processes counts even if each one repeats itself exactly."""
    apart = baseline_of((1.9, 1.9), (2.0, 2.0), (2.1, 2.1))
    assert apart.ratio == 2.0
    assert apart.within == 0
    seen, weight = 0.05**2, gate.PRIOR_WEIGHT
    variance = (weight * gate.PRIOR_BETWEEN**2 + 2 * seen) / (weight + 2) * (1 + 1 / 3)
    assert apart.margin == pytest.approx(4 * math.sqrt(variance))
    together = baseline_of((2.0, 2.0), (2.0, 2.0), (2.0, 2.0))
    assert together.margin < apart.margin
    assert together.margin < baseline_of((2.0, 2.0)).margin
    # All in one process, the same ratios say nothing about the next process.
    assert baseline_of((1.9, 1.9, 2.0, 2.0, 2.1, 2.1)).between < apart.between


@given(st.floats(0.1, 10), st.floats(0.0, 0.1))
def test_limit_lies_exactly_at_the_margin(ratio: float, noise: float) -> None:
    """A subject fails just above baseline x (1 + margin), and passes just below it."""
    baseline = baseline_of((ratio * (1 - noise), ratio, ratio * (1 + noise)))
    limit = ratio * (1 + baseline.margin)
    below, above = limit * (1 - 1e-9), limit * (1 + 1e-9)
    assert judge("s", baseline, script(below), "x.json", NO_PAUSES)[0].passed
    assert not judge("s", baseline, script(above, above, above), "x.json", NO_PAUSES)[0].passed


def test_a_failure_names_the_subject_and_both_figures() -> None:
    """A regression's message holds the subject, its ratio, the baseline and the margin."""
    baseline = baseline_of((2.0, 2.0))
    verdict, made = judge("mlp_dpre", baseline, script(2.7, 2.6, 2.8), "x.json", NO_PAUSES)
    assert not verdict.passed
    assert len(made) == 3
    for part in ("mlp_dpre", "2.6000", "2.0000", "+30.0%", "11.3%", REFERENCE):
        assert part in verdict.message


def test_one_disturbed_measurement_is_not_a_regression() -> None:
    """A slow measurement is repeated, and a good one among three passes the subject."""
    baseline = baseline_of((2.0, 2.0))
    verdict, made = judge("s", baseline, script(2.7, 2.7, 2.0), "x.json", NO_PAUSES)
    assert verdict.passed
    assert [m.ratio for m in made] == [2.7, 2.7, 2.0]
    assert len(judge("s", baseline, script(2.01), "x.json", NO_PAUSES)[1]) == 1


def test_a_missing_or_foreign_baseline_fails() -> None:
    """No baseline, or one taken against another reference, is a failure and says what to do."""
    verdict, _ = judge("s", None, script(1.0), "bench/baselines/some-gpu.json")
    assert not verdict.passed
    assert "some-gpu.json" in verdict.message
    assert "python -m bench.baseline" in verdict.message
    other = Baseline("another product", ((1.0,),))
    verdict, _ = judge("s", other, script(1.0), "x.json", NO_PAUSES)
    assert not verdict.passed
    assert "another product" in verdict.message


@pytest.mark.parametrize(("inside", "between"), [(0.002, 0.0), (0.01, 0.01), (0.01, 0.04)])
def test_the_same_code_in_another_process_passes_and_a_slowdown_is_caught(
    inside: float, between: float
) -> None:
    """With simulated noise a further process passes nearly always, and 1.33 x is caught."""
    rng = random.Random(0)

    def process(factor: float = 1.0) -> Callable[[], Measurement]:
        middle = factor * rng.gauss(1, between)
        return lambda: measured(middle * rng.gauss(1, inside))

    flagged = caught = 0
    trials = 500
    for _ in range(trials):
        baseline = baseline_of(
            *(tuple(again().ratio for _ in range(4)) for again in (process() for _ in range(3)))
        )
        flagged += not judge("s", baseline, process(), "x.json", NO_PAUSES)[0].passed
        caught += not judge("s", baseline, process(4 / 3), "x.json", NO_PAUSES)[0].passed
    assert flagged <= 0.02 * trials
    # Three draws of 4 % can look like 8 %, whose margin is wider than the slowdown.
    assert caught >= (trials if between < 0.04 else 0.95 * trials)


def test_measure_pairs_subject_and_reference_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio is the median of each round's own ratio, so a drifting clock cancels."""
    drift = [1.0, 3.0, 9.0, 27.0]
    middle = statistics.median(drift)

    def fake(subjects: object, *, rounds: int, warm_up_rounds: int, device: str) -> object:
        part = [drift.pop(0) for _ in range(rounds)]
        return {"subject": [2 * d for d in part], "reference": list(part)}

    monkeypatch.setattr("bench.measure.times_interleaved", fake)
    case = Case(lambda i: None, lambda i: None, REFERENCE, "cpu", lambda: {"bytes": 7})
    found = measure(case, budget_s=0.012)
    assert found.ratio == 2.0
    assert found.subject_times_ms == (2.0, 6.0, 18.0, 54.0)
    assert found.reference_ms == middle
    assert found.details == {"bytes": 7}


def test_subjects_take_turns() -> None:
    """The stopwatch runs subjects in turn, round by round, warm-up apart, and times all rounds."""
    calls: list[tuple[str, int]] = []

    def called(name: str) -> Subject:
        return lambda i: calls.append((name, i))

    subjects = {name: called(name) for name in "ab"}
    times = times_interleaved(subjects, rounds=3, warm_up_rounds=1, device="cpu")
    assert calls == [(n, i) for i in (0, 0, 1, 2) for n in "ab"]
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert all(t >= 0 for values in times.values() for t in values)


def test_a_thread_is_timed_without_its_waits() -> None:
    """The clock "thread" counts a thread's work and leaves out what it waits; "cpu" counts both."""

    def work(i: int) -> None:
        time.sleep(0.05)
        sum(range(20_000))

    times = {
        clock: times_interleaved({"work": work}, rounds=2, warm_up_rounds=0, device=clock)["work"]
        for clock in ("thread", "cpu")
    }
    assert all(0 < ms < 40 for ms in times["thread"])
    assert all(ms >= 50 for ms in times["cpu"])


def test_slowed_case_does_the_stated_work() -> None:
    """`repeated` calls subject and reference exactly as often as told."""
    calls = {"subject": 0, "reference": 0}

    def count(name: str) -> Callable[[int], None]:
        def run(i: int) -> None:
            calls[name] += 1

        return run

    slowed = repeated(Case(count("subject"), count("reference"), REFERENCE, "cpu"), 4, 3)
    slowed.subject(0)
    slowed.reference(0)
    assert calls == {"subject": 4, "reference": 3}


def test_baselines_round_trip_and_merge(tmp_path: Path) -> None:
    """A baseline is read back as written; updating replaces, extending adds a process."""
    environment = {"device": "cpu", "commit": "abc"}
    run = gate.document(environment, {"a": [measured(1.0), measured(1.1)], "b": [measured(5.0)]})
    first = merged(None, run, extend=False)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(first))
    assert gate.load(path) == {
        "a": Baseline(REFERENCE, ((1.0, 1.1),)),
        "b": Baseline(REFERENCE, ((5.0,),)),
    }
    assert gate.load(tmp_path / "none.json") == {}
    assert first["environment"] == environment
    new = gate.document({"device": "cpu", "commit": "def"}, {"a": [measured(1.2)]})
    replaced = merged(first, new, extend=False)
    assert replaced["subjects"]["a"]["processes"] == [[1.2]]
    assert replaced["subjects"]["b"] == first["subjects"]["b"]
    assert replaced["environment"]["commit"] == "def"
    assert [replaced["subjects"][name]["commit"] for name in "ab"] == ["def", "abc"]
    extended = merged(first, new, extend=True)["subjects"]["a"]
    assert extended["processes"] == [[1.0, 1.1], [1.2]]
    assert extended["margin"] == round(Baseline(REFERENCE, ((1.0, 1.1), (1.2,))).margin, 4)
    foreign = gate.document(environment, {"a": [replace(measured(9.0), reference="other")]})
    assert merged(first, foreign, extend=True)["subjects"]["a"]["processes"] == [[9.0]]
    assert merged(None, new, extend=True) == merged(None, new, extend=False)


def test_stored_baselines_can_be_read() -> None:
    """Every baseline in the repository holds processes, and the margin that follows from them."""
    stored = list((ROOT / "bench" / "baselines").glob("*.json"))
    assert stored
    for path in stored:
        entries = json.loads(path.read_text())["subjects"]
        for name, baseline in gate.load(path).items():
            assert entries[name]["margin"] == round(baseline.margin, 4), (path.name, name)
            assert name in gate.describe(name, baseline)


def test_machine_classes_keep_different_machines_apart() -> None:
    """A class is the GPU's model, or cores and model of a CPU, as a file name."""
    cpu = {"device": "cpu", "cores": 2, "cpu": "Intel(R) Xeon(R) Processor"}
    assert machine_class(cpu) == "cpu-2-cores-intel-xeon-processor"
    assert machine_class({**cpu, "cores": 4}) != machine_class(cpu)
    h100 = {**cpu, "device": "NVIDIA H100 80GB HBM3"}
    assert machine_class(h100) == "nvidia-h100-80gb-hbm3"


def test_pytest_bench_fails_on_a_missing_baseline_and_on_a_slower_subject(tmp_path: Path) -> None:
    """`pytest bench` writes a baseline, and fails on a missing one and on slower code."""
    (tmp_path / "gate_here.py").write_text(
        "import pathlib\n"
        "from bench import gate\n"
        f"gate.BASELINES = pathlib.Path({str(tmp_path / 'baselines')!r})\n"
        f"gate.RUNS = pathlib.Path({str(tmp_path / 'runs')!r})\n"
    )

    def bench(subjects: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [
            *(sys.executable, "-m", "pytest", "bench/test_step_time.py", "-k", subjects, "-q"),
            *("-p", "no:cacheprovider", "-p", "gate_here", "--budget-s", "0.05", *options),
        ]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    first = bench("clip or adamw", "--update-baseline")
    assert first.returncode == 0
    assert "s] optimizer[adamw]: " in first.stdout, "no progress is shown"
    assert bench("adamw", "--extend-baseline").returncode == 0
    (path,) = (tmp_path / "baselines").glob("*.json")
    document = json.loads(path.read_text())
    assert document["environment"]["commit"]
    counts = {name: len(entry["processes"]) for name, entry in document["subjects"].items()}
    assert counts == {"optimizer[adamw]": 2, "optimizer[clip]": 1}
    # A baseline ten times faster than this code can be, and one that it easily meets.
    for name, factor in (("optimizer[clip]", 0.1), ("optimizer[adamw]", 10.0)):
        entry = document["subjects"][name]
        entry["processes"] = [[factor * statistics.median(entry["processes"][0])]]
    path.write_text(json.dumps(document))
    result = bench("clip or adamw or ema")
    assert result.returncode == 1
    assert "2 failed, 1 passed" in result.stdout
    assert "slower than its baseline: optimizer[clip]" in result.stdout
    assert "optimizer[ema]: no baseline" in result.stdout
    assert "python -m bench.baseline" in result.stdout
    assert len(list((tmp_path / "runs").glob("*.json"))) >= 1


def test_a_baseline_comes_from_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench.baseline` replaces with the first process, extends with the others, and tells of
    failures without giving up."""
    calls: list[list[str]] = []
    statuses = iter([0, 1, 0, 0])

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        calls.append(command)
        return subprocess.CompletedProcess(command, next(statuses))

    monkeypatch.setattr(subprocess, "run", run)
    assert make_baseline(["--processes", "3", "--budget-s", "0.1", "--subjects", "clip"]) == 1
    assert ["--update-baseline" in call for call in calls] == [True, False, False]
    assert ["--extend-baseline" in call for call in calls] == [False, True, True]
    assert all("--budget-s=0.1" in call and "clip" in call for call in calls)
    calls.clear()
    assert make_baseline(["--processes", "1", "--extend"]) == 0
    assert "--extend-baseline" in calls[0]
    calls.clear()
    assert make_baseline(["--processes", "0"]) == 2
    assert calls == []


def test_the_kernel_table_takes_the_best_of_each_kind() -> None:
    """The kernel table has each kind's fastest variant, a layer and eleven, and whole steps."""
    names = {
        "eager": 0.6,
        "triton published": 0.5,
        "triton 128x128": 0.45,
        "cutlass dpre_pingpong_a n1": 0.4,
        "cutlass dpre_pingpong_b n1": 0.3,
    }
    kernels = {"backward": {"ms": {name: {"median_ms": ms} for name, ms in names.items()}}}
    baseline = {"subjects": {"micro_step[cutlass]": {"subject_ms": 70.04}}}
    lines = table(kernels, baseline).splitlines()
    assert "| CUTLASS ping-pong, best | 0.300 | 3.30 | 0.50 | 70.0 |" in lines
    assert "| Triton, published tiles | 0.500 | 5.50 | 0.83 | - |" in lines
    assert "| Triton, best | 0.450 | 4.95 | 0.75 | - |" in lines
    assert "| CUTLASS cooperative, best | - | - | - | - |" in lines
