"""
How commands show rows: a table for a person at a terminal, one plain line a row for whatever reads a pipe.

Never a colour code into a pipe; none at a terminal either where NO_COLOR is set. What was read elsewhere is shown as
text and never as markup, and what it could do to a terminal is taken out of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

STYLES: Mapping[str, str] = {
    **dict.fromkeys(("kept", "ready", "alive", "trusted", "yes"), "green"),
    **dict.fromkeys(("broken", "dead", "lost", "blocked", "dropped"), "bold red"),
    **dict.fromkeys(("untried", "suspect", "draining", "trial", "not ready", "missing"), "yellow"),
}
"""Words that stand for a state, and how they look: never the only sign of it."""


_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def nbytes(number: float) -> str:
    """`1.2 GB`: powers of 1000, as networks are sold."""
    unit = 0
    while number >= 999.5 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.0f} {_UNITS[unit]}" if unit == 0 or number >= 100 else f"{number:.1f} {_UNITS[unit]}"


def seconds(number: float) -> str:
    """`0.4 s`, `12 s`, `3 min`, `5 h`, `2 d`: as much as a person wants of it."""
    for most, unit, each in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if number < most:
            return f"{number:.1f} {unit}" if each == 1 and number < 10 else f"{number / each:.0f} {unit}"
    return f"{number / 86_400:.0f} d"


def console(file: TextIO | None = None) -> Console:
    return Console(file=file or sys.stdout, highlight=False, markup=False, emoji=False)


def shown(value: object) -> str:
    """`value` without anything that would move a cursor, turn a line round or end it."""
    return _UNSHOWN.sub("?", str(value))


def styled(word: str) -> Text:
    return Text(shown(word), style=STYLES.get(word, ""))


def show(to: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """On a terminal a table with a heading; elsewhere each row as one line, two spaces between columns at least."""
    listed = [[shown(cell) for cell in row] for row in rows]
    if to.is_terminal:
        to.print(table(columns, listed, title))
        return
    if title:
        print(title, file=to.file)
    widths = [max(map(len, column)) for column in zip(columns, *listed, strict=True)]
    for row in (list(columns), *listed):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=to.file)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> Table:
    made = Table(title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")  # what is cut off cannot be looked for
    for row in rows:
        made.add_row(*(styled(str(cell)) for cell in row))
    return made
