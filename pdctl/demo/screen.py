"""
What people see: each act as it happens, then a table. Draws what it is told, knows nothing of how it was measured.

On a terminal, bars move while requests run; elsewhere (a pipe, a CI log) every piece of news is one plain line.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from pdctl.demo.report import Check, Report


class Bar:
    """One request's progress; moved by whoever runs the request."""

    def __init__(self, progress: Progress, label: str, total: int) -> None:
        self._progress, self._total = progress, total
        self._task = progress.add_task(escape(label), total=total, note="")

    def at(self, done: int, note: str = "") -> None:
        self._progress.update(self._task, completed=min(done, self._total), note=escape(note))
        self._progress.refresh()


class Screen:
    """`async with screen.bars():` around what moves bars; everything else are lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = _progress(console)

    def title(self, text: str) -> None:
        self._console.print(f"[bold]{escape(text)}[/]", highlight=False)

    def act(self, number: int, name: str, what: str) -> None:
        self._console.print(f"\n[bold cyan]{number}. {escape(name)}[/]", highlight=False)
        self._console.print(f"   {escape(what)}", style="dim", highlight=False)

    def note(self, text: str) -> None:
        self._console.print(f"   {escape(text)}", highlight=False)

    def check(self, check: Check) -> None:
        mark = "[green]ok  [/]" if check.ok else "[bold red]FAIL[/]"
        expected = "" if check.ok else f" [red](expected: {escape(check.expected)})[/]"
        line = f"   {mark} {escape(check.name)}: [bold]{escape(check.measured)}[/]{expected}"
        self._console.print(line, highlight=False)
        if not check.ok:
            for evidence in check.evidence:
                self._console.print(f"        {escape(evidence)}", style="red", highlight=False)

    def bar(self, label: str, total: int) -> Bar:
        return Bar(self._progress, label, total)

    @asynccontextmanager
    async def bars(self) -> AsyncIterator[None]:
        """Draw bars on a terminal; elsewhere they stay silent, the lines say enough."""
        if not self._console.is_terminal:
            yield
            return
        self._progress = _progress(self._console)
        with self._progress:
            yield

    def finish(self, report: Report) -> None:
        self._console.print()
        self._console.print(_figures(report))
        if report.metric_lines:
            self._console.print("[bold]metrics that show it, from the prefill rank's /metrics[/]", highlight=False)
            for line in report.metric_lines:
                self._console.print(f"   {escape(line)}", highlight=False)
        n_ok = sum(check.ok for check in report.checks)
        style = "bold green" if report.ok else "bold red"
        verdict = f"{n_ok} of {len(report.checks)} checks ok, {report.seconds:.1f} s"
        self._console.print(f"\n[{style}]{verdict}[/]", highlight=False)


def _progress(console: Console) -> Progress:
    # auto_refresh would draw from a thread of its own; here only the event loop draws.
    return Progress(
        TextColumn("   {task.description:<14}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f} pages {task.fields[note]}"),
        console=console,
        auto_refresh=False,
        transient=False,
    )


def _figures(report: Report) -> Table:
    table = Table(title="what was moved, and how long each recovery took", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in report.figures.items():
        table.add_row(escape(name), escape(value))
    return table
