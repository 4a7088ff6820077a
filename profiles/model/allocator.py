"""Schemes of bits side by side: their exact bytes, and what they cost on held-out text.

The bits are chosen without held-out text, as in a run: by trace(H), or by the damage measured on
the model's own text. Held-out text only judges them. Each scheme is judged as the artifact it
makes, tables in int8 and small tensors in float16 included.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from profiles.model.subject import Estimate, Subject, window_nats
from trainer import allocate
from trainer.allocate import Knapsack
from trainer.artifact import Compressor
from trainer.budget import Bits, Made, largest_fit
from trainer.progress import progress
from trainer.prune import SLACK_SHARE
from trainer.quantize import QuantizedModel, dequantize

Damages = dict[str, dict[float, float]]


@dataclass(frozen=True)
class Scheme:
    """One way to choose bits, and what came of it."""

    name: str
    bits: Bits
    artifact_bytes: int
    fits: bool
    """Whether artifact and code stay within the limit, unpruned."""
    expected_nats: float
    """Sum of the measured damage of the matrices, each alone, on the model's own text."""
    change: Estimate
    """Change of the held-out loss against the unquantized model, nats per token."""
    against_mixed: Estimate
    """Held-out loss less that of `mixed`."""

    @property
    def widths(self) -> str:
        """How many matrices have how many bits: `56 int5, 10 int6`."""
        return ", ".join(f"{n} int{b:g}" for b, n in sorted(Counter(self.bits.values()).items()))


@dataclass(frozen=True)
class PointOnFrontier:
    """The least expected damage at one size, as estimated."""

    estimated_bytes: float
    expected_nats: float


class Packer:
    """Exact sizes of artifacts, each compressed once; in the background if asked for early."""

    def __init__(self, made: Made, subject: Subject, pool: ThreadPoolExecutor) -> None:
        self.made, self.pool = made, pool
        self.compressor: Compressor = subject.config.quant.compressor
        self._sizes: dict[tuple[float, ...], Future[int]] = {}

    def start(self, bits: Bits) -> Future[int]:
        """Begin to compress, if not begun before."""
        key = tuple(bits[name] for name in self.made.sizes)
        if key not in self._sizes:
            self._sizes[key] = self.pool.submit(self.made.packed_bytes, bits, self.compressor)
        return self._sizes[key]

    def size(self, bits: Bits) -> int:
        """Bytes of the artifact with these bits."""
        return self.start(bits).result()


@contextmanager
def packer(made: Made, subject: Subject) -> Iterator[Packer]:
    """A packer with one worker; `artifact.pack` itself uses all cores."""
    with ThreadPoolExecutor(1) as pool:
        yield Packer(made, subject, pool)


def fixed_schemes(subject: Subject) -> dict[str, Bits]:
    """Schemes that are known before anything is measured."""
    order = allocate.ranked(allocate.sensitivity(subject.hessians))
    count = min(subject.config.quant.int6_matrices, len(order))
    return {
        "int5 throughout": allocate.bits_with(order, 0),
        f"mixed: top {count} by trace(H) in int6": allocate.bits_with(order, count),
        "int6 throughout": allocate.bits_with(order, len(order)),
    }


def choose(
    subject: Subject, packer: Packer, knapsack: Knapsack, limit_bytes: int
) -> dict[str, Bits]:
    """All schemes: the fixed ones, and those that fill the bytes of `mixed` or of the limit.

    Args:
        subject: the model.
        packer: of its matrices.
        knapsack: of the measured damage.
        limit_bytes: limit on the artifact, code taken off.
    """
    made, schemes = packer.made, fixed_schemes(subject)
    mixed = list(schemes.values())[1]
    mixed_bytes = packer.size(mixed)
    ratio = mixed_bytes / made.estimated_bytes(mixed)

    def measured(limit: int) -> Bits:
        slack = int(SLACK_SHARE * limit)
        return largest_fit(
            made,
            knapsack.bits,
            knapsack.highest,
            limit,
            packer.size,
            slack_bytes=slack,
            ratio=ratio,
        )

    order = allocate.ranked(allocate.sensitivity(subject.hessians))
    schemes["measured, no larger than mixed"] = measured(mixed_bytes)
    schemes["budgeted: trace(H) fills the limit"] = largest_fit(
        made,
        lambda count: allocate.bits_with(order, count),
        len(order),
        limit_bytes,
        packer.size,
        ratio=ratio,
    )
    schemes["measured, fills the limit"] = measured(limit_bytes)
    return schemes


def judge(
    subject: Subject,
    packer: Packer,
    schemes: dict[str, Bits],
    damages: Damages,
    whole_B: Tensor,
    limit_bytes: int,
) -> list[Scheme]:
    """Bytes and held-out loss of every scheme.

    Args:
        subject: the model; its weights are exchanged for each scheme's and put back.
        packer: of its matrices.
        schemes: bits by name.
        damages: expected damage by matrix and bits.
        whole_B: held-out losses of the unquantized model, by window.
        limit_bytes: limit on the artifact, code taken off.
    """
    losses: dict[str, Tensor] = {}
    with progress("schemes", len(schemes)) as advance:
        for name, bits in schemes.items():
            with decoded(subject, packer.made.chosen(bits)):
                losses[name] = window_nats(subject)
            advance()
    mixed_B = losses[next(name for name in schemes if name.startswith("mixed"))]
    return [
        Scheme(
            name=name,
            bits=bits,
            artifact_bytes=packer.size(bits),
            fits=packer.size(bits) <= limit_bytes,
            expected_nats=sum(damages[n][b] for n, b in bits.items()),
            change=Estimate.of(losses[name] - whole_B),
            against_mixed=Estimate.of(losses[name] - mixed_B),
        )
        for name, bits in schemes.items()
    ]


@contextmanager
def decoded(subject: Subject, packed: QuantizedModel) -> Iterator[None]:
    """The model has the weights of an artifact until the block ends."""
    kept = {name: t.clone() for name, t in subject.model.state_dict().items()}
    subject.model.load_state_dict(dequantize(packed))
    try:
        yield
    finally:
        subject.model.load_state_dict(kept)


def frontier(
    made: Made, knapsack: Knapsack, damages: Damages, points: int
) -> list[PointOnFrontier]:
    """The measured scheme at sizes from all-smallest to all-largest."""
    found = []
    for i in range(points):
        bits = knapsack.bits(round(i * knapsack.highest / (points - 1)))
        nats = sum(damages[n][b] for n, b in bits.items())
        found.append(PointOnFrontier(made.estimated_bytes(bits), nats))
    return found
