"""One prefill and several decodes, each a process with the real engine: nobody's trouble or size is another's delay."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np

from pdctl.beside import beside
from pdctl.core.address import Endpoint
from pdctl.core.transfer import Phase
from pdctl.core.wire import Metadata, Status, parse_to_decode
from pdctl.metrics import Metrics
from pdctl.peer import open_link
from tests.e2e.kv import BIG
from tests.e2e.test_rooms import assert_empty, digest, rank, why
from tests.engine.processes import Child

PAGE_NBYTES = sum(BIG.lens)
LARGE = list(range(1, 41))  # 160 MiB
SMALL = [44, 45]
rooms = itertools.count(1)


async def begin(prefill: Child, decode: Child, pages: list[int], row: int = 0) -> int:
    room = next(rooms)
    await prefill.ask("send", room=room, chunks=[pages], row=row)
    await decode.ask("receive", room=room, prefill=prefill.hello["link"], pages=pages, row=row)
    await prefill.ask("is_named", room=room)
    return room


async def under_way(prefill: Child) -> set[int]:
    return set((await prefill.ask("state"))["rooms"])


async def assert_succeeds(prefill: Child, decode: Child, room: int) -> None:
    assert await why(decode, room) == await why(prefill, room) == ""


async def small_rooms_beside(prefill: Child, decode: Child, others: set[int], at_most: int = 50) -> int:
    """How many rooms of a small size come and succeed one after another while all of `others` are under way."""
    for n in range(at_most):
        room = await begin(prefill, decode, SMALL, row=1)
        await assert_succeeds(prefill, decode, room)
        if not others <= await under_way(prefill):
            return n
    return at_most


async def test_small_rooms_of_a_decode_pass_by_its_large_one() -> None:
    """Named while the prefill stands still, the large one first, so that all begin in one moment and in this order."""
    pages = {next(rooms): some for some in (LARGE, *([page] for page in SMALL))}
    _, first, second = pages
    with rank("prefill", BIG) as prefill, rank("decode", BIG) as decode:
        await assert_succeeds(prefill, decode, await begin(prefill, decode, [0]))
        for room, named in pages.items():
            await prefill.ask("send", room=room, chunks=[named], row=1)
        prefill.stop()
        for room, named in pages.items():
            await decode.ask("receive", room=room, prefill=prefill.hello["link"], pages=named, row=room % 8)
        for room in pages:
            await decode.ask("is_named", room=room)
        prefill.resume()
        for room in pages:
            await assert_succeeds(prefill, decode, room)
        order = (await prefill.ask("order"))["rooms"]
        assert set(order[1:3]) == {first, second}, "4 MiB each, before the 160 that had begun"
        assert await digest(decode, LARGE + SMALL, max(pages) % 8) == await digest(prefill, LARGE + SMALL, 1)
        await assert_empty(prefill, decode)


async def test_requests_that_are_wrong_fail_alone() -> None:
    """A stranger speaks for a decode: of pages that are not there, of a session that is not, in no language."""
    said: dict[int, Status] = {}

    def hear(frames: list[bytes]) -> None:
        status = parse_to_decode(frames)
        assert isinstance(status, Status)
        said[status.room] = status

    with rank("prefill", BIG) as prefill, rank("decode", BIG) as decode:
        at = Endpoint.parse(prefill.hello["link"])
        await assert_succeeds(prefill, decode, await begin(prefill, decode, [0]))
        async with open_link("127.0.0.1", metrics=Metrics()) as link, beside(link=link.serve(hear)):
            neighbours = [await begin(prefill, decode, LARGE[n::4], row=n) for n in range(4)]
            beyond, unknown = next(rooms), next(rooms)
            for room, session, page in ((beyond, decode.session, 1 << 20), (unknown, "10.9.9.9:1", 0)):
                await prefill.ask("send", room=room, chunks=[[46]], row=1)
                pages = np.array([page], np.int32)
                await link.send(at, Metadata(room, link.endpoint, session, pages, aux_row=1).to_frames())
            await link.send(at, [b"\xff\x00", b"no", b"frames"])
            assert "lies in none of" in await why(prefill, beyond)
            assert "session is not registered here" in await why(prefill, unknown)
            for room in neighbours:
                await assert_succeeds(prefill, decode, room)
            await assert_succeeds(prefill, decode, await begin(prefill, decode, SMALL))
        assert {room: status.phase for room, status in said.items()} == {beyond: Phase.FAILED, unknown: Phase.FAILED}
        assert await digest(decode, LARGE, 1) == await digest(prefill, LARGE, 1)
        assert "PEER_GONE" not in (await prefill.ask("state"))["causes"]
        await assert_empty(prefill, decode)


async def test_a_slow_a_stopped_and_a_dead_decode_delay_no_other() -> None:
    with (
        rank("prefill", BIG) as prefill,
        rank("decode", BIG) as well,
        rank("decode", BIG) as slow,
        rank("decode", BIG) as stopped,
        rank("decode", BIG) as dead,
    ):
        for decode in (well, slow, stopped, dead):
            await assert_succeeds(prefill, decode, await begin(prefill, decode, [0]))
        at_a_crawl = await begin(prefill, slow, LARGE)
        crawling = asyncio.create_task(crawl(slow))
        try:
            assert await small_rooms_beside(prefill, well, {at_a_crawl}, at_most=2) == 2
            stuck = {await begin(prefill, stopped, LARGE[n::5]) for n in range(5)}  # all that its lane takes, and more
            lost = await begin(prefill, dead, LARGE)
            stopped.stop()
            dead.kill()
            assert await small_rooms_beside(prefill, well, stuck) >= 3, "a block may stand still for a second"
            for room in (*stuck, lost):
                assert "transfer with" in await why(prefill, room)
        finally:
            crawling.cancel()
            await asyncio.wait([crawling])
            slow.resume()
        await assert_succeeds(prefill, slow, at_a_crawl)
        assert await digest(slow, LARGE, 0) == await digest(prefill, LARGE, 0)
        await assert_empty(prefill, slow)


async def crawl(decode: Child) -> None:
    """It runs for a sixth of its time: never quick, and never still for as long as a stall takes."""
    while True:
        decode.stop()
        await asyncio.sleep(0.25)
        decode.resume()
        await asyncio.sleep(0.05)
