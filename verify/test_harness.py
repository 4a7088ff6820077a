"""Claims about the harness itself: it can fail, says why, and counts what it did."""

import math
from pathlib import Path

import pytest
import torch

from verify import mutate, tolerance
from verify.fault import Fault
from verify.faults import FAULTS
from verify.tolerance import check, kernel_budget, relative_error, rounding_budget

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[1]


def test_check_refuses_excess_and_nan() -> None:
    """A numeric check fails above its limit and on NaN, naming both figures."""
    check("fine", 1e-3, 1e-3)
    with pytest.raises(AssertionError, match=r"2\.000e-03 exceeds the allowed 1\.000e-03"):
        check("too much", 2e-3, 1e-3)
    with pytest.raises(AssertionError):
        check("not a number", math.nan, 1.0)


def test_relative_error_never_forgives_infinity_or_a_zero_reference() -> None:
    """NaN or infinity in a result is an infinite error; a zero reference wants an exact zero."""
    ones = torch.ones(3)
    assert relative_error(ones * 1.5, ones) == 0.5
    assert relative_error(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf
    assert relative_error(torch.tensor([math.inf]), torch.ones(1)) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.full((2,), 1e-30), torch.zeros(2)) == math.inf


def test_budgets_are_the_stated_formulas() -> None:
    """A kernel gets twice plain PyTorch's error plus one rounding; a chain gets gamma_n."""
    reference = torch.ones(4, dtype=torch.float64)
    plain = reference * (1 + 2.0**-8)
    assert kernel_budget(plain, reference, torch.bfloat16) == 2 * 2.0**-8 + 2.0**-8
    assert rounding_budget(3, torch.float32) == pytest.approx(3 * 2.0**-24, rel=1e-5)
    with pytest.raises(ValueError, match="no correct digit"):
        rounding_budget(1000, torch.bfloat16)


def test_every_fault_still_applies(tmp_path: Path) -> None:
    """Each listed fault changes its source file in exactly one place."""
    assert len({(f.file, f.old, f.new) for f in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        copy = tmp_path / fault.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((ROOT / fault.file).read_text())
        mutate.apply(fault, tmp_path)
        assert copy.read_text() != (ROOT / fault.file).read_text()
        assert fault.checks, fault.what
        for check_path in (c for c in fault.checks if c.startswith("verify/")):
            assert (ROOT / check_path.split("::")[0]).exists(), check_path


def test_a_stale_fault_is_refused(tmp_path: Path) -> None:
    """A fault whose text is gone, or stands twice, is an error and not a survivor."""
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for old in ("x = 1", "y = 1"):
        with pytest.raises(ValueError, match="not once"):
            mutate.apply(Fault("a.py", "stale", old, "z = 1", ()), tmp_path)


def test_a_fault_no_check_notices_survives() -> None:
    """The mutation runner reports a harmless change as a survivor and a harmful one as noticed."""
    where, claim = (
        "verify/tolerance.py",
        "verify/test_harness.py::test_budgets_are_the_stated_formulas",
    )
    harmless = Fault(where, "words", "No check picks its own", "No check chooses its own", (claim,))
    harmful = Fault(
        where, "budget", "return 2 * relative_error", "return 3 * relative_error", (claim,)
    )
    assert mutate.judge(harmless).noticed_by == ""
    assert "test_budgets" in mutate.judge(harmful).noticed_by
    text = mutate.table([mutate.judge(harmless)])
    assert "1 survivors" in text
    assert "**survived**" in text


def test_proof_sheet_shows_claims_cases_and_worst_errors(pytester: pytest.Pytester) -> None:
    """The proof sheet lists claim, generated cases, worst error against allowed, and failures."""
    pytester.makeconftest('pytest_plugins = ["verify.proof_sheet"]')
    pytester.makepyfile(
        """
        import pytest
        from hypothesis import given, settings, strategies as st
        from verify.tolerance import check

        @settings(max_examples=7, database=None)
        @given(st.integers())
        def test_generated(x):
            '''Integers are integers. More words.'''
            check("half", 0.5, 1.0)
            check("quarter", 0.25, 1.0)

        def test_broken():
            '''Two is three.'''
            check("two against three", 1.0, 0.5)

        @pytest.mark.skip(reason="needs a quantum computer")
        def test_skipped():
            '''Cats are dead and alive.'''
        """
    )
    result = pytester.runpytest_subprocess("--report", "PROOF.md", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*Claim that does not hold*", "*Two is three*"])
    sheet = (pytester.path / "PROOF.md").read_text()
    assert "1 failed, 1 passed, 1 skipped" in sheet
    row = next(line for line in sheet.splitlines() if "Integers are integers |" in line)
    assert "7 generated" in row
    assert "5.00e-01 (half) | 1.00e+00" in row
    assert "needs a quantum computer" in sheet
    assert sheet.index("Two is three") < sheet.index("Integers are integers")


def test_listeners_hear_every_comparison() -> None:
    """Every numeric comparison reaches the proof sheet, failing ones included."""
    heard: list[tuple[str, float, float]] = []
    listener = lambda *args: heard.append(args)  # noqa: E731
    tolerance.listeners.append(listener)
    try:
        check("one", 0.0, 1.0)
        with pytest.raises(AssertionError):
            check("two", 2.0, 1.0)
    finally:
        tolerance.listeners.remove(listener)
    assert heard == [("one", 0.0, 1.0), ("two", 2.0, 1.0)]
