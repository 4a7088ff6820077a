"""Shared pytest set-up: hypothesis profiles, markers of what a test needs, one seed for every test.

Choose a profile with `pytest verify --hypothesis-profile=fast|default|long`.
"""

import os
import shutil

# Before torch is imported: two-core machines lose time to oversubscription.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from hypothesis import HealthCheck, settings

from kernels import flash4_package

pytest_plugins = ["verify.proof_sheet"]

_COMMON = {
    "deadline": None,  # speed is judged in bench, never by a test
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("fast", max_examples=10, derandomize=True, **_COMMON)
settings.register_profile("default", max_examples=40, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=500, **_COMMON)
settings.load_profile("default")


def _missing(marker: str) -> str | None:
    """Why tests with this marker cannot run here; None when they can."""
    if marker == "nvcc":
        return None if shutil.which("nvcc") else "needs nvcc (the CUDA compiler) on PATH"
    if not torch.cuda.is_available():
        return "needs a CUDA GPU; torch.cuda.is_available() is False"
    if marker == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        return f"needs a Hopper GPU; this is {torch.cuda.get_device_name()}"
    if marker == "flash4":
        try:
            flash4_package.versions()
        except RuntimeError as error:
            return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    for marker in ("gpu", "hopper", "flash4", "nvcc"):
        reason = _missing(marker)
        if reason is None:
            continue
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(1337)
