"""
`./dev bench [NAME ...]`: every module of this folder that has a `bench() -> list[Row]`, or only those named.

Times are of this machine in this minute; the ratios are what to look at, and their spread says how far to trust them.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import statistics
import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

import tests.bench
from tests.bench.rivals import Row


def main(wanted: Sequence[str]) -> int:
    console = Console(width=None if sys.stdout.isatty() else 150)
    there = names()
    if unknown := sorted(set(wanted) - set(there)):
        console.print(f"no bench is called {', '.join(unknown)}: there are {', '.join(there)}")
        return 2
    for name in wanted or there:
        module = importlib.import_module(f"tests.bench.{name}")
        rows: list[Row] = module.bench()
        console.print(f"\n[bold]{name}[/]  {(module.__doc__ or '').strip()}")
        if rows:
            console.print(table(rows))
    console.print(
        f"\npython {platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}. Both sides take turns; medians; above 1 x ours is the faster one."
    )
    return 0


def names() -> list[str]:
    """The modules here that can be run: found, not listed."""
    found = sorted(module.name for module in pkgutil.iter_modules(tests.bench.__path__))
    return [
        name
        for name in found
        if name != "__main__" and hasattr(importlib.import_module(f"tests.bench.{name}"), "bench")
    ]


def table(rows: Sequence[Row]) -> Table:
    shown = Table("what", "ours", "rival", "ratio", "of single rounds", "rounds")
    for row in rows:
        low, high = row.spread
        shown.add_row(
            row.what,
            f"{row.ours} {readable(statistics.median(row.ours_s), row.unit)}",
            f"{row.rival} {readable(statistics.median(row.rival_s), row.unit)}",
            f"{row.ratio:.2f} x",
            f"{low:.2f} to {high:.2f}",
            str(len(row.ours_s)),
        )
    return shown


def readable(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / (1 << 20):.1f} MiB"
    if unit != "s":
        return f"{value:.2f} {unit}"
    return f"{value * 1e6:.1f} us" if value < 1e-3 else f"{value * 1e3:.2f} ms"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
