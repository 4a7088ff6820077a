"""Findings as Markdown."""

from collections import defaultdict
from collections.abc import Iterable

from profiles.model.calibration import BINS
from profiles.model.findings import Findings
from profiles.model.heads import PATTERNS, THRESHOLD, THRESHOLDS
from profiles.model.losses import Part
from profiles.model.sensitivity import KINDS, MLP_KINDS, kind

PUBLISHED_RANK = {"MLP": "94.4 %", "q": "72.6 %"}
PUBLISHED_HEADS = {"previous": "28", "induction": "1"}
PUBLISHED_MLP_SHARE = "80 %"
PUBLISHED_ECE = "1.26 %"


def markdown(found: Findings) -> str:
    """The whole summary."""
    parts = (
        f"# Inside {found.run}",
        _origin(found),
        _allocator(found),
        _sensitivity(found),
        _proxies(found),
        _ranks(found),
        _heads(found),
        _losses(found),
        _calibration(found),
        _matrices(found),
        _time(found),
    )
    return "\n\n".join(parts) + "\n"


def table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    headings = list(headings)
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _origin(found: Findings) -> str:
    return (
        f"{found.device}; commit `{found.commit}`. Averaged weights before quantization, held-out "
        f"text: {found.text.name}, {found.text.windows} windows of {found.text.seq_len} tokens "
        f"side by side, {found.loss.mean:.5f} ± {found.loss.error:.5f} nats per token. Changes of "
        "the loss are differences of paired per-token losses; ± is one standard error over "
        "windows. Published figures are of the record's model on FineWeb. Held-out text only "
        "judges here: no bits are chosen by it."
    )


def _allocator(found: Findings) -> str:
    rows = [
        (
            s.name,
            s.widths,
            f"{s.artifact_bytes:,}",
            "yes" if s.fits else "no",
            f"{s.expected_nats:+.5f}",
            s.change,
            s.against_mixed,
        )
        for s in found.schemes
    ]
    return "\n\n".join(
        (
            "## Bits per matrix",
            table(
                (
                    "scheme",
                    "matrices",
                    "artifact bytes",
                    f"fits {found.limit_bytes:,}",
                    "expected, nats",
                    "held out, nats",
                    "against mixed",
                ),
                rows,
            ),
            "`expected` sums each matrix's own damage on the model's own text, by which `measured` "
            "chooses; the int8 tables are not in it. `measured` has one step for all rows of a "
            "matrix, the others the record's clip per row. `held out` is the change of the loss "
            "with the whole artifact. Sizes are exact and before any pruning.",
            "![Schemes](allocator.png)",
        )
    )


def _sensitivity(found: Findings) -> str:
    sections = ["## Which matrices suffer"]
    for bits, groups in found.held_out_by_kind.items():
        expected = defaultdict[str, float](float)
        for name, damage in found.expected.items():
            part = "MLP" if kind(name) in MLP_KINDS else "attention"
            for group in (kind(name), part, "all"):
                expected[group] += damage[bits]
        whole = groups["all"]
        rows = [
            (
                group,
                change,
                f"{change.mean / whole.mean:.0%}"
                if whole.mean > 2 * whole.error
                else "in the noise",
                f"{expected[group]:+.5f}",
                f"{expected[group] / expected['all']:.0%}",
            )
            for group, change in groups.items()
        ]
        headings = ("matrices", "held out, nats", "share", "expected, nats", "share")
        sections.append(
            f"int{bits:g}, each matrix alone on {found.text.sweep_windows} windows, summed over "
            "layers:"
        )
        sections.append(table(headings, rows))
    sections.append(
        f"Published: the MLP carries {PUBLISHED_MLP_SHARE} of the int6 damage. `expected` is on "
        "the model's own text, over its whole predicted distribution: far less noisy."
    )
    sections.append("![Sensitivity](sensitivity.png)")
    return "\n\n".join(sections)


def _proxies(found: Findings) -> str:
    rows = [
        (a.measure, a.proxy, f"{a.spearman:+.2f}", f"{a.shared} of {a.top}")
        for a in found.agreements
    ]
    headings = ("measured", "cheap figure", "Spearman", "same at the top")
    return "\n\n".join(
        (
            "## Do cheap figures pick the right ones?",
            table(headings, rows),
            "![trace(H)](proxy.png)",
        )
    )


def _ranks(found: Findings) -> str:
    groups: dict[str, list[str]] = {k: [n for n in found.ranks if kind(n) == k] for k in KINDS}
    groups["MLP"] = groups["up"] + groups["down"]
    rows = []
    for group, names in groups.items():
        of = [found.ranks[n] for n in names]
        mean, energy = (
            sum(getattr(r, field) for r in of) / len(of)
            for field in ("utilisation", "energy_utilisation")
        )
        least = min(of, key=lambda r: r.utilisation)
        rows.append(
            (
                group,
                f"{mean:.1%}",
                f"{least.utilisation:.1%}",
                f"{energy:.1%}",
                PUBLISHED_RANK.get(group, ""),
            )
        )
    headings = ("matrices", "mean utilisation", "least", "for 90 % of the energy", "published")
    return "\n\n".join(
        (
            "## Rank",
            "Utilisation is effective rank over full rank; effective rank is exp(entropy of the "
            "singular values over their sum) (Roy & Vetterli 2007). The published figures do not "
            "say theirs.",
            table(headings, rows),
            "![Rank](rank.png)",
        )
    )


def _heads(found: Findings) -> str:
    heads = found.heads
    rows = [
        (p, *(heads.count(p, t) for t in THRESHOLDS), PUBLISHED_HEADS.get(p, ""))
        for p in (*PATTERNS, "other")
    ]
    return "\n\n".join(
        (
            "## Attention heads",
            "A head has the name of the pattern it attends to most, if its mean attention there is "
            f"at least the threshold (pictures: {THRESHOLD}). `previous`: from t to t-1; `first`: "
            "to position 0; `self`: to t; all on held-out text. `induction`: on random tokens that "
            "are repeated once, to the token after the first occurrence. "
            f"{len(heads.heads)} heads; the published threshold is not known.",
            table(("pattern", *(f"at {t}" for t in THRESHOLDS), "published"), rows),
            f"Random tokens cost {heads.first_pass_nats:.3f} nats the first time and "
            f"{heads.repeat_nats:.3f} when repeated.",
            "![Heads](heads.png)",
        )
    )


def _losses(found: Findings) -> str:
    headings = ("", "tokens", "nats per token", "± SE", "share of the loss")

    def rows(parts: list[Part]) -> list[tuple[str, ...]]:
        return [
            (
                p.name,
                f"{p.tokens:,}",
                f"{p.nats.mean:.3f}",
                f"{p.nats.error:.3f}",
                f"{p.share_of_loss:.1%}",
            )
            for p in parts
        ]

    return "\n\n".join(
        (
            "## Where the loss lies",
            table(("class of target", *headings[1:]), rows(found.by_class)),
            table(("tokens before", *headings[1:]), rows(found.by_position)),
            "![Loss by class](loss_by_class.png)\n\n![Loss by position](loss_by_position.png)",
        )
    )


def _calibration(found: Findings) -> str:
    rows = [
        (f"{b.confidence:.1%}", f"{b.accuracy:.1%}", f"{b.tokens:,}")
        for b in found.calibration.bins
    ]
    return "\n\n".join(
        (
            "## Calibration",
            f"Expected calibration error {found.calibration.error:.2%} ({BINS} bins of equal width "
            f"by the probability of the likeliest token; published {PUBLISHED_ECE}, bins unknown).",
            table(("mean confidence", "right", "tokens"), rows),
            "![Calibration](calibration.png)",
        )
    )


def _matrices(found: Findings) -> str:
    widths = list(found.held_out)
    measured = next(s.bits for s in reversed(found.schemes))
    headings = (
        "matrix",
        "trace(H)",
        "rank",
        *(f"int{b} held out" for b in widths),
        *(f"int{b} expected" for b in next(iter(found.expected.values()))),
        "measured bits",
    )
    rows = [
        (
            name.removeprefix("blocks."),
            f"{found.trace[name]:.4g}",
            f"{found.ranks[name].utilisation:.1%}",
            *(found.held_out[b][name] for b in widths),
            *(f"{d:.6f}" for d in found.expected[name].values()),
            measured[name],
        )
        for name in found.trace
    ]
    return "## Every matrix\n\n" + table(headings, rows)


def _time(found: Findings) -> str:
    rows = [(name, f"{seconds:.1f}") for name, seconds in found.seconds.items()]
    rows.append(("all", f"{sum(found.seconds.values()):.1f}"))
    return "## Time\n\n" + table(("part", "seconds"), rows)
