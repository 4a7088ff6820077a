"""The published kernel table from stored figures: backward product of the MLP, layer and step.

    python -m bench.kernel_table --kernels FILE --baseline FILE

FILE: what `python -m bench.mlp_kernels` and `pytest bench --update-baseline` wrote on one machine.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from trainer.config import ModelConfig

LAYERS = ModelConfig.layers
ROWS = {
    "unfused (cuBLAS, then a multiply)": ("eager", "reference"),
    "torch.compile": ("torch.compile", None),
    "Triton, published tiles": ("triton published", None),
    "Triton, best": ("triton ", "triton"),
    "CUTLASS cooperative, best": ("cutlass dpre_cooperative", None),
    "CUTLASS ping-pong, best": ("cutlass dpre_pingpong", "cutlass"),
}
"""Row -> start of the subject's name in the kernels' file, and the backend of its micro-step."""


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.kernel_table`."""

    kernels: Path
    """JSON of `python -m bench.mlp_kernels`."""
    baseline: Path
    """JSON of the machine's baseline, for whole micro-steps."""


def table(kernels: dict[str, Any], baseline: dict[str, Any]) -> str:
    """The table in Markdown; a figure that was not measured is a dash."""
    ms = {name: t["median_ms"] for name, t in kernels["backward"]["ms"].items()}
    unfused = ms["eager"]
    lines = [
        f"| backward | ms a layer | ms x {LAYERS} | of unfused | micro-step ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row, (start, backend) in ROWS.items():
        found = [t for name, t in ms.items() if name.startswith(start)]
        step = baseline["subjects"].get(f"micro_step[{backend}]", {}).get("subject_ms")
        whole = "-" if step is None else f"{step:.1f}"
        if not found:
            lines.append(f"| {row} | - | - | - | {whole} |")
            continue
        best = min(found)
        lines.append(
            f"| {row} | {best:.3f} | {LAYERS * best:.2f} | {best / unfused:.2f} | {whole} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    kernels, baseline = (json.loads(p.read_text()) for p in (arguments.kernels, arguments.baseline))
    print(table(kernels, baseline))
    return 0


if __name__ == "__main__":
    sys.exit(main())
