"""What every bench shares: scale, gate, and pytest-benchmark's table fed by our stopwatch."""

import datetime
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import gate
from bench.measure import Case, Measurement, measure, warm_up
from bench.scale import Scale, current
from trainer import environment, files

BASELINE_MEASUREMENTS = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gate")
    group.addoption(
        "--update-baseline",
        action="store_true",
        help="write this machine's baseline instead of comparing with it",
    )
    group.addoption(
        "--extend-baseline",
        action="store_true",
        help="add measurements to this machine's baseline, so that noise between runs counts too",
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

    def run(self, name: str, case: Case) -> tuple[gate.Verdict, list[Measurement]]:
        once: Callable[[], Measurement] = lambda: measure(case, self.budget_s)  # noqa: E731
        warm_up(case)
        if self.update or self.extend:
            made = [once() for _ in range(BASELINE_MEASUREMENTS)]
            margin = gate.Baseline(made[0].reference, tuple(m.ratio for m in made)).margin
            noisy = ", noisy: extend it on a quieter machine" if margin > gate.NOISY_MARGIN else ""
            verdict = gate.Verdict(True, f"{name}: margin {margin:.1%}{noisy}")
        else:
            where = f"bench/baselines/{self.path.name}"
            verdict, made = gate.judge(name, self.baselines.get(name), once, where)
        self.measured[name] = made
        self.lines.append(verdict.message)
        self._store(name, made)
        return verdict, made

    def _store(self, name: str, made: list[Measurement]) -> None:
        """Write what is measured so far: a run that is cut short keeps it."""
        files.write_json(self.stored, gate.document(self.environment, self.measured))
        if self.update or self.extend:
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
    for line in session.lines:
        terminalreporter.write_line(line)
    if session.update or session.extend:
        terminalreporter.write_line(f"baseline written: bench/baselines/{session.path.name}")
    sys.stdout.flush()
