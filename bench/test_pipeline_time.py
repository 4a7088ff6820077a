"""How long does everything around training take?"""

from collections.abc import Callable

import pytest

from bench import pipeline_cases as cases
from bench.measure import Case
from bench.scale import Scale
from trainer.artifact import Compressor
from trainer.config import SlotMode

Timed = Callable[[Case], None]


def test_loader(scale: Scale, timed: Timed) -> None:
    timed(cases.loader(scale))


def test_calibration(scale: Scale, timed: Timed) -> None:
    timed(cases.calibration(scale))


def test_gptq(scale: Scale, timed: Timed) -> None:
    timed(cases.gptq(scale))


def test_pruning(scale: Scale, timed: Timed) -> None:
    timed(cases.pruning(scale))


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_compression(scale: Scale, timed: Timed, compressor: Compressor) -> None:
    timed(cases.compression(scale, compressor))


@pytest.mark.parametrize("slot", ["off", "context", "shared"])
def test_scoring(scale: Scale, timed: Timed, slot: SlotMode) -> None:
    timed(cases.scoring(scale, slot))


def test_straight_scoring(scale: Scale, timed: Timed) -> None:
    timed(cases.straight_scoring(scale))
