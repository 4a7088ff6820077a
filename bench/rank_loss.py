"""Kill a rank in mid-training: does the run end soon, say why, and go on as if nothing happened?

    python -m bench.rank_loss --world 2 --resume-world 1 --data DIR
    python -m bench.rank_loss --world 1 -- --train.sequences-per-step 96      (trainer overrides)

A run is started, and one rank gets SIGKILL once there is a checkpoint and some steps after it.
Then the run is resumed from the checkpoint. The steps that were trained twice are compared: the
killed run's own losses are the undisturbed curve. With --undisturbed another run, never killed,
is trained as far, and every step from the checkpoint on is compared with it too.
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro
from safetensors import safe_open

from bench import launch
from bench.agreement import LOSS_ROUNDINGS
from trainer import environment, files
from trainer.config import MICRO_BATCHES, RunConfig
from trainer.errors import ConfigError, FairwayError, RunError
from trainer.folder import RunFolder

END_LIMIT_S = 60.0
"""A run whose rank has died must have ended by then."""
POLL_S = 0.02
NO_END = "--train.max-steps=100000"
LATER_SHARE = 0.1
"""Of the usual change of the loss from step to step: the most that steps after the first may
differ. Optimizer state that got lost moves them by about one such change."""


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.rank_loss`; trainer overrides come after `--`."""

    world: int = 2
    """Ranks of the run that loses one."""
    resume_world: int = 1
    """Ranks it goes on with."""
    victim: int | None = None
    """The rank to kill; none: the last."""
    checkpoint_steps: int = 12
    """Steps between checkpoints."""
    steps_after: int = 8
    """Steps after the checkpoint when the rank is killed."""
    resumed_steps: int = 12
    """Steps to train after resuming, at least."""
    undisturbed: bool = False
    """Also train a run that is never killed, and compare with it."""
    data: Path | None = None
    """Folder of shards and tokenizer; none: the embedded corpus."""
    out: Path | None = None
    """JSON file for the result."""
    limit_s: float = 300.0
    """Seconds for a run to reach its step."""


@dataclass(frozen=True)
class Comparison:
    """Losses of the same steps in two runs, in nats.

    Attributes:
        steps: how many were compared.
        first_difference: where only the checkpointed weights and the data count.
        first_limit: every token's loss rounded afresh, and the mean in single precision.
        later_difference: the largest of the other steps.
        later_limit: LATER_SHARE of the usual change from step to step.
    """

    steps: int
    first_difference: float
    first_limit: float
    later_difference: float
    later_limit: float

    @property
    def holds(self) -> bool:
        """Both within their limits."""
        within_first = self.first_difference <= self.first_limit
        return within_first and self.later_difference <= self.later_limit


@dataclass(frozen=True)
class Outcome:
    """What happened."""

    end_s: float
    """From the kill to the end of the launcher."""
    messages: list[str]
    """Lines of the run's output that name the loss."""
    checkpoint_step: int
    killed_step: int
    resumed_to_step: int
    comparisons: dict[str, Comparison] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Ended in time, told why, and trained on as before."""
        told = bool(self.messages)
        return self.end_s < END_LIMIT_S and told and all(c.holds for c in self.comparisons.values())


def compare(
    undisturbed: dict[int, float], resumed: dict[int, float], config: RunConfig
) -> Comparison:
    """Compare two runs' losses by step. Raises RunError when fewer than three steps are common."""
    common = sorted(undisturbed.keys() & resumed.keys())
    if len(common) < 3:
        raise RunError(
            f"only {len(common)} steps can be compared: raise --steps-after and --checkpoint-steps"
        )
    differences = [abs(undisturbed[s] - resumed[s]) for s in common]
    changes = [abs(undisturbed[b] - undisturbed[a]) for a, b in itertools.pairwise(common)]
    tokens = config.train.sequences_per_step * config.model.seq_len
    roundoff = 2**-9 if config.compute_dtype == "bfloat16" else 2**-24
    finest = LOSS_ROUNDINGS * undisturbed[common[0]]
    return Comparison(
        steps=len(common),
        first_difference=differences[0],
        first_limit=finest * (roundoff / tokens**0.5 + 2**-24),
        later_difference=max(differences[1:]),
        later_limit=LATER_SHARE * statistics.median(changes),
    )


def check(arguments: Arguments) -> None:
    """Raise ConfigError for options that could only fail once a run is under way."""
    a = arguments
    unfit = [w for w in (a.world, a.resume_world) if w < 1 or MICRO_BATCHES % w]
    if unfit:
        raise ConfigError(f"{unfit[0]} ranks: only 1, 2, 4 and 8 divide a step")
    if a.victim is not None and not 0 <= a.victim < a.world:
        raise ConfigError(f"--victim {a.victim}: with --world {a.world} ranks go to {a.world - 1}")
    if min(a.checkpoint_steps, a.steps_after, a.resumed_steps) < 1:
        raise ConfigError("--checkpoint-steps, --steps-after and --resumed-steps must be above 0")


class _Trial:
    """One killed and resumed run in a folder of its own."""

    def __init__(self, arguments: Arguments, trainer: list[str], folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        data = [] if arguments.data is None else [f"--data.dir={arguments.data}"]
        self.settings = [
            *launch.default_preset(),
            *trainer,
            *data,
            f"--out={folder}",
            NO_END,
            "--train.log-every=1",
            f"--train.checkpoint-every-steps={arguments.checkpoint_steps}",
        ]

    def run(self) -> Outcome:
        a = self.arguments
        killed = RunFolder(self.folder / "killed")
        log = self.folder / "killed.log"
        say(f"{a.world} rank(s): training until {a.steps_after} steps after a checkpoint")
        command = launch.command(a.world, "trainer", *self.settings, "--name=killed")
        process = launch.start(command, log)
        try:
            self._wait_for_step(killed, a.checkpoint_steps + a.steps_after, process, log)
            victim = a.world - 1 if a.victim is None else a.victim
            os.kill(launch.rank_pid(process, a.world, victim), signal.SIGKILL)
            say(f"rank {victim} killed")
            end_s = launch.wait(process, 2 * END_LIMIT_S)
        finally:
            launch.stop(process)
        before = losses(killed)
        messages = said(log, process.returncode)
        at = checkpoint_step(killed)
        say(f"ended after {end_s:.1f} s; resuming from step {at} on {a.resume_world} rank(s)")
        until = max(before) + a.resumed_steps
        resume = launch.command(a.resume_world, "trainer", f"--resume={killed.path}")
        self._train_until(killed, until, resume, self.folder / "resumed.log")
        after = {step: nats for step, nats in losses(killed).items() if step > at}
        _, config = RunFolder.open(killed.path)
        comparisons = {"the killed run's own steps": compare(before, after, config)}
        if a.undisturbed:
            say(f"{a.world} rank(s): a run that is not killed")
            other = RunFolder(self.folder / "undisturbed")
            command = launch.command(a.world, "trainer", *self.settings, "--name=undisturbed")
            self._train_until(other, until, command, self.folder / "undisturbed.log")
            comparisons["a run never killed"] = compare(losses(other), after, config)
        return Outcome(end_s, messages, at, max(before), max(after), comparisons)

    def _train_until(self, run: RunFolder, step: int, command: list[str], log: Path) -> None:
        """Train to `step`, then ask the run to stop as a user would."""
        process = launch.start(command, log)
        try:
            self._wait_for_step(run, step, process, log)
            process.send_signal(signal.SIGTERM)
            launch.wait(process, 2 * END_LIMIT_S)
        finally:
            launch.stop(process)

    def _wait_for_step(
        self, run: RunFolder, step: int, process: "subprocess.Popen[bytes]", log: Path
    ) -> None:
        started = said_at = time.monotonic()
        reached = 0
        while reached < step or not run.checkpoint.exists():
            if process.poll() is not None:
                raise RunError(f"the run ended before step {step}:\n{launch.tail(log)}")
            now = time.monotonic()
            if now - started > self.arguments.limit_s:
                raise RunError(f"step {step} was not reached:\n{launch.tail(log)}")
            if now - said_at > 10:
                said_at = now
                say(f"step {reached} of {step} ({now - started:.0f} s)")
            time.sleep(POLL_S)
            reached = max(losses(run), default=0)


def losses(run: RunFolder) -> dict[int, float]:
    """Training losses by step, in nats; the last of each step."""
    return {row["step"]: row["train_nats"] for row in run.read_metrics() if "train_nats" in row}


def checkpoint_step(run: RunFolder) -> int:
    """The step a run will go on from."""
    with safe_open(str(run.checkpoint), framework="pt") as file:
        return json.loads(file.metadata()["counters"])["step"]


def said(log: Path, status: int) -> list[str]:
    """Lines of the output that name the loss; a lone process can leave only its exit status."""
    lines = log.read_text(errors="replace").splitlines()
    found = [line.strip() for line in lines if "lost a peer" in line or "SIGKILL" in line]
    return found or ([f"exit status {status} (SIGKILL)"] if status == -signal.SIGKILL else [])


def say(message: str) -> None:
    """One line of progress."""
    print(message, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Kill, resume, compare; exit status 1 if anything is not as it should be."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = tyro.cli(Arguments, args=argv[:cut], description=__doc__)
    try:
        check(arguments)
        with tempfile.TemporaryDirectory() as folder:
            outcome = _Trial(arguments, argv[cut + 1 :], Path(folder)).run()
        if arguments.out is not None:
            files.write_json(arguments.out, document(arguments, outcome))
    except FairwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(outcome)
    return 0 if outcome.good else 1


def document(arguments: Arguments, outcome: Outcome) -> dict[str, Any]:
    """JSON of an outcome."""
    return {
        "environment": environment.describe(),
        "world": arguments.world,
        "resume_world": arguments.resume_world,
        **asdict(outcome),
        "good": outcome.good,
    }


def show(outcome: Outcome) -> None:
    """Print what happened."""
    say(f"the run ended {outcome.end_s:.1f} s after the kill (limit {END_LIMIT_S:.0f} s), saying:")
    for message in outcome.messages:
        say(f"    {message}")
    say(
        f"killed at step {outcome.killed_step}, resumed from step {outcome.checkpoint_step}, "
        f"trained on to step {outcome.resumed_to_step}"
    )
    for name, c in outcome.comparisons.items():
        say(
            f"losses against {name}, {c.steps} steps: first {c.first_difference:.1e} nats "
            f"(limit {c.first_limit:.1e}), later {c.later_difference:.1e} "
            f"(limit {c.later_limit:.1e}): {'agree' if c.holds else 'DISAGREE'}"
        )


if __name__ == "__main__":
    sys.exit(main())
