"""Texts coloured by surprise, side by side: in a terminal and as one HTML file.

The colour of a piece grows from white to red as its surprise goes from 0 to ln V nats, where the
model did no better than a uniform guess.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from trainer.surprise import Piece, Token, mean_nats

CALM_RGB, HOT_RGB = (255, 255, 255), (240, 80, 50)
LEGEND_STEPS = 12
NEWLINE_MARK, TAB_MARK = "\u21b5", "\u2192"
CONTROL_PICTURES = 0x2400
"""Unicode's pictures of the control characters 0..31 begin here."""


@dataclass(frozen=True)
class Column:
    """One text as one model sees it."""

    title: str
    pieces: Sequence[Piece]

    @property
    def figures(self) -> str:
        """Mean surprise of what was given and what was written, for a caption."""
        parts = [
            f"{name}: {nats:.3f} nats/token"
            for name, given in (("given", True), ("written", False))
            if not math.isnan(nats := mean_nats(self.pieces, given=given))
        ]
        return "; ".join(parts)


def visible(text: str) -> str:
    """`text` without anything that steers a terminal or turns a line around.

    Line breaks and tabs get a mark before them, control characters become pictures, and what
    else cannot be printed (U+202E and the like) becomes U+FFFD.
    """
    return "".join(_visible_character(c) for c in text)


def _visible_character(c: str) -> str:
    if c == "\n":
        return NEWLINE_MARK + c
    if c == "\t":
        return TAB_MARK + c
    if c.isprintable() or c == "\N{NO-BREAK SPACE}":
        return c
    if ord(c) < 0x20:
        return chr(CONTROL_PICTURES + ord(c))
    return "\N{REPLACEMENT CHARACTER}"


def colour(nats: float | None, vocab_size: int) -> tuple[int, int, int]:
    """Red, green and blue of a surprise; white where nothing predicts the piece."""
    share = min(1.0, max(0.0, (nats or 0.0) / math.log(vocab_size)))
    red, green, blue = (
        round(calm + share * (hot - calm)) for calm, hot in zip(CALM_RGB, HOT_RGB, strict=True)
    )
    return red, green, blue


# In a terminal.


def print_columns(console: Console, columns: Sequence[Column], vocab_size: int) -> None:
    """Print the texts side by side, given text underlined, and a legend."""
    table = Table(expand=True, show_lines=True)
    for column in columns:
        table.add_column(visible(column.title), ratio=1, overflow="fold")
    table.add_row(*(_styled(column.pieces, vocab_size) for column in columns))
    table.add_row(*(column.figures for column in columns))
    console.print(table)
    console.print(_legend(vocab_size))


def _styled(pieces: Sequence[Piece], vocab_size: int) -> Text:
    text = Text()
    for piece in pieces:
        text.append(visible(piece.text), _style(piece.nats, vocab_size, underline=piece.given))
    return text


def _style(nats: float | None, vocab_size: int, *, underline: bool = False) -> Style:
    red, green, blue = colour(nats, vocab_size)
    return Style(color="black", bgcolor=f"rgb({red},{green},{blue})", underline=underline)


def _legend(vocab_size: int) -> Text:
    text = Text("surprise: 0 ")
    top = math.log(vocab_size)
    for i in range(LEGEND_STEPS):
        text.append("  ", _style(top * i / (LEGEND_STEPS - 1), vocab_size))
    text.append(f" {top:.2f} nats (a uniform guess); ")
    text.append("given", Style(underline=True))
    return text.append(" text is underlined")


# As HTML.

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 16px/1.7 system-ui, sans-serif; margin: 2rem; background: #fff; color: #111 }}
main {{ display: grid; grid-template-columns: repeat({count}, minmax(0, 1fr)); gap: 2rem }}
@media (max-width: 50rem) {{ main {{ grid-template-columns: minmax(0, 1fr) }} }}
h2 {{ font-size: 1rem; margin: 0; overflow-wrap: anywhere }}
p.text {{ white-space: pre-wrap; overflow-wrap: anywhere }}
p.text span {{ border-radius: 2px; unicode-bidi: isolate }}
p.text span:hover {{ outline: 2px solid #111 }}
.given {{ text-decoration: underline dotted }}
.small {{ color: #555; font-size: .85rem }}
.scale {{ display: inline-block; width: 8rem; height: .8em; margin: 0 .4em;
  background: linear-gradient(to right, {calm}, {hot}); border: 1px solid #999 }}
</style>
<h1>{title}</h1>
<p class="small">surprise: 0<span class="scale"></span>{top:.2f} nats (a uniform guess). Point at a
piece for its figures. <span class="given">Given</span> text is underlined. {note}</p>
<main>
{columns}
</main>
</html>
"""


def html_page(title: str, note: str, columns: Sequence[Column], vocab_size: int) -> str:
    """One self-contained page: no scripts, nothing loaded. Pointing at a piece shows its tokens."""
    return _PAGE.format(
        title=html.escape(title),
        note=html.escape(note),
        count=len(columns),
        calm=_css(CALM_RGB),
        hot=_css(HOT_RGB),
        top=math.log(vocab_size),
        columns="\n".join(_html_column(column, vocab_size) for column in columns),
    )


def _html_column(column: Column, vocab_size: int) -> str:
    spans = "".join(_html_piece(piece, vocab_size) for piece in column.pieces)
    return (
        f"<section><h2>{html.escape(column.title)}</h2>\n"
        f'<p class="text">{spans}</p>\n<p class="small">{column.figures}</p></section>'
    )


def _html_piece(piece: Piece, vocab_size: int) -> str:
    hover = html.escape("\n".join(_describe(token) for token in piece.tokens))
    given = ' class="given"' if piece.given else ""
    background = _css(colour(piece.nats, vocab_size))
    text = html.escape(visible(piece.text))
    return f'<span{given} style="background:{background}" title="{hover}">{text}</span>'


def _describe(token: Token) -> str:
    name = visible(token.name)
    if token.surprise is None:
        return f"{name}: the beginning, predicted by nothing"
    return f"{name}: {token.surprise.nats:.3f} nats, rank {token.surprise.rank}"


def _css(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)
