"""Lines where there is no terminal, bars where there is one; a failed check shows its evidence."""

from __future__ import annotations

import io

from rich.console import Console

from pdctl.demo.report import Check, Moved, Report
from pdctl.demo.screen import Screen

GOOD = Check(2, "tokens equal", True, "64 of 64 equal", "every token equal", ("not shown",))
BAD = Check(3, "fails fast", False, "900 ms", "under 100 ms", ("prefill: [a] line of the log",))


def screen_of(*, terminal: bool) -> tuple[Screen, io.StringIO]:
    told = io.StringIO()
    return Screen(Console(file=told, force_terminal=terminal, width=120, color_system=None)), told


async def test_without_a_terminal_every_piece_of_news_is_one_plain_line() -> None:
    screen, told = screen_of(terminal=False)
    screen.act(2, "the main job", "prompts move")
    async with screen.bars():
        screen.bar("one", 10).at(5)
    screen.check(GOOD)
    assert told.getvalue().splitlines() == [
        "",
        "2. the main job",
        "   prompts move",
        "   ok   tokens equal: 64 of 64 equal",
    ]
    assert "\x1b" not in told.getvalue()


async def test_on_a_terminal_bars_move() -> None:
    screen, told = screen_of(terminal=True)
    async with screen.bars():
        bar = screen.bar("one", 10)
        bar.at(4, "[x] moving")
        bar.at(99)
    assert "4/10 pages [x] moving" in told.getvalue()
    assert "10/10 pages" in told.getvalue()


def test_a_failed_check_shows_what_was_expected_and_its_evidence() -> None:
    screen, told = screen_of(terminal=False)
    screen.check(BAD)
    screen.check(GOOD)
    assert "FAIL fails fast: 900 ms (expected: under 100 ms)" in told.getvalue()
    assert "prefill: [a] line of the log" in told.getvalue()
    assert "not shown" not in told.getvalue()


def test_the_end_shows_figures_metrics_and_the_verdict() -> None:
    screen, told = screen_of(terminal=False)
    report = Report(
        [GOOD, BAD], Moved(), {"recovery": "0.3 s"}, ["sglang:failed_session_recoveries_total 1.0"], seconds=2.0
    )
    screen.finish(report)
    assert "recovery" in told.getvalue()
    assert "0.3 s" in told.getvalue()
    assert "sglang:failed_session_recoveries_total 1.0" in told.getvalue()
    assert "1 of 2 checks ok, 2.0 s" in told.getvalue()
