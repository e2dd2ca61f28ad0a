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
        self._line(f"[bold]{escape(text)}[/]")

    def act(self, number: int, name: str, what: str) -> None:
        self._line(f"\n[bold cyan]{number}. {escape(name)}[/]")
        self._line(f"   {escape(what)}", style="dim")

    def note(self, text: str) -> None:
        self._line(f"   {escape(text)}")

    def call(self, text: str) -> None:
        """What a person is to do, or to look at, now."""
        self._line(f"   [bold yellow]{escape(text)}[/]")

    def check(self, check: Check) -> None:
        mark = "[green]ok  [/]" if check.ok else "[bold red]FAIL[/]"
        expected = "" if check.ok else f" [red](expected: {escape(check.expected)})[/]"
        self._line(f"   {mark} {escape(check.name)}: [bold]{escape(check.measured)}[/]{expected}")
        if not check.ok:
            for evidence in check.evidence:
                self._line(f"        {escape(evidence)}", style="red")

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
        self._line("\n[bold]what was moved, and how long each recovery took[/]")
        self._console.print(_figures(report) if self._console.is_terminal else _as_lines(report), soft_wrap=True)
        if report.metric_lines:
            self._line("[bold]metrics that show it, from the prefill rank's /metrics[/]")
        for line in report.metric_lines:
            self._line(f"   {escape(line)}")
        n_ok = sum(check.ok for check in report.checks)
        style = "bold green" if report.ok else "bold red"
        self._line(f"\n[{style}]{n_ok} of {len(report.checks)} checks ok, {report.seconds:.1f} s[/]")

    def _line(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, highlight=False, soft_wrap=True)


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
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in report.figures.items():
        table.add_row(escape(name), escape(value))
    return table


def _as_lines(report: Report) -> str:
    return "\n".join(f"   {escape(name)}: {escape(value)}" for name, value in report.figures.items())
