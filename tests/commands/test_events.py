"""`pdctl events`: what has happened, once, oldest first, and what happens from then on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from pdctl.errors import BadField
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
        async with asyncio.timeout(20):
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
