"""Is a score legal? What the contest asks of one, checked and stated beside it.

Letters: N tokens.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from trainer.causality import probe
from trainer.config import SIZE_LIMIT_BYTES, EvalConfig, SlotMode
from trainer.held_out import CLOSED_STAGES, MODE_STAGES, OPENINGS
from trainer.model import GPT
from trainer.progress import track

TIME_LIMIT_S = 600.0
"""The contest's limit on training, and again on evaluation, on 8 H100s."""

PROBE_WINDOWS = 4
"""Windows in a batch of the probe: enough for one to see another's tokens, were that possible."""


def probe_modes(
    model: GPT, tokens_N: np.ndarray, config: EvalConfig, modes: tuple[SlotMode, ...]
) -> dict[str, Any]:
    """Probe every mode on the start of the text, in small batches, and name the text.

    Returns:
        `modes`: verdict by SLOT mode; `text_sha256` and `text_tokens` of all N tokens; JSON-able.
    """
    small = replace(config, batch_windows=min(PROBE_WINDOWS, config.batch_windows))
    verdicts = {mode: probe(model, tokens_N, small, mode)
                for mode in track(modes, "causality probe", len(modes))}  # fmt: skip
    return {
        "modes": {mode: {**asdict(v), "causal": v.causal} for mode, v in verdicts.items()},
        "text_sha256": text_sha256(tokens_N),
        "text_tokens": len(tokens_N),
    }


def text_sha256(tokens_N: np.ndarray) -> str:
    """Digest of a token stream, as little-endian uint16."""
    return hashlib.sha256(np.ascontiguousarray(tokens_N, dtype="<u2").data).hexdigest()


# The report.

Verdict = Literal["kept", "broken", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One rule, what was found, and whether it is kept."""

    rule: str
    found: str
    verdict: Verdict
    mode: SlotMode | None = None
    """The SLOT mode it speaks of; none: the whole run."""


def run_findings(stages: dict[str, dict[str, Any]]) -> list[Finding]:
    """Every rule, for a run whose stage results are `stages` (by stage)."""
    probed = stages.get("causality", {}).get("modes", {})
    scored = [mode for mode in get_args(SlotMode) if MODE_STAGES[mode] in stages]
    return findings(
        {mode: probed.get(mode) for mode in scored},
        {mode: stages[MODE_STAGES[mode]]["seconds"] for mode in scored},
        stages["artifact"]["artifact_bytes"],
        stages["artifact"]["code_bytes"],
        stages,
    )


def findings(
    verdicts: dict[SlotMode, dict[str, Any] | None],
    seconds: dict[SlotMode, float],
    artifact_bytes: int,
    code_bytes: int,
    stages: dict[str, dict[str, Any]],
) -> list[Finding]:
    """Every rule, for an artifact and its scores.

    Args:
        verdicts: of the probe, as in `probe_modes`; None where there was none.
        seconds: of the evaluation, by mode.
        artifact_bytes: size of the file.
        code_bytes: size of the code.
        stages: results of the run that made it; empty if it cannot be told.
    """
    return [
        *(causality_finding(mode, verdict) for mode, verdict in verdicts.items()),
        _training_time(stages),
        *(evaluation_time(mode, taken) for mode, taken in seconds.items()),
        size(artifact_bytes, code_bytes),
        _untouched(stages),
        _calibration(stages),
    ]


def legal(found: list[Finding], mode: SlotMode) -> bool:
    """Whether every rule is known to be kept for a score in `mode`."""
    return all(f.verdict == "kept" for f in found if f.mode in (None, mode))


def causality_finding(mode: SlotMode, verdict: dict[str, Any] | None) -> Finding:
    """What the probe found of a SLOT mode; None: it was not probed."""
    rule = f"causal, SLOT `{mode}`"
    if verdict is None:
        return Finding(rule, "not probed", "unknown", mode)
    if verdict["causal"]:
        found = f"yes: nothing moved at {verdict['probed']} changed futures"
        return Finding(rule, found, "kept", mode)
    found = (
        f"NO: changing the text after target {verdict['worst_target']} moved predictions up to it "
        f"by {verdict['moved']:.1e} nats"
    )
    return Finding(rule, found, "broken", mode)


def evaluation_time(mode: SlotMode, seconds: float) -> Finding:
    """Scoring in one mode against the limit."""
    verdict: Verdict = "kept" if seconds <= TIME_LIMIT_S else "broken"
    rule = f"evaluation within {TIME_LIMIT_S:.0f} s, SLOT `{mode}`"
    return Finding(rule, f"{seconds:.1f} s", verdict, mode)


def size(artifact_bytes: int, code_bytes: int) -> Finding:
    """Artifact and code against the limit."""
    total = artifact_bytes + code_bytes
    return Finding(
        f"at most {SIZE_LIMIT_BYTES:,} bytes",
        f"{total:,} bytes (artifact {artifact_bytes:,}, code {code_bytes:,})",
        "kept" if total <= SIZE_LIMIT_BYTES else "broken",
    )


def _training_time(stages: dict[str, dict[str, Any]]) -> Finding:
    rule = f"training within {TIME_LIMIT_S:.0f} s"
    if "train" not in stages:
        return Finding(rule, "an artifact alone does not tell", "unknown")
    train = stages["train"]
    # The step in hand when the time is up is finished, as in the published code.
    kept = train["train_s"] <= TIME_LIMIT_S + train["ms_per_step"] / 1000
    ranks = train["world_size"]
    found = f"{train['train_s']:.1f} s on {ranks} rank{'' if ranks == 1 else 's'}"
    return Finding(rule, found, "kept" if kept else "broken")


def _untouched(stages: dict[str, dict[str, Any]]) -> Finding:
    rule = "validation data untouched before evaluation"
    if "train" not in stages:
        return Finding(rule, "an artifact alone does not tell", "unknown")
    counts = {name: stages.get(name, {}).get(OPENINGS) for name in CLOSED_STAGES}
    unwatched = [name for name, count in counts.items() if count is None]
    if unwatched:
        return Finding(rule, f"not watched in {', '.join(unwatched)}", "unknown")
    opened = [name for name, count in counts.items() if count]
    if opened:
        return Finding(rule, f"opened in {', '.join(opened)}", "broken")
    found = f"watched: no opening in {', '.join(CLOSED_STAGES)}"
    if "post_ema" in stages:
        found += "; stage post_ema scores it after training, for the report alone"
    return Finding(rule, found, "kept")


def _calibration(stages: dict[str, dict[str, Any]]) -> Finding:
    rule = "calibration without validation data"
    if "calibrate" not in stages:
        return Finding(rule, "an artifact alone does not tell", "unknown")
    source = stages["calibrate"]["source"]
    known = source == "generated by the model"
    return Finding(rule, f"text {source}", "kept" if known else "unknown")


MARKS: dict[Verdict, str] = {"kept": "kept", "broken": "**broken**", "unknown": "unknown"}


def markdown(found: list[Finding]) -> str:
    """The findings as a Markdown table."""
    rows = [f"| {f.rule} | {f.found} | {MARKS[f.verdict]} |" for f in found]
    return "\n".join(["| rule | found | |", "| --- | --- | --- |", *rows])
