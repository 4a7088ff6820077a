"""The proof sheet: what each check claims, how it was checked, how close it came to failing.

A pytest plugin. `pytest verify --report PROOF.md` writes the sheet; without the option it only
adds the claim to the message of a failing check.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from trainer import environment, files
from verify import tolerance


@dataclass
class Entry:
    """What is known of one check."""

    nodeid: str
    claim: str
    generated: bool
    cases: int = 0
    outcome: str = "not run"
    reason: str = ""
    seconds: float = 0.0
    variants: int = 1
    """Parameter sets of the test that this entry stands for."""
    worst: tuple[float, str, float, float] | None = None
    """Largest error/allowed, with what was measured, the error and the allowed error."""

    def measured(self, what: str, error: float, allowed: float) -> None:
        """Note a numeric comparison; the one closest to its limit is kept."""
        share = error / allowed if allowed else float(error > 0)
        if self.worst is None or not share <= self.worst[0]:
            self.worst = (share, what, error, allowed)


@dataclass
class Sheet:
    """All entries of a session, and the check that is running."""

    entries: dict[str, Entry] = field(default_factory=dict)
    running: Entry | None = None
    started: float = field(default_factory=time.perf_counter)

    def listen(self, what: str, error: float, allowed: float) -> None:
        """Receive a comparison from verify.tolerance."""
        if self.running is not None:
            self.running.measured(what, error, allowed)

    def counted(self, test: Callable[..., Any]) -> Callable[..., Any]:
        """`test`, counting each generated case for the check that is running."""

        @wraps(test)
        def count(*args: Any, **kwargs: Any) -> Any:
            if self.running is not None:
                self.running.cases += 1
            return test(*args, **kwargs)

        return count


SHEET = pytest.StashKey[Sheet]()


def claim_of(item: pytest.Item) -> str:
    """First sentence of the test's docstring; the test's name when it has none."""
    text = getattr(getattr(item, "obj", None), "__doc__", None) or item.name
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --report."""
    parser.getgroup("fairway").addoption(
        "--report", type=Path, metavar="FILE", help="write the proof sheet (Markdown) to FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start a sheet and listen to every numeric comparison."""
    config.stash[SHEET] = Sheet()
    tolerance.listeners.append(config.stash[SHEET].listen)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop listening."""
    tolerance.listeners.remove(config.stash[SHEET].listen)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Enter every check, and count the cases hypothesis generates."""
    sheet = config.stash[SHEET]
    wrapped: set[int] = set()
    for item in items:
        handle = getattr(getattr(item, "obj", None), "hypothesis", None)
        sheet.entries[item.nodeid] = Entry(item.nodeid, claim_of(item), handle is not None)
        if handle is not None and id(handle) not in wrapped:
            wrapped.add(id(handle))
            handle.inner_test = sheet.counted(handle.inner_test)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Know which check is running."""
    sheet = item.config.stash[SHEET]
    sheet.running = sheet.entries.get(item.nodeid)
    yield
    sheet.running = None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Note the outcome; show the claim that failed."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()  # pyright: ignore[reportAttributeAccessIssue]
    entry = item.config.stash[SHEET].entries.get(item.nodeid)
    if entry is None:
        return
    entry.seconds += report.duration
    if report.failed:
        report.sections.insert(0, ("Claim that does not hold", entry.claim))
    if report.when == "call" or report.failed or report.skipped:
        expected = hasattr(report, "wasxfail")
        entry.outcome = "expected failure" if expected and report.skipped else report.outcome
        if expected:
            entry.reason = report.wasxfail
        elif report.skipped and isinstance(report.longrepr, tuple):
            entry.reason = report.longrepr[2].removeprefix("Skipped: ")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the sheet if it was asked for."""
    path = session.config.getoption("--report")
    if path is not None:
        files.write_text(Path(path), render(session.config.stash[SHEET]))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say where the sheet is."""
    path = config.getoption("--report")
    if path is not None:
        terminalreporter.write_line(f"proof sheet: {path}")


def render(sheet: Sheet) -> str:
    """The sheet as Markdown: failures first, then proofs, then what was not run and why."""
    where = environment.describe()
    entries = list(sheet.entries.values())
    by_outcome = {name: [e for e in entries if e.outcome == name] for name in _ORDER}
    counts = ", ".join(f"{len(found)} {name}" for name, found in by_outcome.items() if found)
    cases = sum(max(e.cases, 1) for e in entries if e.outcome == "passed")
    packages = where["packages"]
    lines = [
        "# Proof sheet",
        "",
        f"{counts}; {cases:,} cases tried in {time.perf_counter() - sheet.started:.0f} s.",
        f"Device: {where['device']} ({where['cpu']}, {where['cores']} cores). "
        f"torch {packages['torch']}, triton {packages['triton']}, Python {where['python']}, "
        f"commit `{where['commit']}`.",
        "",
        "Worst error is the comparison that came closest to its limit; limits are derived in "
        "`verify/tolerance.py`. Exact means compared without tolerance.",
    ]
    for name in _ORDER:
        if by_outcome[name]:
            lines += ["", f"## {name.capitalize()}", "", *_table(name, by_outcome[name])]
    return "\n".join(lines) + "\n"


_ORDER = ("failed", "passed", "expected failure", "skipped")
"""Outcomes in the order they are shown; checks that were deselected are not."""


def _table(outcome: str, entries: list[Entry]) -> list[str]:
    entries = merged(entries)
    if outcome in ("skipped", "expected failure"):
        head = ["| claim | check | reason |", "| --- | --- | --- |"]
        return head + [f"| {_cell(e.claim)} | `{e.nodeid}` | {_cell(e.reason)} |" for e in entries]
    head = [
        "| claim | check | cases | worst error | allowed | s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return head + [_row(e) for e in entries]


def merged(entries: list[Entry]) -> list[Entry]:
    """One entry for all parameters of a test: cases and seconds add up, the worst error stays."""
    by_test: dict[str, Entry] = {}
    for e in entries:
        test = e.nodeid.split("[")[0]
        if test not in by_test:
            by_test[test] = replace(e, nodeid=test, cases=0, seconds=0.0, variants=0)
        whole = by_test[test]
        whole.variants += 1
        whole.cases += e.cases
        whole.seconds += e.seconds
        if e.worst is not None:
            whole.measured(*e.worst[1:])
    return list(by_test.values())


def _row(entry: Entry) -> str:
    cases = f"{entry.cases:,} generated" if entry.generated else "fixed"
    if entry.variants > 1:
        cases += f" over {entry.variants} variants"
    error, allowed = "exact", ""
    if entry.worst is not None:
        _, what, measured, limit = entry.worst
        error, allowed = f"{measured:.2e} ({_cell(what)})", f"{limit:.2e}"
    return (
        f"| {_cell(entry.claim)} | `{entry.nodeid}` | {cases} | {error} | {allowed} "
        f"| {entry.seconds:.2f} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
