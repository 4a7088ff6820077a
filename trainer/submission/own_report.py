"""What stands for `trainer.report` inside the packed script: reports are left to the repository."""

from trainer import files
from trainer.config import RunConfig
from trainer.folder import RunFolder


def write_report(folder: RunFolder, config: RunConfig) -> None:
    """Write a report.md that says how to get the whole one. Raises RunError."""
    files.write_text(
        folder.report,
        f"# {folder.path.name}\n\nThe packed script writes no report. The repository does, from "
        f"the same results: `python -m trainer --resume {folder.path}`\n",
    )
