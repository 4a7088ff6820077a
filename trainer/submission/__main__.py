"""A submission folder from finished runs: `python -m trainer.submission`.

    python -m trainer.submission --runs runs/A runs/B runs/C --out FOLDER

Writes README.md, submission.json, a log per seed, requirements.txt and train_gpt.py: one script
that trains, quantizes, compresses and scores with nothing but third-party packages installed.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from trainer import files
from trainer.config import SIZE_LIMIT_BYTES, SlotMode
from trainer.errors import ArtifactError, ConfigError, FairwayError
from trainer.progress import log
from trainer.submission import contents, pack
from trainer.submission.contents import Submission
from trainer.submission.readme import readme
from trainer.submission.runs import FinishedRun, load_runs


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m trainer.submission`."""

    runs: tuple[Path, ...]
    """Run folders, one a seed, all finished."""
    out: Path
    """Folder to write; new or empty."""
    mode: SlotMode | None = None
    """SLOT mode of the headline score; none: `context` if the runs have it, else `off`."""
    author: str = "Fairway"
    """Author, for submission.json."""
    github_id: str = ""
    """GitHub account of the author."""
    name: str = "Fairway"
    """Title of the submission."""


def main(argv: list[str] | None = None) -> int:
    """Write the folder; returns the exit status."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    try:
        _main(arguments)
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _main(arguments: Arguments) -> None:
    runs, found = load_runs(arguments.runs)
    mode = _headline_mode(runs, arguments.mode)
    out = arguments.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} is no empty folder: choose a new --out, or empty it")
    log("packing train_gpt.py")
    submission = Submission(
        runs,
        found,
        mode,
        pack.packed_script(),
        arguments.author,
        arguments.github_id,
        arguments.name,
    )
    write(submission, out)
    log(f"{out}: {submission.blurb}")
    log(f"train_gpt.py: {submission.bytes_code:,} bytes")
    if not submission.same_code:
        log("warning: the runs counted code of another size: they were made by other sources")
    if not submission.github_id:
        log("submission.json still wants a --github-id")


def write(submission: Submission, out: Path) -> None:
    """Write every file of `submission` to the folder `out`.

    Raises:
        ArtifactError: an artifact and the script are too large together.
        RunError: the folder cannot be written.
    """
    for run in submission.runs:
        total = submission.bytes_total(run)
        if total > SIZE_LIMIT_BYTES:
            raise ArtifactError(
                f"{run.folder.artifact} and train_gpt.py are {total:,} bytes together, over "
                f"{SIZE_LIMIT_BYTES:,}: compress the run again with the present code (delete "
                f"{run.folder.path}/stages/artifact.json and later ones, then --resume it)"
            )
    texts = {
        "README.md": readme(submission),
        "requirements.txt": contents.requirements(submission.runs[0]),
        "submission.json": json.dumps(contents.submission_json(submission), indent=2) + "\n",
        **{f"train_seed{run.seed}.log": contents.log_text(run) for run in submission.runs},
    }
    files.write_bytes(out / "train_gpt.py", submission.script)
    for name, text in texts.items():
        files.write_text(out / name, text)


def _headline_mode(runs: list[FinishedRun], asked: SlotMode | None) -> SlotMode:
    mode = asked or ("context" if "context" in runs[0].modes else "off")
    if mode not in runs[0].modes:
        raise ConfigError(
            f"the runs have no score with SLOT {mode}; choose --mode from "
            f"{', '.join(runs[0].modes)}"
        )
    return mode


if __name__ == "__main__":
    sys.exit(main())
