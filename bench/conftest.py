"""What every bench shares: scale, gate, and pytest-benchmark's table fed by our stopwatch."""

import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import gate
from bench.measure import Case, Measurement, measure, warm_up
from bench.scale import Scale, current
from trainer import environment, files

BASELINE_MEASUREMENTS = 4
"""Of each subject in one process. More would narrow what is known of the noise inside a process,
but the noise between processes is larger."""
FEWEST_MEASUREMENTS = 2
LONGEST_BUDGETS = 10.0
"""A subject whose measurements took so many budgets gets no further ones: GPTQ takes seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gate")
    group.addoption(
        "--update-baseline",
        action="store_true",
        help="write this machine's baseline instead of comparing with it, from this process alone "
        "(python -m bench.baseline makes one from several)",
    )
    group.addoption(
        "--extend-baseline",
        action="store_true",
        help="add this process to this machine's baseline: noise between processes counts too",
    )
    group.addoption(
        "--budget-s",
        type=float,
        default=1.0,
        help="seconds of one measurement of one subject (at least two rounds are made)",
    )


class ReplayClock:
    """A clock that shows measured times again, so that pytest-benchmark reports device times."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


CLOCK = ReplayClock()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


class Session:
    """Baseline of this machine, and everything measured in this run."""

    def __init__(self, config: pytest.Config) -> None:
        self.environment = environment.describe()
        self.path = gate.BASELINES / f"{gate.machine_class(self.environment)}.json"
        self.baselines = gate.load(self.path)
        self.update = bool(config.getoption("--update-baseline"))
        self.extend = bool(config.getoption("--extend-baseline"))
        self.budget_s = float(config.getoption("--budget-s") or 0)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        self.stored = gate.RUNS / f"{now}.json"
        self.measured: dict[str, list[Measurement]] = {}
        self.lines: list[str] = []
        self.started = time.monotonic()
        self.capture = config.pluginmanager.get_plugin("capturemanager")

    @property
    def writes(self) -> bool:
        """A baseline is being made."""
        return self.update or self.extend

    def run(self, name: str, case: Case) -> tuple[gate.Verdict, list[Measurement]]:
        once: Callable[[], Measurement] = lambda: measure(case, self.budget_s)  # noqa: E731
        warm_up(case)
        if self.writes:
            made = self._baseline_measurements(once)
            verdict = gate.Verdict(True, f"{name}: {made[0].ratio:.4f} x {made[0].reference}")
        else:
            where = f"bench/baselines/{self.path.name}"
            verdict, made = gate.judge(name, self.baselines.get(name), once, where)
        self.measured[name] = made
        self.lines.append(verdict.message)
        self._store(name, made)
        self._say(verdict.message)
        return verdict, made

    def _say(self, message: str) -> None:
        """Progress, past pytest's capture and on a line of its own: pytest is amid another."""
        assert self.capture is not None
        with self.capture.global_and_fixture_disabled():
            print(f"\n[{time.monotonic() - self.started:.0f} s] {message}", flush=True)

    def _baseline_measurements(self, once: Callable[[], Measurement]) -> list[Measurement]:
        started = time.monotonic()
        made: list[Measurement] = []
        while len(made) < BASELINE_MEASUREMENTS:
            made.append(once())
            tired = time.monotonic() - started > LONGEST_BUDGETS * self.budget_s
            if tired and len(made) >= FEWEST_MEASUREMENTS:
                break
        return made

    def _store(self, name: str, made: list[Measurement]) -> None:
        """Write what is measured so far: a run that is cut short keeps it."""
        files.write_json(self.stored, gate.document(self.environment, self.measured))
        if self.writes:
            latest = gate.document(self.environment, {name: made})
            old = json.loads(self.path.read_text()) if self.path.exists() else None
            files.write_json(self.path, gate.merged(old, latest, extend=self.extend))


SESSION = pytest.StashKey[Session]()


@pytest.fixture(scope="session")
def bench_session(request: pytest.FixtureRequest) -> Session:
    session = Session(request.config)
    request.config.stash[SESSION] = session
    return session


@pytest.fixture(scope="session")
def scale() -> Scale:
    return current()


@pytest.fixture
def timed(
    request: pytest.FixtureRequest, bench_session: Session, benchmark: BenchmarkFixture
) -> Iterator[Callable[[Case], None]]:
    """Measure a case, report it, and fail if the gate says so."""

    def run(case: Case) -> None:
        name = request.node.name.removeprefix("test_")
        try:
            verdict, made = bench_session.run(name, case)
        finally:
            case.close()
        best = min(made, key=lambda m: m.ratio)
        _replay(benchmark, best)
        if not verdict.passed:
            pytest.fail(verdict.message, pytrace=False)

    yield run
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _replay(benchmark: BenchmarkFixture, measured: Measurement) -> None:
    """Hand the stopwatch's times to pytest-benchmark, through the timer it lets us choose."""
    times_s = iter([t / 1000 for t in measured.subject_times_ms])

    def advance() -> None:
        CLOCK.now_s += next(times_s)

    details: dict[str, Any] = {
        "ratio": measured.ratio,
        "reference": measured.reference,
        "reference_ms": measured.reference_ms,
        **measured.details,
    }
    benchmark.extra_info.update(details)
    benchmark.pedantic(advance, rounds=len(measured.subject_times_ms), iterations=1)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is None:
        return
    terminalreporter.section(f"gate: {session.path.stem}")
    if session.writes:
        written = gate.load(session.path)
        for name in session.measured:
            terminalreporter.write_line(gate.describe(name, written[name]))
        terminalreporter.write_line(f"baseline written: bench/baselines/{session.path.name}")
    else:
        for line in session.lines:
            terminalreporter.write_line(line)
    sys.stdout.flush()
