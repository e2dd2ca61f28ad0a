"""The fleet over real HTTP: what ranks tell of themselves, what is shown of it, and what has happened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.conftest import Clock
from tests.dialects.test_native import Wire

RANK = "/instances/default/ranks/tp0"


def said(**more: Any) -> dict[str, Any]:
    return {"role": "prefill", "session": "10.0.0.7:15001"} | more


def link(session: str, state: str = "blocked", **more: Any) -> dict[str, Any]:
    return {"session": session, "state": state, "cause": "timed_out", "sentence": "no answer", "since_s": 1.0} | more


@pytest.fixture
async def wire(registry_url: str) -> AsyncIterator[Wire]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20.0)) as session:
        yield Wire(registry_url, session)


async def test_an_empty_registry_says_so(wire: Wire) -> None:
    told = await wire.get("/overview")
    assert (told["instances"], told["reports"], told["sessions"]) == ([], [], [])
    assert told["revision"] == 0
    assert told["reports_from"] == "here"
    assert told["events"] == {"next": 1, "oldest": 1}
    assert told["service"]["journal"] == "memory"
    assert told["service"]["counts"] == {"instances": 0, "ready": 0, "seats": 0, "alive": 0, "rooms": 0}


async def test_what_a_rank_reports_is_shown_with_its_age_until_it_expires(wire: Wire, clock: Clock) -> None:
    granted = await wire.register()
    status, told = await wire.ask("PUT", f"{RANK}/report", said(epoch=granted["epoch"], bytes=7, links=[link("a:1")]))
    assert (status, told) == (200, {"again_s": 5.0})
    clock.forward(2.0)
    overview = await wire.get("/overview")
    (report,) = overview["reports"]
    assert (report["instance"], report["seat"], report["age_s"], report["bytes"]) == ("default", "tp0", 2.0, 7)
    assert report["links"] == [link("a:1", again_in_s=None)]
    (instance,) = overview["instances"]
    assert instance == await wire.get("/instances/default")


async def test_a_report_for_nobody_is_refused(wire: Wire) -> None:
    status, told = await wire.ask("PUT", f"{RANK}/report", said())
    assert status == 404
    assert "register first" in told["error"]["message"]
    granted = await wire.register()
    status, _ = await wire.ask("PUT", "/instances/default/ranks/tp1/report", said())
    assert status == 404
    await wire.register(port=41000)
    status, told = await wire.ask("PUT", f"{RANK}/report", said(epoch=granted["epoch"]))
    assert status == 409, told


async def test_a_report_goes_with_its_life(wire: Wire) -> None:
    await wire.register()
    await wire.ask("PUT", f"{RANK}/report", said())
    await wire.register(port=41000)
    assert (await wire.get("/overview"))["reports"] == []


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("role", {"role": "not a name"}),
        ("colour", {"colour": "red"}),
        ("bytes", {"bytes": -1}),
        ("bytes", {"bytes": "7"}),
        ("links", {"links": [link(f"a:{n}") for n in range(4097)]}),
        ("links.sentence", {"links": [link("a:1", sentence="two\nlines")]}),
        ("links.since_s", {"links": [link("a:1", since_s=-1.0)]}),
        ("rooms", {"rooms": {"nobody": {}}}),
        ("rooms.sender", {"rooms": {"sender": {"success": 1}}}),
        ("unready", {"unready": [""]}),
    ],
)
async def test_what_cannot_be_used_is_named(wire: Wire, field: str, wrong: dict[str, Any]) -> None:
    await wire.register()
    status, told = await wire.ask("PUT", f"{RANK}/report", said(**wrong))
    assert status == 400
    assert told["error"]["field"] == field
    assert (await wire.get("/overview"))["reports"] == []
