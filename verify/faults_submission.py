"""Faults in what is submitted, and in how its code is counted."""

from verify.fault import Fault

_SUBMISSION = ("verify/test_submission.py",)

FAULTS = [
    Fault(
        "trainer/submission/pack.py",
        "a changed CUDA source does not count as a change",
        "sorted([*sources, *_device_sources()])",
        "sorted(sources)",
        _SUBMISSION,
    ),
    Fault(
        "trainer/submission/pack.py",
        "escaped NUL swallows a digit",
        '    text = re.sub("\\0(?=[0-7])", r"\\\\x00", text)',
        "    assert re",
        _SUBMISSION,
    ),
    Fault(
        "trainer/submission/pack.py",
        "CUDA sources not packed",
        "    for path in _device_sources():\n",
        "    for path in _device_sources()[:0]:\n",
        _SUBMISSION,
    ),
    Fault(
        "trainer/submission/pack.py",
        "imports inside functions not followed",
        "    for node in ast.walk(tree):",
        "    for node in tree.body:",
        _SUBMISSION,
    ),
    Fault(
        "trainer/submission/start.py",
        "archive not checked",
        "    if hashlib.sha256(data).hexdigest() != DIGEST:",
        "    if not hashlib.sha256(data).hexdigest():",
        _SUBMISSION,
    ),
    Fault(
        "trainer/submission/start.py",
        "the second of two ranks gives up",
        "        if not folder.is_dir():",
        "        if folder.is_dir():",
        _SUBMISSION,
    ),
    Fault(
        "trainer/submission/contents.py",
        "smallest total instead of the largest",
        '"bytes_total": max(',
        '"bytes_total": min(',
        _SUBMISSION,
    ),
    Fault(
        "trainer/submission/contents.py",
        "causal if any seed was",
        "all(run.causal(self.mode) for run in self.runs)",
        "len(self.runs) > 0",
        _SUBMISSION,
    ),
    Fault(
        "trainer/submission/__main__.py",
        "limit off by one",
        "if total > SIZE_LIMIT_BYTES:",
        "if total > SIZE_LIMIT_BYTES + 1:",
        _SUBMISSION,
    ),
    Fault(
        "trainer/submission/runs.py",
        "artifact not compared with the one scored",
        'stages["artifact"]["sha256"]:',
        'stages["artifact"]["sha256"][:0]:',
        _SUBMISSION,
    ),
]
