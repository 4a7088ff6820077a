"""Faults in generation, surprise and the ablations."""

from verify.fault import Fault

_GENERATE = ("verify/test_generate.py",)
_ABLATIONS = (
    "verify/test_ablations.py",
    "--deselect=verify/test_ablations.py::test_a_signal_reaches_the_run",
)

FAULTS = [
    Fault(
        "trainer/sampling.py",
        "top-p drops the token that reaches the share",
        "before >= top_p",
        "before + ordered >= top_p",
        _GENERATE,
    ),
    Fault(
        "trainer/sampling.py",
        "the prompt is not read",
        "        if P > 1:\n",
        "        if P > 2:\n",
        _GENERATE,
    ),
    Fault(
        "trainer/generate.py",
        "every window draws with the first numbers again",
        "uniform_N1[done : done + count]",
        "uniform_N1[:count]",
        _GENERATE,
    ),
    Fault(
        "trainer/surprise.py",
        "ranks count from nought",
        "ranks_N[at_S] = 1 + ",
        "ranks_N[at_S] = 0 + ",
        _GENERATE,
    ),
    Fault(
        "trainer/surprise.py",
        "surprise belongs to the token before",
        "known: list[Surprise | None] = [None, *found]",
        "known: list[Surprise | None] = [*found, None]",
        _GENERATE,
    ),
    Fault(
        "trainer/surprise.py",
        "a broken character swallows the next token",
        "            first, state = i, _state(part)\n",
        "            first = i\n",
        _GENERATE,
    ),
    Fault(
        "trainer/colour.py",
        "escape sequences reach the terminal",
        "return chr(CONTROL_PICTURES + ord(c))",
        "return c",
        _GENERATE,
    ),
    Fault(
        "trainer/colour.py",
        "text is not escaped for HTML",
        "text = html.escape(visible(piece.text))",
        "text = visible(piece.text)",
        _GENERATE,
    ),
    Fault(
        "trainer/ablations/share.py",
        "SWA rows take the EMA",
        'prefix = f"{run.weights}."',
        'prefix = "ema."',
        _ABLATIONS,
    ),
    Fault(
        "trainer/ablations/rows.py",
        "the SWA row keeps the calibration of the base",
        'source=BOTH_AVERAGES, weights="swa")',
        'source=BASE, weights="averaged")',
        _ABLATIONS,
    ),
    Fault(
        "trainer/ablations/claims.py",
        "noise of one training, not of a difference",
        "NOISE_DEVIATIONS = 2 * math.sqrt(2)",
        "NOISE_DEVIATIONS = 2.0",
        _ABLATIONS,
    ),
    Fault(
        "trainer/ablations/claims.py",
        "any gain at all proves a published one",
        "value >= claim.published / 2",
        "value > 0",
        _ABLATIONS,
    ),
    Fault(
        "trainer/ablations/__main__.py",
        "rows of other settings join the table",
        "elif (known := json.loads(path.read_text())) != settings:",
        "elif (known := json.loads(path.read_text())) and False:",
        _ABLATIONS,
    ),
    Fault(
        "trainer/ablations/execute.py",
        "a failed run counts as finished",
        "    if launch(arguments) != 0:\n",
        "    if launch(arguments) < 0:\n",
        _ABLATIONS,
    ),
]
