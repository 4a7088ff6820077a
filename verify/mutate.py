"""Prove that the checks can fail: apply small faults one at a time, require a check to notice.

    python -m verify.mutate                  every fault, two at a time
    python -m verify.mutate --only muon      those whose file or description contains a word
    python -m verify.mutate --report FILE    also write the table (Markdown)

Each fault is applied to a copy of the source; the tree itself is never touched. A fault that no
check notices is a survivor, and makes the command fail.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from trainer import environment, files
from trainer.progress import track
from verify.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("trainer", "kernels", "bench", "profiles", "verify", "conftest.py", "pyproject.toml")


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m verify.mutate`."""

    only: str = ""
    """Run the faults whose file or description contains this."""
    jobs: int = 2
    """Faults tried at once."""
    report: Path | None = None
    """Write the table here, as Markdown."""


@dataclass(frozen=True)
class Verdict:
    """What happened to one fault."""

    fault: Fault
    noticed_by: str
    """The first failing check; empty for a survivor."""
    seconds: float


def apply(fault: Fault, root: Path) -> None:
    """Replace the one occurrence of `fault.old` under `root`.

    Raises:
        ValueError: the text occurs not at all or more than once, so the fault is stale.
    """
    path = root / fault.file
    source = path.read_text()
    if source.count(fault.old) != 1:
        raise ValueError(
            f"{fault.file}: the text of '{fault.what}' occurs {source.count(fault.old)} times, "
            "not once; bring verify/faults.py up to date"
        )
    path.write_text(source.replace(fault.old, fault.new))


def judge(fault: Fault) -> Verdict:
    """Run the checks named by `fault` against a copy of the source that carries it."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fairway-mutant-") as folder:
        root = Path(folder)
        _copy_sources(root)
        apply(fault, root)
        noticed_by = _first_failure(root, fault.checks)
    return Verdict(fault, noticed_by, time.perf_counter() - started)


def _copy_sources(root: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=ignore)
        else:
            shutil.copy(source, root / name)
    cache = ROOT / ".cache"
    if cache.exists():  # the embedded corpus and built libraries, so that no mutant rebuilds them
        (root / ".cache").symlink_to(cache)


def _first_failure(root: Path, checks: Iterable[str]) -> str:
    """First check that fails in `root`; empty when all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["-m", "not nvcc", "--timeout", "300", *checks]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    for line in result.stdout.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split(" ", 1)[1].split(" - ")[0]
    if result.returncode == 1:
        return "a check"
    raise RuntimeError(f"pytest could not run the checks:\n{result.stdout}\n{result.stderr}")


def table(verdicts: list[Verdict]) -> str:
    """The verdicts as Markdown, survivors first."""
    ordered = sorted(verdicts, key=lambda v: bool(v.noticed_by))
    survivors = sum(not v.noticed_by for v in verdicts)
    lines = [
        "# Faults and the checks that notice them",
        "",
        f"{len(verdicts)} faults, {survivors} survivors. Commit `{environment.commit()}`.",
        "",
        "| fault | file | noticed by | s |",
        "| --- | --- | --- | --- |",
    ]
    for verdict in ordered:
        noticed = f"`{verdict.noticed_by}`" if verdict.noticed_by else "**survived**"
        lines.append(
            f"| {verdict.fault.what} | `{verdict.fault.file}` | {noticed} | {verdict.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Judge the chosen faults; exit status 1 when one survives."""
    arguments = tyro.cli(Arguments, description=__doc__)
    chosen = [f for f in FAULTS if arguments.only in f"{f.file} {f.what}"]
    if not chosen:
        print(f"error: no fault matches '{arguments.only}'", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(arguments.jobs) as pool:
        verdicts = list(track(pool.map(judge, chosen), "faults", len(chosen)))
    text = table(verdicts)
    print(text)
    if arguments.report is not None:
        files.write_text(arguments.report, text)
    return int(any(not v.noticed_by for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
