"""`python -m profiles model RUN`: every look into a finished run, in one go.

GPTQ runs once for each width and all matrices; after that one matrix at a time is exchanged.
Compression of the known schemes goes on in the background meanwhile.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from profiles.model import allocator, heads, losses, pictures, ranks, sensitivity, text
from profiles.model.allocator import Grids
from profiles.model.calibration import calibration
from profiles.model.findings import Findings, Text
from profiles.model.subject import Estimate, Subject, open_subject, predict
from trainer import allocate, budget, codesize, damage, environment, files
from trainer.errors import ConfigError
from trainer.progress import log
from trainer.tokenizer import Tokenizer

TOKENS = {"cuda": 1 << 20, "cpu": 1 << 15}
SWEEP_TOKENS = {"cuda": 1 << 17, "cpu": 1 << 12}
FRONTIER_POINTS = 60
RECORD_WIDTHS = (5, 6)


@dataclass(frozen=True)
class Options:
    """Look inside a trained model: ranks, sensitivity, heads, losses, calibration, bits."""

    run: tyro.conf.Positional[Path]
    """Folder of a run that got past its Hessians."""
    out: Path | None = None
    """Folder for tables and pictures; none: `model` within the run folder."""
    data: Path | None = None
    """Folder of shards and tokenizer; none: the run's own."""
    max_tokens: int | None = None
    """Held-out tokens to look at; none: 1,048,576 on a GPU, 32,768 on a CPU."""
    sweep_tokens: int | None = None
    """How many of these each matrix alone is tried on; none: 131,072 on a GPU, 4,096 on a CPU."""
    widths: tuple[float, ...] = (5, 6)
    """Bits that each matrix alone is tried at on held-out text."""
    limit_bytes: int | None = None
    """Limit on artifact plus code in the table of schemes; none: the run's."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to work."""


def main(options: Options) -> None:
    """Analyse a run and write model.json, summary.md and the pictures.

    Raises:
        ConfigError: no CUDA, widths that do not exist, or nothing to look at.
        RunError: the run cannot be used.
        DataError: no held-out text.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA GPU; use --device cpu")
    if not options.widths or not set(options.widths) <= set(allocate.WIDTHS):
        raise ConfigError(f"--widths {options.widths}: choose among {allocate.WIDTHS}")
    counts = (options.max_tokens, options.sweep_tokens, options.limit_bytes)
    if any(count is not None and count < 1 for count in counts):
        raise ConfigError("--max-tokens, --sweep-tokens and --limit-bytes must be at least 1")
    device = torch.device(options.device)
    tokens = options.max_tokens or TOKENS[options.device]
    subject = open_subject(options.run, options.data, device, tokens)
    sweep = subject.first(options.sweep_tokens or SWEEP_TOKENS[options.device])
    limit = options.limit_bytes or subject.config.quant.limit_bytes
    found = analyse(subject, sweep, options.widths, limit - codesize.code_bytes())
    folder = options.out or options.run / "model"
    files.write_json(folder / "model.json", found.as_json())
    files.write_text(folder / "summary.md", text.markdown(found))
    pictures.draw_all(folder, found)
    log(f"{text.markdown(found)}\nwritten to {folder}")


class _Stopwatch:
    """Seconds of each part; the device is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = time.perf_counter() - started


def analyse(
    subject: Subject, sweep: Subject, widths: tuple[float, ...], limit_bytes: int
) -> Findings:
    """Every figure there is.

    Args:
        subject: the opened run.
        sweep: the same with fewer windows, for what is done matrix by matrix.
        widths: bits to try on held-out text.
        limit_bytes: limit on the artifact, code taken off.
    """
    model, quant = subject.model, subject.config.quant
    watch = _Stopwatch(subject.inputs_BT.device)
    with watch.part("GPTQ"):
        made = budget.make(model, subject.hessians, sorted({*RECORD_WIDTHS, *widths}), quant)
        even = budget.make(model, subject.hessians, allocate.WIDTHS, quant, even=True)
    with allocator.packer(subject) as packer:
        for bits in allocator.fixed_schemes(subject).values():
            packer.start(made, bits)
        with watch.part("predictions"):
            predictions = predict(subject)
            whole_B = predictions.nats_BT.double().mean(dim=1)
        with watch.part("expected damage"):
            own_text_BT = subject.calibration_BT[: damage.SEQUENCES]
            expected = damage.damage(model, own_text_BT, made.matrices)
            even_expected = damage.damage_by_error(model, own_text_BT, even.matrices, even.errors)
        with watch.part("held-out sensitivity"):
            swept_B = whole_B[: len(sweep.inputs_BT)]
            changes = sensitivity.held_out_changes(sweep, made, swept_B, widths)
        with watch.part("singular values"):
            ranked = ranks.ranks(model.matrices())
        tokenizer = Tokenizer(subject.data.tokenizer, subject.config.model.vocab_size)
        classes_V = losses.classes(tokenizer)
        with watch.part("heads"):
            drawable = (classes_V != losses.CLASSES.index("control")).nonzero().flatten()
            looked = heads.look_at_heads(model, subject.inputs_BT, drawable.to(watch.device))
        with watch.part("schemes"):
            clipped, evens = Grids(made, expected), Grids(even, even_expected)
            chosen = allocator.choose(subject, packer, clipped, evens, limit_bytes)
            schemes = allocator.judge(subject, packer, chosen, whole_B, limit_bytes)
    trace = allocate.sensitivity(subject.hessians)
    measures = sensitivity.measures(made, expected)
    measures[f"held-out change at int{min(widths):g}"] = {
        name: change_B.mean().item() for name, change_B in changes[min(widths)].items()
    }
    on_gpu = subject.inputs_BT.is_cuda
    described = environment.describe("cuda" if on_gpu else "cpu")
    windows, seq_len = subject.inputs_BT.shape
    return Findings(
        run=subject.path.name,
        device=described["device"] if on_gpu else f"{described['cpu']}, {described['cores']} cores",
        commit=described["commit"],
        text=Text(subject.data.name, windows, len(sweep.inputs_BT), seq_len),
        loss=Estimate.of(whole_B),
        ranks=ranked,
        held_out={b: {n: Estimate.of(c) for n, c in changes[b].items()} for b in widths},
        held_out_by_kind={b: sensitivity.by_kind(changes[b]) for b in widths},
        expected=expected,
        sizes=made.sizes,
        trace=trace,
        agreements=sensitivity.agreement(
            {"trace(H)": trace, "GPTQ error at int5": made.errors[5]},
            measures,
            min(quant.int6_matrices, len(trace)),
        ),
        heads=looked,
        by_class=losses.by_class(predictions.nats_BT, subject.targets_BT, classes_V),
        by_position=losses.by_position(predictions.nats_BT),
        calibration=calibration(predictions.confidence_BT, predictions.correct_BT),
        schemes=schemes,
        frontier=allocator.frontier(evens, FRONTIER_POINTS),
        limit_bytes=limit_bytes,
        seconds=watch.seconds,
    )
