"""The page of a real registry, with real ranks that move real bytes: what breaks and heals is seen as it happens."""

from __future__ import annotations

import asyncio
import re
import signal

from tests.demo.test_story import Demo
from tests.page.window import Chromium


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
