"""
The pictures of docs/page.md: `python -m tests.page.screenshots` draws them anew, of fleets of paper; `--demo` also of
the demo's real one, while its decode rank stands still.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import signal
from pathlib import Path
from typing import Any

from tests.demo.test_story import Demo
from tests.page.planted import Fleet, Told, event, instance, link, planted, session_of
from tests.page.window import Chromium, Scheme, Window, chromium, program

IMAGES = Path(__file__).parents[2] / "docs" / "img"
MINUTE: list[tuple[str, str, dict[str, Any]]] = [
    ("completed", "prefill-2: instance complete", {"instance": "prefill-2"}),
    ("seated", "decode-3 tp3: seat taken", {"instance": "decode-3", "rank": "tp3"}),
    (
        "refused",
        "page_size is 64 for this prefill but this rank offers 16: start every rank with the same page_size",
        {"instance": "prefill-1", "peer": "10.1.0.9", "count": 6},
    ),
    (
        "suspected",
        "prefill-2 tp1: rank has missed a renewal: half a lease more and it is dropped; see whether its process runs",
        {"instance": "prefill-2", "rank": "tp1"},
    ),
    (
        "expired",
        "decode-3 tp2: lease over: its process has died, stands still or does not reach this registry; see its log",
        {"instance": "decode-3", "rank": "tp2"},
    ),
    (
        "room_failed",
        "room 8301946215581243 failed at prefill-0 tp2 with 10.2.0.2:15003: one of 12 blocks did not move for 5 s",
        {"instance": "prefill-0", "rank": "tp2"},
    ),
    (
        "ejected",
        "prefill-0 tp2 sees session 10.2.0.2:15003 ejected: see whether that process runs and can be reached",
        {"instance": "prefill-0", "rank": "tp2", "session": session_of("decode", 1, 2)},
    ),
]


def troubled() -> Fleet:
    """Seven instances of four ranks on a bad day."""
    fleet = Fleet(prefills=3, decodes=4, tp=4)
    fleet.instances["decode-3"] = instance("decode-3", "decode", 3, 4, missing=[2])
    fleet.instances["prefill-2"] = instance("prefill-2", "prefill", 2, 4, suspect=[1])
    del fleet.reports["decode-3", 2]
    for prefill in range(3):
        fleet.block(prefill, 1, 2)
    fleet.reports["prefill-1", 0]["links"][0] = link(
        session_of("decode", 1, 0), "trial", cause="peer_gone", sentence="on trial after peer gone 41 s ago"
    )
    fleet.reports["prefill-0", 2] |= {
        "failed": [
            {
                "room": 8301946215581243,
                "side": "sender",
                "age_s": 4.0,
                "seconds": 5.2,
                "cause": "timed_out",
                "sentence": "one of 12 blocks did not move for 5 s: the peer hangs",
                "peer": "10.2.0.2:15003",
            }
        ],
        "ended": {"success": 4211, "failed": 1},
        "quarantined": 96,
    }
    fleet.reports["prefill-0", 1]["open"] = [
        {"room": 8301946215581240 + n, "side": "sender", "phase": phase, "age_s": age, "peer": "10.2.0.1:15002"}
        for n, (phase, age) in enumerate([("transferring", 2.1), ("waiting_for_input", 0.7), ("bootstrapping", 0.1)])
    ]
    fleet.events = [event(n, kind, sentence, **about) for n, (kind, sentence, about) in enumerate(MINUTE, 1)]
    return fleet


async def past(told: Told, window: Window, seconds: int) -> None:
    """So many seconds go by on the page, in which ranks report and bytes move."""
    for second in range(seconds):
        wave = 1 + math.sin(second / 17) / 3 + math.sin(second / 5) / 8
        for row in told.fleet.reports.values():
            if second % 5 == row["epoch"] % 5 or second == 0:
                row["bytes"] += int(4e8 * wave * (row["role"] == "prefill" or 0.75)) if second > 4 else 0
                told.say("report", row)
        await asyncio.sleep(0.02)
        await window.do(lambda page: page.clock.run_for(1000))


async def of_paper(
    browser: Chromium, name: str, fleet: Fleet, scheme: Scheme, seconds: int = 150, at: str = "#problems"
) -> None:
    async with (
        planted(fleet) as (told, url),
        browser.window(width=1200, height=840, scheme=scheme) as window,
    ):
        await window.do(lambda page: page.clock.install())
        await window.open(url)
        await window.sees("live", "#link")
        await past(told, window, seconds)
        for row in fleet.reports.values():
            told.say("report", row)
        await asyncio.sleep(0.3)
        await window.do(lambda page: page.clock.run_for(500))
        await window.ask("at => { scrollTo(0, document.querySelector(at).getBoundingClientRect().top - 70); }", at)
        await window.screenshot(IMAGES / name)


async def on_a_phone(browser: Chromium) -> None:
    async with planted(troubled()) as (_, url), browser.window(width=390, height=844, scheme="dark") as window:
        await window.open(url)
        await window.sees("live", "#link")
        await window.screenshot(IMAGES / "page-phone.png")


async def of_the_demo(browser: Chromium) -> None:
    demo = Demo("--page")
    process = await demo.start()
    assert process.stdout is not None
    while (found := re.search(rb"open (http://[0-9.:]+)/", line := await process.stdout.readline())) is None:
        assert line
    rest = asyncio.create_task(process.stdout.read())
    async with browser.window(width=1280, height=900) as window:
        await window.open(found[1].decode())
        await window.sees("is blocked at", "#problems", within_s=90)
        await asyncio.sleep(1)
        await window.screenshot(IMAGES / "page-demo-broken.png")
        await window.misses("is blocked at", "#problems", within_s=60)
        await asyncio.sleep(5)
        await window.screenshot(IMAGES / "page-demo-healed.png")
    process.send_signal(signal.SIGINT)
    await rest


async def draw(browser: Chromium, *, demo: bool) -> None:
    IMAGES.mkdir(exist_ok=True)
    await of_paper(browser, "page-light.png", troubled(), "light")
    await of_paper(browser, "page-dark.png", troubled(), "dark", at="#h-links")
    many = Fleet(prefills=188, decodes=187, tp=8, links=24)
    for prefill in range(60):
        many.block(prefill, 17, 2)
    many.instances["decode-3"] = instance("decode-3", "decode", 3, 8, missing=[2])
    await of_paper(browser, "page-thousands.png", many, "light", seconds=10)
    await on_a_phone(browser)
    if demo:
        await of_the_demo(browser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="of the demo too: a minute, and real ranks")
    args = parser.parse_args()
    found = program()
    if found is None:
        raise SystemExit("there is no Chromium: apt-get install chromium")
    with chromium(found) as browser:
        asyncio.run(draw(browser, demo=args.demo))


if __name__ == "__main__":
    main()
