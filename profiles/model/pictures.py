"""PNG pictures of the findings."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from profiles.model.findings import Findings
from profiles.model.heads import THRESHOLD
from profiles.model.losses import Part
from profiles.model.sensitivity import KINDS, kind, layer
from trainer.allocate import ranked
from trainer.files import atomic_path

COLOURS = {k: f"C{i}" for i, k in enumerate(KINDS)}


def draw_all(folder: Path, found: Findings) -> None:
    """Write every picture into `folder`."""
    for name, draw in PICTURES.items():
        figure = draw(found)
        with atomic_path(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
        plt.close(figure)


def _grid(values: Mapping[str, float]) -> np.ndarray:
    """Matrices as layers (rows) by kinds (columns)."""
    grid = np.full((1 + max(map(layer, values)), len(KINDS)), np.nan)
    for name, value in values.items():
        grid[layer(name), KINDS.index(kind(name))] = value
    return grid


def _heatmap(
    axes: Axes,
    grid: np.ndarray,
    columns: list[str],
    title: str,
    form: str,
    limits: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> None:
    """Cells with their figures, dark text on light cells and the other way round."""
    shades = np.log(np.maximum(grid, np.nanmax(grid) / 1e3)) if logarithmic else grid
    low, high = limits or (np.nanmin(shades), np.nanmax(shades))
    axes.imshow(shades, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        colour = "black" if shades[row, column] > (low + high) / 2 else "white"
        axes.text(
            column, row, format(value, form), ha="center", va="center", color=colour, fontsize=8
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(grid)))
    axes.set_ylabel("layer")
    axes.set_title(title)


def _side_by_side(count: int, rows: int) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        1, count, figsize=(1 + 4.6 * count, 1.6 + 0.36 * rows), squeeze=False
    )
    return figure, list(axes[0])


def _rank(found: Findings) -> Figure:
    grid = _grid({n: 100 * r.utilisation for n, r in found.ranks.items()})
    figure, (axes,) = _side_by_side(1, len(grid))
    _heatmap(axes, grid, list(KINDS), "Effective rank, % of full rank", ".0f")
    return figure


def _sensitivity(found: Findings) -> Figure:
    """Expected damage at each width that held-out text was tried at, and the bits it led to."""
    measured = [s for s in found.schemes if s.name.startswith("measured")]
    layers = len(_grid(found.trace))
    figure, axes = _side_by_side(len(found.held_out) + len(measured), layers)
    for a, bits in zip(axes, found.held_out, strict=False):
        grid = _grid({n: 1e5 * d[bits] for n, d in found.expected.items()})
        title = f"int{bits:g}: damage, 1e-5 nats"
        _heatmap(a, grid, list(KINDS), title, ".1f", logarithmic=True)
    for a, scheme in zip(axes[len(found.held_out) :], measured, strict=True):
        grid = _grid(scheme.bits)
        _heatmap(a, grid, list(KINDS), f"bits: {scheme.name}", "g", (4, 8))
    return figure


def _proxy(found: Findings) -> Figure:
    """trace(H) against the expected damage; the top of either order is marked."""
    bits = min(found.held_out)
    first = found.agreements[0]
    damage = {n: d[bits] for n, d in found.expected.items()}
    figure, axes = plt.subplots(figsize=(7.5, 5))
    for k in KINDS:
        names = [n for n in damage if kind(n) == k]
        axes.scatter(
            [found.trace[n] for n in names],
            [max(damage[n], 1e-8) for n in names],
            color=COLOURS[k],
            label=k,
        )
    marks = (
        (found.trace, "s", "black", f"top {first.top} by trace(H)"),
        (damage, "D", "red", f"top {first.top} by damage"),
    )
    for figures, marker, colour, label in marks:
        top = ranked(figures)[: first.top]
        axes.scatter(
            [found.trace[n] for n in top],
            [max(damage[n], 1e-8) for n in top],
            marker=marker,
            s=110,
            facecolors="none",
            edgecolors=colour,
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel="trace(H), squared size of the inputs")
    axes.set_ylabel(f"expected damage at int{bits:g}, nats per token")
    rho = next(a.spearman for a in found.agreements if a.proxy == "trace(H)")
    axes.set_title(f"Does trace(H) foretell the damage? Spearman {rho:+.2f}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _heads(found: Findings) -> Figure:
    heads = found.heads.heads
    layers, width = 1 + heads[-1].layer, 1 + max(h.head for h in heads)
    figure, axes = _side_by_side(2, layers)
    for a, pattern in zip(axes, ("previous", "induction"), strict=True):
        grid = np.zeros((layers, width))
        for h in heads:
            grid[h.layer, h.head] = getattr(h, pattern)
        count = found.heads.count(pattern, THRESHOLD)
        title = f"{pattern}: {count} heads named so at {THRESHOLD}"
        _heatmap(a, grid, [str(h) for h in range(width)], title, ".2f", (0, 1))
        a.set_xlabel("head")
    return figure


def _loss_by_class(found: Findings) -> Figure:
    parts = found.by_class
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.5 * len(parts)))
    names = [f"{p.name} ({p.tokens / found.text.tokens:.0%} of tokens)" for p in parts]
    axes.barh(names, [p.nats.mean for p in parts], xerr=[_bar(p) for p in parts], capsize=3)
    for y, p in enumerate(parts):
        axes.text(
            p.nats.mean + _bar(p),
            y,
            f"  {p.share_of_loss:.0%} of the loss",
            va="center",
            fontsize=8,
        )
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xlabel="nats per token", title="Loss by class of the predicted token")
    return figure


def _loss_by_position(found: Findings) -> Figure:
    parts = found.by_position
    figure, axes = plt.subplots(figsize=(8, 4))
    means, errors = [p.nats.mean for p in parts], [_bar(p) for p in parts]
    axes.errorbar(range(len(parts)), means, yerr=errors, marker="o", capsize=3)
    axes.axhline(found.loss.mean, color="grey", linestyle=":", label="mean")
    axes.set_xticks(range(len(parts)), [p.name for p in parts], rotation=45)
    axes.set(xlabel="tokens before", ylabel="nats per token", title="Loss by position")
    axes.legend()
    return figure


def _bar(part: Part) -> float:
    """Length of an error bar; none where a part lies in one window alone."""
    return float(np.nan_to_num(part.nats.error))


def _calibration(found: Findings) -> Figure:
    bins = found.calibration.bins
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(5.5, 6.5), sharex=True, height_ratios=[3, 1]
    )
    upper.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfect")
    upper.plot([b.confidence for b in bins], [b.accuracy for b in bins], marker="o", label="model")
    upper.set(ylabel="share that was right", ylim=(0, 1), xlim=(0, 1))
    upper.set_title(f"Expected calibration error {found.calibration.error:.2%}")
    upper.legend()
    lower.bar([b.confidence for b in bins], [b.tokens for b in bins], width=0.04)
    lower.set(xlabel="probability of the likeliest token", ylabel="tokens")
    return figure


def _allocator(found: Findings) -> Figure:
    """Bytes against held-out loss, beside the frontier that the knapsack expects."""
    figure, axes = plt.subplots(figsize=(8.5, 5))
    axes.plot(
        [p.estimated_bytes / 1e6 for p in found.frontier],
        [p.expected_nats for p in found.frontier],
        color="grey",
        label="expected of the best choice, size estimated",
    )
    for i, s in enumerate(found.schemes):
        axes.errorbar(
            s.artifact_bytes / 1e6,
            s.change.mean,
            yerr=float(np.nan_to_num(s.change.error)),
            marker="s" if s.name.startswith("measured") else "o",
            capsize=3,
            color=f"C{i}",
            linestyle="none",
            label=f"{s.name}: {s.widths}",
        )
        axes.scatter(s.artifact_bytes / 1e6, s.expected_nats, color=f"C{i}", marker="x", zorder=3)
    axes.scatter([], [], color="black", marker="x", label="crosses: expected, exact size")
    sizes = [s.artifact_bytes / 1e6 for s in found.schemes]
    if found.limit_bytes / 1e6 < 2 * max(sizes):
        axes.axvline(found.limit_bytes / 1e6, color="red", linewidth=1, label="limit less code")
    middle = [s.change.mean + 2 * s.change.error for s in found.schemes]
    axes.set_ylim(min(0.0, *middle) * 1.1, max(middle) * 1.3)
    axes.set(xlabel="artifact, MB", ylabel="change of the held-out loss, nats per token")
    axes.set_title("Bits per matrix: what each scheme costs")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    return figure


PICTURES: dict[str, Callable[[Any], Figure]] = {
    "allocator": _allocator,
    "calibration": _calibration,
    "heads": _heads,
    "loss_by_class": _loss_by_class,
    "loss_by_position": _loss_by_position,
    "proxy": _proxy,
    "rank": _rank,
    "sensitivity": _sensitivity,
}
