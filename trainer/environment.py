"""What a figure was measured on: versions, device, commit."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch

PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "brotli", "safetensors", "flash-attn-4")
ROOT = Path(__file__).resolve().parents[1]


def describe(device: Literal["cuda", "cpu"] = "cuda") -> dict[str, Any]:
    """JSON-able description of this machine and this source tree, without host or user names.

    Args:
        device: what does the work. The name of a GPU that lies idle would mislead.
    """
    on_gpu = device == "cuda" and torch.cuda.is_available()
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "packages": versions,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "devices": torch.cuda.device_count(),
        "driver": _driver_version(),
        "commit": commit(),
        "command": " ".join(["python", "-m", *_module_command()]),
    }


def commit() -> str:
    """Hash of the checked-out commit, `+changes` behind it if files differ; or `unknown`.

    A copy of the tree without its .git folder can be told through FAIRWAY_COMMIT.
    """
    if told := os.environ.get("FAIRWAY_COMMIT"):
        return told
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return "unknown"
    return revision + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _module_command() -> list[str]:
    """Name of the running module, and its arguments."""
    spec = sys.modules["__main__"].__spec__
    module = Path(sys.argv[0]).stem if spec is None else spec.name.removesuffix(".__main__")
    return [module, *sys.argv[1:]]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
