"""`python -m trainer`: the whole record, from data to report.

python -m trainer                       the record on a CUDA machine, else the smoke preset
python -m trainer smoke --seed 7        a preset with overrides; `smoke --help` lists them all
python -m trainer --resume runs/NAME    continue a stopped run; --bits measured if it does not fit
torchrun --nproc-per-node 8 -m trainer  the record on 8 GPUs
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from trainer import ranks
from trainer.config import BitScheme, RunConfig
from trainer.errors import FairwayError
from trainer.folder import RunFolder
from trainer.progress import log
from trainer.record import PRESETS
from trainer.run import preflight, run
from trainer.train import Interrupted


@dataclass(frozen=True)
class Resume:
    """Continue a stopped run with the settings it was started with."""

    resume: Path
    """Run folder."""
    bits: BitScheme | None = None
    """Allocate bits another way than the run was told to; only while it has no artifact yet."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn expected errors into one line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _main(arguments)
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"{stop}; a checkpoint is written", file=sys.stderr)
        return 128 + stop.signal


def _main(arguments: list[str]) -> int:
    resume: Resume | None = None
    if any(a == "--resume" or a.startswith("--resume=") for a in arguments):
        resume = tyro.cli(Resume, args=arguments)
        preset = ""
        folder, config = RunFolder.open(resume.resume)
        if resume.bits is not None:
            config = folder.with_bits(config, resume.bits)
    else:
        folder = None
        preset, config = parse(arguments)
    preflight(config)
    with ranks.setup(config.device) as group:
        if folder is None:
            folder = _create(config, preset, group)
        elif resume is not None and resume.bits is not None:
            if group.rank == 0:
                folder.quantize_anew(config)
            group.wait_for_all()
        log(f"run folder: {folder.path}")
        run(config, folder, group)
    return 0


def parse(arguments: list[str]) -> tuple[str, RunConfig]:
    """Preset name and settings; without a preset, `record` where there is CUDA, else `smoke`.

    tyro ends the process with status 2 and a message on an unknown override.
    """
    if not arguments or (arguments[0] not in PRESETS and arguments[0] not in ("-h", "--help")):
        default = "record" if torch.cuda.is_available() else "smoke"
        log(f"preset: {default}")
        arguments = [default, *arguments]
    config = tyro.extras.overridable_config_cli(
        PRESETS, args=arguments, prog="python -m trainer", description=__doc__
    )
    return arguments[0], config


def _create(config: RunConfig, preset: str, group: ranks.Ranks) -> RunFolder:
    """New run folder, made by rank 0 and known to all."""
    path = str(RunFolder.create(config, preset).path) if group.rank == 0 else ""
    return RunFolder(Path(group.broadcast_text(path)))


if __name__ == "__main__":
    sys.exit(main())
