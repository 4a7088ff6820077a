"""submission.json, the logs and requirements.txt of a submission."""

import json
import statistics
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from typing import Any

from kernels import flash4_package
from trainer.collect import SeedSet
from trainer.config import SlotMode
from trainer.submission import pack
from trainer.submission.arguments import shared_settings
from trainer.submission.runs import FinishedRun


@dataclass(frozen=True)
class Submission:
    """What is submitted, and who submits it."""

    runs: list[FinishedRun]
    found: SeedSet
    """The results of the runs as one set."""
    mode: SlotMode
    """SLOT mode of the headline score."""
    script: bytes
    """Content of train_gpt.py."""
    author: str
    github_id: str
    name: str

    @property
    def bytes_code(self) -> int:
        """Size of the script."""
        return len(self.script)

    def bytes_total(self, run: FinishedRun) -> int:
        """Bytes of a run that count against the limit: its artifact and the script."""
        return run.artifact_bytes + self.bytes_code

    @property
    def causal(self) -> bool:
        """Whether the probe found the headline score causal in every run."""
        return all(run.causal(self.mode) for run in self.runs)

    @property
    def same_code(self) -> bool:
        """Whether every run counted a script of just this size as its code."""
        counted = {run.stages["artifact"]["code_bytes"] for run in self.runs}
        return counted == {self.bytes_code}

    @property
    def blurb(self) -> str:
        """What it is, in a sentence or two."""
        config = self.runs[0].config
        model, quant = config.model, config.quant
        adapted = "without SLOT" if self.mode == "off" else f"with SLOT `{self.mode}`"
        causal = "causal" if self.causal else "NOT causal"
        return (
            f"{model.layers} layers of width {model.width}, {config.mlp} MLP, Parallel Muon, "
            f"weights averaged by {config.train.average}, GPTQ ({quant.bits} bits, calibrated on "
            f"the model's own text), {quant.compressor}. Sliding windows of stride "
            f"{config.eval.stride} {adapted}: {causal} by probe. Mean of {len(self.runs)} seed(s)."
        )


def submission_json(submission: Submission) -> dict[str, Any]:
    """The contest's fields (means over seeds; the largest total), and each seed's own."""
    runs, mode = submission.runs, submission.mode
    nats = [run.score(mode)["nats"] for run in runs]
    bpb = [run.score(mode)["bpb"] for run in runs]
    spread = {} if len(runs) < 2 else {
        "val_loss_std": statistics.stdev(nats),
        "val_bpb_std": statistics.stdev(bpb),
    }  # fmt: skip
    return {
        "author": submission.author,
        "github_id": submission.github_id,
        "name": submission.name,
        "blurb": submission.blurb,
        "date": max(run.finished for run in runs).isoformat().replace("+00:00", "Z"),
        "val_loss": statistics.fmean(nats),
        "val_bpb": statistics.fmean(bpb),
        **spread,
        "bytes_total": max(submission.bytes_total(run) for run in runs),
        "bytes_code": submission.bytes_code,
        "slot_mode": mode,
        "causal": submission.causal,
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): _seed_result(submission, run) for run in runs},
        "hardware": submission.found.hardware,
        "pytorch_version": runs[0].environment["packages"]["torch"],
    }


def _seed_result(submission: Submission, run: FinishedRun) -> dict[str, Any]:
    score, train = run.score(submission.mode), run.stages["train"]
    return {
        "val_loss": score["nats"],
        "val_bpb": score["bpb"],
        "steps": train["steps"],
        "ms_per_step": train["ms_per_step"],
        "train_seconds": train["train_s"],
        "eval_seconds": score["seconds"],
        "artifact_bytes": run.artifact_bytes,
        "artifact_sha256": run.stages["artifact"]["sha256"],
        "bytes_total": submission.bytes_total(run),
    }


def log_text(run: FinishedRun) -> str:
    """The log of a run: machine and settings, each logged step, each stage's result.

    Folders of the machine it ran on are left out.
    """
    machine = {key: value for key, value in run.environment.items() if key != "command"}
    settings = shared_settings(run.config)
    lines = [f"seed:{run.seed}", f"environment:{json.dumps(machine)}"]
    lines += [f"settings:{json.dumps(settings)}"]
    for row in run.metrics:
        lines.append(
            f"step:{row['step']}/{run.stages['train']['steps']} "
            f"train_loss:{row['train_nats']:.4f} lr_scale:{row['lr_scale']:.4f} "
            f"grad_norm:{row['grad_norm']:.4f} late_qat:{int(row['late_qat'])} "
            f"train_time:{1000 * row['elapsed_s']:.0f}ms "
            f"step_avg:{1000 * row['elapsed_s'] / row['step']:.2f}ms"
        )
    for name, result in run.stages.items():
        told = {key: value for key, value in result.items() if key != "dir"}
        lines.append(f"stage:{name} {json.dumps(told)}")
    for mode in run.modes:
        score, causal = run.score(mode), "yes" if run.causal(mode) else "NO"
        lines.append(
            f"final slot:{mode} causal:{causal} val_loss:{score['nats']:.8f} "
            f"val_bpb:{score['bpb']:.8f} eval_time:{1000 * score['seconds']:.0f}ms"
        )
    return "\n".join(lines) + "\n"


def requirements(run: FinishedRun) -> str:
    """requirements.txt: what the script imports, at the run's versions where it recorded them.

    Attention `flash4` is imported by name and only where it is chosen.
    """
    owners = packages_distributions()
    recorded = run.environment["packages"]
    lines: list[str] = []
    for module in pack.third_party():
        name = owners[module][0] if module in owners else module
        known = recorded.get(name.lower()) or version(name)
        if known != "not installed":
            lines.append(f"{name}=={known.split('+')[0]}")  # an index has no local versions
    if run.config.attention == "flash4":
        lines.append(flash4_package.REQUIREMENT)
    return "\n".join(sorted(lines, key=str.lower)) + "\n"
