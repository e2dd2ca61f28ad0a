"""The page of a real registry, with real ranks that move real bytes: what breaks and heals is seen as it happens."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest

from pdctl.config import Settings
from pdctl.sections import ServeSettings
from pdctl.serving import sidecar
from tests.demo.test_story import Demo
from tests.dialects.test_native import Wire, body
from tests.page import planted
from tests.page.window import Chromium

DECODE = "10.2.0.1:15001"


@pytest.fixture
async def service() -> AsyncIterator[str]:
    """As `pdctl serve` runs it."""
    async with sidecar(Settings(serve=ServeSettings(port=0, journal="memory:"))) as running:
        yield running.url


def said(*links: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What a prefill rank reports."""
    row = planted.report("", "prefill", 0, 0, links, **more)
    return {name: value for name, value in row.items() if name not in ("instance", "seat", "age_s", "epoch")}


async def test_what_ranks_tell_a_real_registry_is_on_its_page_as_it_happens(browser: Chromium, service: str) -> None:
    async with aiohttp.ClientSession() as http, browser.window() as window:
        wire, report = Wire(service, http), "/instances/default/ranks/tp0/report"
        await window.open(service)
        await window.sees("No instance has registered yet", "#verdict")
        await wire.register(0, ttl_s=60.0)
        await window.sees("default cannot serve: 1 of 2 seats missing (tp1)", "#problems")
        await wire.register(1, ttl_s=60.0)
        await window.sees("Everything serves", "#verdict")
        await window.sees("completed · default", "#events")
        decode = body(0, 1, port=41000, ttl_s=60.0, role="decode", metadata={"mooncake_session": DECODE})
        assert (await wire.ask("PUT", "/instances/decode/ranks/tp0", decode))[0] == 200
        await wire.ask("PUT", report, said(planted.link(DECODE)))
        await window.sees("of 1 in use", "#tile-links-sub")
        await wire.ask("PUT", report, said(planted.blocked(DECODE)))
        await window.sees("decode/tp0 is blocked at default/tp0: timed out", "#problems")
        await window.sees("ejected · default/tp0 → decode/tp0", "#events")
        await wire.ask("PUT", report, said(planted.link(DECODE)))
        await window.sees("Everything serves", "#verdict")
        await window.sees("readmitted · default/tp0 → decode/tp0", "#events")
        await wire.ask("POST", "/instances/decode/drain")
        await window.sees("decode drains: it takes nothing new", "#problems")
        await wire.ask("DELETE", "/instances/default/ranks/tp1")
        await window.sees("instance default is known to be dead", "#problems")
        await window.sees("tp1: rank has left", "#events")
        assert window.complaints == []


async def test_the_fleet_of_paper_speaks_as_a_real_registry_does(service: str) -> None:
    async with aiohttp.ClientSession() as http:
        wire = Wire(service, http)
        await wire.register(0)
        assert (await wire.ask("PUT", "/instances/default/ranks/tp0/report", said(planted.blocked(DECODE))))[0] == 200
        real, paper = await wire.get("/overview"), planted.Fleet(tp=2)
        paper.instances["prefill-0"] = planted.instance("prefill-0", "prefill", 0, 2, missing=[1])
        paper.block(0, 0)
        told = paper.overview()
        await wire.ask("DELETE", "/instances/default/ranks/tp0")
        events = (await wire.get("/events"))["events"]
    assert names(told) <= names(real)
    assert names(told["instances"][0]) - {"shape"} <= names(real["instances"][0])
    for part in ("alive_seats", "missing_seats"):
        assert names(told["instances"][0][part][0]) <= names(real["instances"][0][part][0])
    assert names(told["reports"][0]) <= names(real["reports"][0])
    assert names(planted.blocked(DECODE)) <= names(real["reports"][0]["links"][0])
    assert names(told["service"]) <= names(real["service"])
    assert names(planted.event(1, "left", "gone")) <= names(events[0])
    assert {"seated", "left"} <= {each["kind"] for each in events}


def names(row: Mapping[str, Any]) -> set[str]:
    return set(row)


async def test_a_fault_and_its_healing_are_seen_on_the_page_of_the_demo(browser: Chromium) -> None:
    """`./dev demo --page` is what a newcomer runs second, after the clone."""
    demo = Demo("--page")
    process = await demo.start()
    assert process.stdout is not None
    told = [await asyncio.wait_for(process.stdout.readline(), 60)]
    while (found := re.search(rb"open (http://[0-9.:]+)/", told[-1])) is None:
        assert told[-1], b"".join(told).decode()
        told.append(await asyncio.wait_for(process.stdout.readline(), 60))
    rest = asyncio.create_task(process.stdout.read())
    async with browser.window() as window:
        await window.open(found[1].decode())
        # registration: both are seated, and the lists are those of real ranks
        await window.sees("2 of 2", "#tile-instances")
        await window.sees("completed · ", "#events")
        # the main job
        await window.sees("MB", "#tile-moving-sub", within_s=40)
        # SIGSTOP: the ejection, with its cause
        await window.sees("is blocked at default/tp0: timed out", "#problems", within_s=40)
        await window.sees("did not move for 1.0 s: the peer hangs", "#out")
        await window.sees("ejected · default/tp0", "#events")
        await window.sees("room failed · ", "#events")
        await window.sees("timed out", "#failed")
        # SIGCONT: the recovery
        await window.misses("is blocked at", "#problems", within_s=40)
        await window.sees("readmitted · default/tp0", "#events")
        await window.sees("None: every link that is used is trusted.", "#out-empty")
        assert window.complaints == []
    # until Ctrl-C, which is its end and no failure
    await asyncio.sleep(0)
    process.send_signal(signal.SIGINT)
    out = b"".join(told) + await asyncio.wait_for(rest, 60)
    assert await process.wait() in (0, 130), out.decode()
    assert demo.alive() == []
