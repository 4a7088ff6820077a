"""C++ sources without comments and needless white space, the same token for token, line for line.

Raw strings, and lines continued outside a preprocessor directive, are refused: none occurs here.
"""

import re
from collections.abc import Iterator

_GAP = r"(?P<gap>(?:\s|//[^\n]*|/\*[\s\S]*?\*/)+)"
_DIRECTIVE = r"(?P<directive>#(?:\\\n|[^\n])*)"  # C++ has no other use for a # of its own
_TOKEN = (
    r'(?:(?:u8|[uUL])?"(?:\\.|[^"\\\n])*"\w*'  # a string takes the word after it for its suffix
    r"|(?:u8|[uUL])?'(?:\\.|[^'\\\n])+'\w*"
    r"|\.?\d(?:[eEpP][-+]|'\w|[\w.])*"  # a number as the preprocessor reads it: 0xE-1 is one
    r'|(?!\w*R")[\w@]+'  # @ stands around what kernels/build.py fills in
    r"|[<>]\?=?"  # GNU's minimum and maximum, which nvcc still reads
    r"|<=>|->\*|\.\.\.|<<=|>>=|::|->|\.\*|\+\+|--|<<|>>|&&|\|\||##|[-+*/%&|^<>=!]=|<[:%]|[:%]>|%:"
    r"|(?!/[/*])[^\s\w\\\"'])"
)
_IN_CODE = re.compile(f"{_GAP}|{_DIRECTIVE}|{_TOKEN}")
_IN_DIRECTIVE = re.compile(f"{_GAP}|{_TOKEN}")


def strip(source: str) -> str:
    """`source` with neither empty lines nor spaces that part nothing.

    Raises:
        ValueError: C++ that this reader does not know; the message shows the line.
    """
    text, last = "", "\n"
    for token in tokens(source):
        joined = _IN_CODE.match(last + token)
        # A space stays where the first of two would be read as something else without it.
        apart = "\n" not in last + token and (joined is None or joined[0] != last)
        text += f" {token}" if apart else token
        last = token
    return text


def tokens(source: str) -> list[str]:
    """Every token of `source`, directives and ends of lines that are not empty among them.

    Lines stay as they are for the sake of macros: CUTLASS_PRAGMA_UNROLL makes a directive of its
    line for nvcc.

    Raises:
        ValueError: as `strip`.
    """
    found: list[str] = []
    for match in _read(_IN_CODE, f"{source}\n"):
        if match["directive"] is not None:
            # Spaces within may matter: `#define F (x)` is not `#define F(x)`.
            pieces = _read(_IN_DIRECTIVE, match[0].replace("\\\n", " "))
            found.append("".join(" " if piece["gap"] else piece[0] for piece in pieces).rstrip())
        elif match["gap"] is None:
            found.append(match[0])
        elif found and "\n" in match[0]:
            found.append("\n")
    return found


def _read(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    position = 0
    while position < len(text):
        match = pattern.match(text, position)
        if match is None:
            line = text[position:].split("\n", 1)[0]
            raise ValueError(f"C++ that cannot be stripped: {line!r}")
        yield match
        position = match.end()
