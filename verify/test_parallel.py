"""Claims about ranks, with real processes: any world size trains the same model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from verify.test_resume import SETTINGS
from verify.tolerance import check, relative_error, unit_roundoff

ROOT = Path(__file__).resolve().parents[1]

WORKER = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from trainer.config import OptimConfig
from trainer.optim import Optimizer
from trainer.ranks import setup
from verify.models import TINY
from verify.test_training import numpy_model

out, steps, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with setup("cpu") as ranks:
    model = numpy_model(TINY, 1)
    optimizer = Optimizer(model, OptimConfig(), torch.float32)
    first = 0
    if resume != "none":
        saved = load_file(resume)
        model.load_state_dict({k[6:]: v for k, v in saved.items() if k.startswith("model.")})
        optimizer.load_state_dict({k[6:]: v for k, v in saved.items() if k.startswith("optim.")})
        first = int(saved["steps"])
    micro_steps = 8 // ranks.world_size
    for step in range(first, first + steps):
        windows = torch.randint(0, 64, (8, 25), generator=torch.Generator().manual_seed(step))
        for row in windows[ranks.rank :: ranks.world_size]:
            loss = model.loss(row[None, :-1], row[None, 1:]) / micro_steps
            loss.backward()
        optimizer.step(1.0, 0.9)
        optimizer.zero_grad()
    optim = {f"optim.{k}": v.contiguous() for k, v in optimizer.state_dict().items()}
    weights = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    steps_done = {"steps": torch.tensor(first + steps)}
    save_file({**weights, **optim, **steps_done}, str(out / f"rank{ranks.rank}.safetensors"))
"""


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def _torchrun(ranks: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}", *arguments]


def _train(folder: Path, ranks: int, steps: int, resume: str = "none") -> Path:
    """Run the worker with `ranks` processes; returns the folder of what each rank saved."""
    out = folder / f"{ranks}-{steps}-{Path(resume).parent.name}"
    out.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    subprocess.run(
        _torchrun(ranks, str(script), str(out), str(steps), resume),
        cwd=ROOT, env=_environment(), check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    return out


def _drift(reference: dict[str, torch.Tensor], other: dict[str, torch.Tensor], steps: int) -> None:
    """Weights agree to what differently ordered sums may cause.

    Ranks add gradients in another order: one rounding each, amplified by five quintic steps
    (3.4445^5) and moved into the weights by the learning rate at every step.
    """
    for name in (n for n in reference if n.startswith("model.")):
        allowed = steps * 3.4445**5 * 0.035 * 64 * unit_roundoff(torch.float32)
        check(name, relative_error(other[name], reference[name]), allowed)


def test_any_world_size_gives_the_single_rank_weights(tmp_path: Path) -> None:
    """2 and 4 real ranks end at the single rank's weights, and agree with each other exactly.

    The banks hold 10, 10, 5 and 5 matrices: neither 2 nor 4 ranks divide them all.
    """
    single = load_file(_train(tmp_path, 1, 4) / "rank0.safetensors")
    for ranks in (2, 4):
        out = _train(tmp_path, ranks, 4)
        states = [load_file(out / f"rank{r}.safetensors") for r in range(ranks)]
        for other in states[1:]:
            for name in (n for n in single if n.startswith("model.")):
                assert torch.equal(states[0][name], other[name]), f"ranks disagree on {name}"
        _drift(single, states[0], 4)


def test_optimizer_state_moves_between_world_sizes(tmp_path: Path) -> None:
    """State saved by 4 ranks continues on 1, and state saved by 1 on 2, as if nothing changed."""
    whole = load_file(_train(tmp_path, 1, 4) / "rank0.safetensors")
    for before, after in ((4, 1), (1, 2)):
        half = _train(tmp_path, before, 2)
        resumed = _train(tmp_path, after, 2, str(half / "rank0.safetensors"))
        _drift(whole, load_file(resumed / "rank0.safetensors"), 4)


def test_two_ranks_run_the_whole_record(tmp_path: Path) -> None:
    """The whole pipeline runs on two ranks and scores like one rank."""
    one = [sys.executable, "-m", "trainer", *SETTINGS, f"--out={tmp_path}", "--name=one"]
    two = _torchrun(2, "-m", "trainer", *SETTINGS, f"--out={tmp_path}", "--name=two")
    for command in (one, two):
        subprocess.run(
            command, cwd=ROOT, env=_environment(), check=True, timeout=240, capture_output=True
        )
    scores = [
        json.loads((tmp_path / name / "stages" / "post_ema.json").read_text())["nats"]
        for name in ("one", "two")
    ]
    allowed = 24 * 3.4445**5 * 0.035 * 64 * unit_roundoff(torch.float32)
    check("held-out loss of two ranks", abs(scores[0] - scores[1]) / scores[0], allowed)
    assert (tmp_path / "two" / "report.md").exists()


def test_a_world_size_that_does_not_divide_eight_is_refused(tmp_path: Path) -> None:
    """Three ranks are refused with a sentence that names the allowed numbers."""
    result = subprocess.run(
        _torchrun(3, "-m", "trainer", *SETTINGS, f"--out={tmp_path}"),
        cwd=ROOT, env=_environment(), check=False, timeout=120, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert "1, 2, 4 or 8" in result.stderr


STUCK = """
import os, signal, sys, threading
from trainer import ranks
from trainer.errors import RunError

ranks.LOST_GRACE_S, ranks.LEAVING_GRACE_S = 2, 2
how = sys.argv[1]
with ranks.setup("cpu") as group:
    group.wait_for_all()
    if group.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), 9)
        raise RunError("rank 1 has run out of disk")
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    threading.Event().wait()  # as a host waits for an NCCL kernel whose peer is gone
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [("killed", "rank 0 lost a peer"), ("raises", "rank 0: another rank has stopped")],
)
def test_a_rank_that_hangs_without_its_peer_is_ended(
    tmp_path: Path, how: str, message: str
) -> None:
    """A rank stuck in a collective, deaf to SIGTERM, says why and ends well before torchrun's 30 s.

    NCCL's kernels wait for a dead peer for ever; a wait that nothing ends stands for them here.
    """
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    started = time.monotonic()
    result = subprocess.run(
        _torchrun(2, str(script), how),
        cwd=ROOT, env=_environment(), check=False, timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert message in result.stderr
    assert time.monotonic() - started < 25
