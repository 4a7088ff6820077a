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
class Grids:
    """Every matrix at several widths of one kind of grid, and the damage of each."""

    made: Made
    damages: Damages

    def expected(self, bits: Bits) -> float:
        """Damage of all matrices together, nats per token."""
        return sum(self.damages[n][b] for n, b in bits.items())


Chosen = tuple[Grids, Bits]
"""What a scheme makes an artifact of."""


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

    def __init__(self, subject: Subject, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.compressor: Compressor = subject.config.quant.compressor
        self._sizes: dict[tuple[int, tuple[float, ...]], Future[int]] = {}

    def start(self, made: Made, bits: Bits) -> Future[int]:
        """Begin to compress, if not begun before."""
        key = id(made), tuple(bits[name] for name in made.sizes)
        if key not in self._sizes:
            self._sizes[key] = self.pool.submit(made.packed_bytes, bits, self.compressor)
        return self._sizes[key]

    def size(self, made: Made, bits: Bits) -> int:
        """Bytes of the artifact with these bits."""
        return self.start(made, bits).result()


@contextmanager
def packer(subject: Subject) -> Iterator[Packer]:
    """A packer with one worker; `artifact.pack` itself uses all cores."""
    with ThreadPoolExecutor(1) as pool:
        yield Packer(subject, pool)


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
    subject: Subject, packer: Packer, clipped: Grids, even: Grids, limit_bytes: int
) -> dict[str, Chosen]:
    """All schemes: the fixed ones, and those that fill the bytes of `mixed` or of the limit.

    Args:
        subject: the model.
        packer: for exact sizes.
        clipped: the record's grids, a clip per row.
        even: those of `measured`, one step a matrix.
        limit_bytes: limit on the artifact, code taken off.
    """
    made = clipped.made
    schemes: dict[str, Chosen] = {n: (clipped, b) for n, b in fixed_schemes(subject).items()}
    mixed = list(schemes.values())[1][1]
    mixed_bytes = packer.size(made, mixed)
    ratio = mixed_bytes / made.estimated_bytes(mixed)
    knapsack = Knapsack(even.damages, even.made.sizes)

    def measured(limit: int) -> Chosen:
        return even, largest_fit(
            even.made,
            knapsack.bits,
            knapsack.highest,
            limit,
            lambda bits: packer.size(even.made, bits),
            slack_bytes=int(SLACK_SHARE * limit),
            ratio=ratio,
        )

    order = allocate.ranked(allocate.sensitivity(subject.hessians))
    schemes["measured, no larger than mixed"] = measured(mixed_bytes)
    budgeted = largest_fit(
        made,
        lambda count: allocate.bits_with(order, count),
        len(order),
        limit_bytes,
        lambda bits: packer.size(made, bits),
        ratio=ratio,
    )
    schemes["budgeted: trace(H) fills the limit"] = clipped, budgeted
    schemes["measured, fills the limit"] = measured(limit_bytes)
    return schemes


def judge(
    subject: Subject,
    packer: Packer,
    schemes: dict[str, Chosen],
    whole_B: Tensor,
    limit_bytes: int,
) -> list[Scheme]:
    """Bytes and held-out loss of every scheme.

    Args:
        subject: the model; its weights are exchanged for each scheme's and put back.
        packer: for exact sizes.
        schemes: by name.
        whole_B: held-out losses of the unquantized model, by window.
        limit_bytes: limit on the artifact, code taken off.
    """
    losses: dict[str, Tensor] = {}
    with progress("schemes", len(schemes)) as advance:
        for name, (grids, bits) in schemes.items():
            with decoded(subject, grids.made.chosen(bits)):
                losses[name] = window_nats(subject)
            advance()
    mixed_B = losses[next(name for name in schemes if name.startswith("mixed"))]
    return [
        Scheme(
            name=name,
            bits=bits,
            artifact_bytes=packer.size(grids.made, bits),
            fits=packer.size(grids.made, bits) <= limit_bytes,
            expected_nats=grids.expected(bits),
            change=Estimate.of(losses[name] - whole_B),
            against_mixed=Estimate.of(losses[name] - mixed_B),
        )
        for name, (grids, bits) in schemes.items()
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


def frontier(grids: Grids, points: int) -> list[PointOnFrontier]:
    """The measured scheme at sizes from all-smallest to all-largest."""
    knapsack = Knapsack(grids.damages, grids.made.sizes)
    found = []
    for i in range(points):
        bits = knapsack.bits(round(i * knapsack.highest / (points - 1)))
        found.append(PointOnFrontier(grids.made.estimated_bytes(bits), grids.expected(bits)))
    return found
