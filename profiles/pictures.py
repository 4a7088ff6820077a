"""PNG pictures: the step as a stacked bar, the roofline, and a subject over stored runs."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from profiles.profile import Profile
from trainer.files import atomic_path

SMALL_SHARE = 0.01
COLOURS = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]


def stacked_bars(path: Path, profiles: dict[str, Profile]) -> None:
    """One horizontal bar a profile, cut into components; small ones are gathered."""
    longest = max(p.step_ms for p in profiles.values())
    names: list[str] = []
    for p in profiles.values():
        for c in p.components:
            if c.ms >= SMALL_SHARE * longest and c.name not in names:
                names.append(c.name)
    names.append("everything smaller")
    figure, axes = plt.subplots(figsize=(11, 2.6 + 0.9 * len(profiles)))
    left = [0.0] * len(profiles)
    for n, name in enumerate(names):
        widths = [_width(p, name, names) for p in profiles.values()]
        axes.barh(list(profiles), widths, left=left, label=name, color=COLOURS[n % len(COLOURS)])
        for y, width in enumerate(widths):
            if width > 0.05 * longest:
                middle = left[y] + width / 2
                axes.text(middle, y, f"{width:.3g}", ha="center", va="center", fontsize=8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("ms of one training step")
    axes.invert_yaxis()
    axes.legend(
        ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22 / len(profiles) - 0.12)
    )
    _save(figure, path)


def _width(p: Profile, name: str, shown: list[str]) -> float:
    if name == "everything smaller":
        return sum(c.ms for c in p.components if c.name not in shown)
    return sum(c.ms for c in p.components if c.name == name)


def roofline(path: Path, profile: Profile) -> None:
    """Components of known work under the measured roof."""
    points = [c for c in profile.components if c.flops and c.bytes and c.ms]
    roof = profile.ceilings
    ridge = 1000 * roof.tflops / roof.gbytes
    intensities = [c.flops / c.bytes for c in points]
    low = min([*intensities, ridge]) / 3
    high = max([*intensities, ridge]) * 3
    figure, axes = plt.subplots(figsize=(8, 5))
    axes.plot(
        [low, ridge, high],
        [low * roof.gbytes / 1000, roof.tflops, roof.tflops],
        color="black",
        label=f"measured: {roof.tflops:.3g} TFLOP/s, {roof.gbytes:.4g} GB/s",
    )
    for n, (c, intensity) in enumerate(zip(points, intensities, strict=True)):
        label = f"{c.name}: {c.tflops:.3g} TFLOP/s"
        axes.scatter(intensity, c.tflops, color=COLOURS[n % len(COLOURS)], label=label, zorder=3)
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
    axes.set_xlabel("FLOP per byte, every tensor moved once")
    axes.set_title(profile.title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)


def trend(path: Path, subject: str, runs: list[tuple[str, dict[str, Any]]]) -> None:
    """Ratios of a subject to its reference over stored runs, oldest first, with their spread."""
    figure, axes = plt.subplots(figsize=(8, 4))
    middles = [sorted(entry["ratios"])[len(entry["ratios"]) // 2] for _, entry in runs]
    lows = [m - min(e["ratios"]) for m, (_, e) in zip(middles, runs, strict=True)]
    highs = [max(e["ratios"]) - m for m, (_, e) in zip(middles, runs, strict=True)]
    axes.errorbar(range(len(runs)), middles, yerr=[lows, highs], marker="o", capsize=3)
    axes.set_xticks(range(len(runs)), [name for name, _ in runs], rotation=60, fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"time / {runs[-1][1]['reference']}")
    axes.set_title(subject)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
