"""Settings back to the command line that gives them, whichever way the run was started."""

import dataclasses
from typing import Any

from trainer.config import RunConfig
from trainer.record import PRESETS

OWN_SETTINGS = ("name", "out", "seed", "data.dir")
"""Settings of one run alone: its seed, and what differs from machine to machine."""


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that the runs of one submission have in common, by dotted name."""
    settings = _flat(dataclasses.asdict(config))
    return {name: value for name, value in settings.items() if name not in OWN_SETTINGS}


def arguments_for(config: RunConfig) -> list[str]:
    """Preset and overrides of `python -m trainer` that give these shared settings."""
    settings = shared_settings(config)
    defaults = {preset: shared_settings(config) for preset, (_, config) in PRESETS.items()}
    apart = {
        preset: [name for name in settings if settings[name] != values[name]]
        for preset, values in defaults.items()
    }
    preset = min(apart, key=lambda name: len(apart[name]))
    words = [preset]
    for name in apart[preset]:
        words += _option(name.replace("_", "-"), settings[name])
    return words


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        section, _, last = name.rpartition(".")
        negated = f"{section}.no-{last}" if section else f"no-{last}"
        return [f"--{name if value else negated}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
