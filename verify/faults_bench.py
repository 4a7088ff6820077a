"""Faults in ranks' watch over each other, the gate, and the scaling bench."""

from verify.fault import Fault

_STUCK = ("verify/test_parallel.py::test_a_rank_that_hangs_without_its_peer_is_ended",)
_GATE = (
    "verify/test_gate.py",
    "--deselect=verify/test_gate.py::"
    "test_pytest_bench_fails_on_a_missing_baseline_and_on_a_slower_subject",
)
_SCALING = ("verify/test_scaling.py", "-k", "overlap or hidden or agree or share or state")

FAULTS = [
    Fault(
        "trainer/ranks.py",
        "a rank stuck without its peer gets no alarm",
        "        signal.alarm(grace_s)\n",
        "",
        _STUCK,
    ),
    Fault(
        "trainer/ranks.py",
        "a rank that stops on an error does not tell its peers",
        "if failed and not self._failed:",
        "if failed and self._failed:",
        _STUCK,
    ),
    Fault(
        "bench/gate.py",
        "noise between processes does not count",
        "math.hypot(self.within, self.between)",
        "self.within",
        _GATE,
    ),
    Fault(
        "bench/gate.py",
        "two processes that agree by luck are believed",
        "expected = PRIOR_WEIGHT * PRIOR_BETWEEN**2",
        "expected = 0.0",
        _GATE,
    ),
    Fault(
        "bench/gate.py",
        "extending a baseline forgets its first process",
        'before["processes"] + processes',
        'before["processes"][1:] + processes',
        _GATE,
    ),
    Fault(
        "bench/overlap.py",
        "communication hides under communication",
        "for e in kernels if not _is_communication(e)])",
        "for e in kernels])",
        _SCALING,
    ),
    Fault(
        "bench/overlap.py",
        "the next interval of the wrong list",
        "if a[i][1] < b[j][1]:",
        "if a[i][1] > b[j][1]:",
        _SCALING,
    ),
    Fault(
        "bench/agreement.py",
        "the worst block of losses is not kept",
        "worst = max(worst, ",
        "worst = min(worst, ",
        _SCALING,
    ),
    Fault(
        "bench/rank_loss.py",
        "only the first resumed step is compared",
        "later_difference=max(differences[1:])",
        "later_difference=differences[0]",
        _SCALING,
    ),
]
