"""What the demo adds for those who watch its page: it waits, it stays, and being told to stop is its end."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from dataclasses import dataclass, field
from typing import cast

import pytest
from rich.console import Console

from pdctl.demo.screen import Screen
from pdctl.demo.stage import Stage
from pdctl.demo.visit import Visit
from pdctl.metrics import Metrics


@dataclass
class Decode:
    did: list[str] = field(default_factory=list)

    def pause(self) -> None:
        self.did.append("pause")

    def resume(self) -> None:
        self.did.append("resume")


@dataclass
class Paper:
    """As much of a stage as a visit without prompts asks for."""

    decode: Decode = field(default_factory=Decode)
    registry_url: str = "http://127.0.0.1:8998"


def visit() -> tuple[Visit, io.StringIO]:
    said = io.StringIO()
    return Visit(Screen(Console(file=said, width=200)), ()), said


async def said_soon(said: io.StringIO, words: str) -> None:
    async with asyncio.timeout(60):
        while words not in said.getvalue():  # noqa: ASYNC110  # a text file tells nobody
            await asyncio.sleep(0.01)


async def test_to_be_told_to_stop_is_the_end_of_a_stay_and_no_failure() -> None:
    shown, said = visit()
    stay = asyncio.create_task(shown.stay(cast(Stage, Paper())))
    await said_soon(said, "the fleet stays, the page too: http://127.0.0.1:8998/ - Ctrl-C ends them\n")
    stay.cancel()
    await stay
    assert (stay.cancelled(), stay.cancelling()) == (False, 0)


async def test_enter_stops_the_decode_rank_and_nothing_leaves_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, theirs = os.openpty()
    with os.fdopen(theirs) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        shown, said = visit()
        stage = Paper()
        stay = asyncio.create_task(shown.stay(cast(Stage, stage)))
        await said_soon(said, "Enter stops the decode rank")
        assert stage.decode.did == []
        os.write(terminal, b"\n")
        await said_soon(said, "SIGSTOP")
        assert stage.decode.did == ["pause"]
        stay.cancel()
        await stay
        assert stage.decode.did == ["pause", "resume"]
    os.close(terminal)


async def test_a_page_that_nobody_opens_does_not_hold_the_show_up_for_ever(registry_url: str) -> None:
    shown, said = visit()
    shown.opened_within_s = 0.2
    await shown.open(cast(Stage, Paper(registry_url=registry_url)))
    assert f"open {registry_url}/ in a browser" in said.getvalue()


async def test_the_show_goes_on_when_the_page_is_open(registry_url: str, metrics: Metrics) -> None:
    shown, said = visit()
    going_on = asyncio.create_task(shown.open(cast(Stage, Paper(registry_url=registry_url))))
    await said_soon(said, "in a browser")
    assert not (await asyncio.wait({going_on}, timeout=0.2))[0]
    metrics.watch.came()
    await asyncio.wait_for(going_on, 60)
