"""Scripts under Triton's interpreter, each in a process of its own: it is chosen at import."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300


def run_interpreted(script: str, *arguments: str) -> None:
    """Run Python source with Triton's kernels interpreted on the CPU.

    Args:
        script: source text.
        arguments: its sys.argv[1:].

    Raises:
        AssertionError: it failed; the message is the end of its output.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
