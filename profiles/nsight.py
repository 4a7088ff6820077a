"""Nsight Compute through nsight-python, both generations behind one function.

0.9 starts the script again under `ncu`, up to the decorated function; 1.x attaches `ncu` to the
running process, from the moment nsight is imported. Both write an `.ncu-rep` file, which is read
kernel by kernel with `ncu_report`. To keep either from re-running a whole program, the profiled
code lives in a small script of its own, `profiles/nsight_target.py`.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "profiles" / "nsight_target.py"
TIMEOUT_S = 420
"""A step without the fused passes launches 1,048 kernels, each of them replayed: over 180 s."""

TIME = "gpu__time_duration.sum"
DRAM = "dram__bytes.sum"
TENSOR = tuple(
    f"{name}.avg.pct_of_peak_sustained_active"
    for name in ("sm__pipe_tensor_cycles_active", "sm__pipe_tensor_op_hmma_cycles_active")
)
"""Names differ between GPU generations; those that ncu lists are asked for."""

STEP_METRICS = (TIME, DRAM, *TENSOR)
"""Few enough for one pass: a step has over a thousand kernels."""

KERNEL_METRICS = (
    *STEP_METRICS,
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed_op_local_ld.sum",
    "smsp__inst_executed_op_local_st.sum",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block_dynamic",
    "launch__grid_size",
    "launch__block_size",
    *(
        f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
        for reason in (
            "long_scoreboard", "short_scoreboard", "barrier", "math_pipe_throttle", "wait",
            "mio_throttle", "lg_throttle", "gmma", "not_selected", "membar",
        )
    ),
)  # fmt: skip
"""Tensor pipe, DRAM, L2, occupancy, local memory (spills), launch, and stall reasons."""


@dataclass(frozen=True)
class Row:
    """One kernel launch as Nsight Compute saw it, replayed alone."""

    name: str
    values: dict[str, float]


def unusable() -> str | None:
    """Why Nsight Compute cannot be used here; None if it can."""
    if shutil.which("ncu") is None:
        return "ncu (Nsight Compute) is not on PATH"
    for package, module in (("nsight-python", "nsight"), ("ncu-report", "ncu_report")):
        if _version(package) is None and not _importable(module):
            return f"{package} is not installed"
    return None


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> str:
    """The tools' versions, for the profile's label."""
    output = subprocess.run(["ncu", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"Version (\S+)", output.stdout)
    ncu = found.group(1) if found else "?"
    return f"nsight-python {_version('nsight-python') or '?'}, Nsight Compute {ncu}"


def collect(target: dict[str, Any], metrics: tuple[str, ...]) -> list[Row]:
    """Run `nsight_target.py` under Nsight Compute; its kernels in launch order.

    Args:
        target: what to run, as `nsight_target.py` takes it.
        metrics: those this ncu does not know are left out.

    Raises:
        RunError: ncu failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="fairway-nsight-") as folder:
        request = {
            **target,
            "metrics": _known(metrics),
            "prefix": f"{folder}/",
        }
        environment = {
            **os.environ,
            "PYTHONPATH": _path(),
            # Else the script's folder comes first, and its modules hide packages of their names.
            "PYTHONSAFEPATH": "1",
            "FAIRWAY_NSIGHT": json.dumps(request),
        }
        status, output = _run([sys.executable, str(TARGET)], environment)
        reports = sorted(Path(folder).glob("*.ncu-rep"))
        if not reports:
            logs = "".join(p.read_text(errors="replace") for p in Path(folder).glob("*.log"))
            tail = (output + logs)[-1500:]
            raise RunError(f"Nsight Compute wrote no report (exit {status}): {tail}")
        return read_report(reports[-1], metrics)


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output; ncu and what it started end with it. Raises RunError."""
    with subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise RunError(f"Nsight Compute took longer than {TIMEOUT_S} s") from error
    return process.returncode, output


def _path() -> str:
    return os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)


def _known(metrics: tuple[str, ...]) -> list[str]:
    """Those of `metrics` that this ncu lists for this GPU; an unknown one would end it."""
    listed = subprocess.run(["ncu", "--query-metrics"], capture_output=True, text=True, check=False)
    names = set(re.findall(r"^(\w+__\w+)", listed.stdout, re.MULTILINE))
    return [m for m in metrics if m.startswith("launch__") or m.split(".")[0] in names or m == TIME]


def read_report(path: Path, metrics: tuple[str, ...]) -> list[Row]:
    """Every kernel of a report, in launch order; metrics that are missing are left out."""
    import ncu_report  # pyright: ignore[reportMissingImports]

    report = ncu_report.load_report(str(path))
    rows: list[Row] = []
    for r in range(report.num_ranges()):
        actions = report.range_by_idx(r)
        for i in range(actions.num_actions()):
            action = actions.action_by_idx(i)
            found = {m: action.metric_by_name(m) for m in metrics}
            values = {m: float(v.as_double()) for m, v in found.items() if v is not None}
            rows.append(Row(action.name(), values))
    return rows


def short_name(name: str) -> str:
    """A kernel's bare name, mangled or not: no return type, namespace, template or parameters."""
    if name.startswith("_Z"):
        return _mangled_name(name)
    without_lists = re.split(r"[<(]", name.replace("(anonymous namespace)::", ""))[0]
    return without_lists.split("::")[-1].split(" ")[-1]


def _mangled_name(name: str) -> str:
    """Bare name of a symbol mangled by the Itanium C++ ABI: last of its leading lengths and ids."""
    found, at = name, 3 if name.startswith("_ZN") else 2
    while digits := re.match(r"\d+", name[at:]):
        at += digits.end()
        found = name[at : at + int(digits.group())]
        at += len(found)
    return found


def by_component(rows: list[Row], kernels: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Nsight's rows summed by component.

    A kernel is looked up by its bare name and its place among the launches of that name.

    Args:
        rows: in launch order.
        kernels: (name, component) of a step's launches, in order, from the PyTorch profiler.
    """
    queues: dict[str, list[str]] = defaultdict(list)
    for name, component in kernels:
        queues[short_name(name)].append(component)
    taken: dict[str, int] = defaultdict(int)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in rows:
        name = short_name(row.name)
        queue = queues.get(name, ["unattributed"])
        component = queue[min(taken[name], len(queue) - 1)]
        taken[name] += 1
        time_ms = row.values.get(TIME, 0.0) / 1e6
        total = sums[component]
        total[0] += time_ms
        total[1] += row.values.get(DRAM, 0.0)
        total[2] += time_ms * max(row.values.get(name, 0.0) for name in TENSOR)
    return [
        {
            "component": name,
            "time_ms": ms,
            "dram_gbytes": dram / ms / 1e6 if ms else 0.0,
            "tensor_pct": tensor / ms if ms else 0.0,
        }
        for name, (ms, dram, tensor) in sorted(sums.items(), key=lambda x: -x[1][0])
    ]
