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
    made = Table(*columns, title=title or None, title_justify="left", title_style="bold")
    for row in rows:
        made.add_row(*(styled(str(cell)) for cell in row))
    return made
