"""`pdctl events`: what has happened, once, oldest first, and what happens from then on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from pdctl.errors import BadField
from pdctl.onlooker import Following, Onlooker, Row
from tests.commands.conftest import BLOCKED, Fleet

Run = Callable[..., Awaitable[int]]


async def test_events_are_told_once_and_in_order(
    fleet: Fleet, pdctl_here: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    await fleet.seat(0)
    await fleet.report(0, links=[BLOCKED])
    await fleet.refused()
    await fleet.seat(1)
    capsys.readouterr()
    wanted = ("--kind", "seated", "--kind", "ejected", "--kind", "refused", "--kind", "completed")
    assert await pdctl_here("events", *wanted) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert [line[2] for line in lines] == ["seated", "ejected", "refused", "seated", "completed"]
    numbers = [int(line[0]) for line in lines]
    assert numbers == sorted(set(numbers))
    assert "\x1b" not in out
    await pdctl_here("events", "--json", "--since", str(numbers[1]), *wanted)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["id"] for event in told] == numbers[1:]
    assert told[0]["session"] == BLOCKED["session"]
    await pdctl_here("events", "--last", "1", *wanted)
    assert capsys.readouterr().out.split()[2] == "completed"
    await pdctl_here("events", "--instance", "q", *wanted)
    assert capsys.readouterr().out == ""


async def test_whoever_follows_hears_what_happens_and_nothing_twice(
    fleet: Fleet, pdctl_here: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    await fleet.seat(0)
    following = asyncio.ensure_future(pdctl_here("events", "--follow", "--json", "--instance", "p"))
    heard: list[str] = []

    async def until(kind: str) -> None:
        async with asyncio.timeout(60):
            while kind not in heard:
                heard.extend(
                    json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines() if line[:1] == "{"
                )
                await asyncio.sleep(0.05)

    try:
        await until("seated")
        await fleet.report(0, links=[BLOCKED])
        await until("ejected")
        await fleet.report(0, links=[{**BLOCKED, "state": "trusted"}])
        await until("readmitted")
    finally:
        following.cancel()
        await asyncio.wait({following})
    assert following.cancelled()
    assert heard == ["seated", "ejected", "readmitted"]


@pytest.mark.parametrize("words", [("--since", "-1"), ("--last", "-2")], ids=" ".join)
async def test_what_counts_from_below_0_is_a_usage_error(pdctl_here: Run, words: tuple[str, str]) -> None:
    with pytest.raises(BadField, match="is below 0"):
        await pdctl_here("events", *words)


class Chronicles:
    """Stands where an Onlooker does: a registry's events, which it may forget."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.next = 1

    def add(self, at: str) -> None:
        self.rows.append({"id": self.next, "at": at})
        self.next += 1

    def restart(self) -> None:
        self.rows, self.next = [], 1

    async def events(self, since: int = 0) -> list[Row]:
        return [row for row in self.rows if since > self.next or row["id"] >= since]


@pytest.mark.parametrize("then", [0, 1, 2, 3, 5], ids=lambda n: f"{n} events after it")
async def test_a_registry_that_began_anew_is_heard_from_its_first_event(then: int) -> None:
    """However many it has meanwhile: fewer than the last id that was heard, as many, or more."""
    registry = Chronicles()
    following = Following(cast("Onlooker", registry))
    for second in (1, 2):
        registry.add(f"00:00:0{second}")
    assert [row["id"] for row in await following.more()] == [1, 2]
    registry.restart()
    for second in range(then):
        registry.add(f"00:00:1{second}")
    assert [row["id"] for row in await following.more()] == list(range(1, then + 1))
    assert await following.more() == []
    registry.add("00:00:30")
    assert [row["id"] for row in await following.more()] == [then + 1]


async def test_who_heard_too_late_hears_what_is_still_known() -> None:
    registry = Chronicles()
    following = Following(cast("Onlooker", registry))
    registry.add("00:00:01")
    await following.more()
    for second in range(2, 8):
        registry.add(f"00:00:0{second}")
    del registry.rows[:4]  # a ring: 1 to 4 are gone
    assert [row["id"] for row in await following.more()] == [5, 6, 7]
