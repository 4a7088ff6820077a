"""One small fault: a replacement in one source file, and the checks that must notice it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`old` occurs once in `file` and is replaced by `new`; `checks` are pytest arguments."""

    file: str
    what: str
    old: str
    new: str
    checks: tuple[str, ...]
