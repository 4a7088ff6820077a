"""A profile as text: the component table, the top kernels, the summary in Markdown."""

from profiles.profile import SUM_TOLERANCE, Profile

TOP_KERNELS = 12


def markdown(profile: Profile) -> str:
    """The whole summary."""
    return (
        "\n\n".join(
            (
                f"# {profile.title}",
                _origin(profile),
                _components(profile),
                _wall(profile),
                _kernels(profile),
                _counters(profile),
            )
        ).rstrip()
        + "\n"
    )


def _origin(p: Profile) -> str:
    e = p.environment
    device = e.get("device") if p.on_gpu else f"{e.get('cpu')}, {e.get('cores')} cores"
    torch_version = e.get("packages", {}).get("torch")
    return (
        f"Source: {p.source}. {device}; torch {torch_version}; commit {e.get('commit')}.\n"
        f"Ceilings measured in the same process: {p.ceilings.tflops:.3g} TFLOP/s, "
        f"{p.ceilings.gbytes:.4g} GB/s."
    )


def _components(p: Profile) -> str:
    lines = [
        "| component | ms | share | launches | TFLOP/s | of ceiling | GB/s | of ceiling |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for c in p.components:
        rates = ["", "", "", ""]
        if c.flops:
            rates[:2] = f"{c.tflops:.3g}", f"{c.tflops / p.ceilings.tflops:.0%}"
        if c.bytes:
            rates[2:] = f"{c.gbytes:.4g}", f"{c.gbytes / p.ceilings.gbytes:.0%}"
        figures = [f"{c.ms:.3f}", f"{c.ms / p.step_ms:.1%}", f"{c.launches:.0f}", *rates]
        lines.append(f"| {c.name} | {' | '.join(figures)} |")
    total = p.busy_ms + p.gap_ms
    lines.append(f"| **sum** | {total:.3f} | {total / p.step_ms:.1%} | {p.launches:.0f} | | | | |")
    return "\n".join(lines)


def _wall(p: Profile) -> str:
    what = "GPU busy" if p.on_gpu else "operations"
    communication = sum(c.ms for c in p.components if c.name == "communication")
    within = "within" if abs(p.sum_error) <= SUM_TOLERANCE else "NOT within"
    return (
        f"Wall clock of a profiled step {p.step_ms:.3f} ms ({p.unprofiled_ms:.3f} ms without the "
        f"profiler): {what} {p.busy_ms - communication:.3f} ms, communication "
        f"{communication:.3f} ms, CPU gap {p.gap_ms:.3f} ms. The sum is {p.sum_error:+.1%} off the "
        f"measured step, {within} {SUM_TOLERANCE:.0%}."
    )


def _kernels(p: Profile) -> str:
    what = "kernel" if p.on_gpu else "operation"
    lines = [f"| {what} | component | ms | launches |", "| --- | --- | ---: | ---: |"]
    for k in p.kernels[:TOP_KERNELS]:
        name = k.name if len(k.name) <= 70 else f"{k.name[:67]}..."
        name = name.replace("|", "/")
        lines.append(f"| `{name}` | {k.component} | {k.ms:.3f} | {k.launches:.0f} |")
    return "\n".join(lines)


def _counters(p: Profile) -> str:
    """Nsight's figures; kernel times there are of kernels replayed alone."""
    if not p.counters:
        return ""
    total = sum(row["time_ms"] for row in p.counters)
    lines = [
        f"Nsight Compute, every kernel replayed alone: {total:.3f} ms in all.",
        "",
        "| component | ms alone | tensor pipe busy | DRAM GB/s | of ceiling |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in p.counters:
        lines.append(
            f"| {row['component']} | {row['time_ms']:.3f} | {row['tensor_pct']:.0f}% | "
            f"{row['dram_gbytes']:.0f} | {row['dram_gbytes'] / p.ceilings.gbytes:.0%} |"
        )
    return "\n".join(lines)
