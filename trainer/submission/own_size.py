"""What stands for `trainer.codesize` inside the packed script, which needs no packer."""

from pathlib import Path

SCRIPT = Path("train_gpt.py")
"""The running script; its start says where it lies."""


def code_bytes() -> int:
    """Size of the packed script in bytes."""
    return SCRIPT.stat().st_size
