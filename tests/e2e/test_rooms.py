"""Two processes, real Mooncake over TCP, real ZMQ: bytes compared, peers stopped and killed in mid-room."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pdctl.core.comparing import Checksum
from tests.e2e.kv import BIG, MHA, MLA, Kv, content
from tests.engine.cable import Cable
from tests.engine.processes import Child

QUICK = {"drain_margin_s": 0.05, "release_s": 0.3}
PREFILL_EMPTY: dict[str, list[int]] = {"rooms": [], "early": [], "quarantine": []}
DECODE_EMPTY: dict[str, list[int]] = {"rooms": [], "quarantine": []}


def rank(role: str, kv: Kv, host: str = "127.0.0.1", /, **timeouts: float | str) -> Child:
    settings = {"role": role, "kv": dataclasses.asdict(kv), "timeouts": {**QUICK, **timeouts}, "host": host}
    return Child("tests.e2e.rank", json.dumps(settings))


@contextmanager
def pair(kv: Kv, **timeouts: float) -> Iterator[tuple[Child, Child]]:
    """`timeouts`: of the decode side."""
    with rank("prefill", kv) as prefill, rank("decode", kv, **timeouts) as decode:
        yield prefill, decode


async def receive(decode: Child, prefill: Child, room: int, pages: list[int], row: int) -> None:
    """Returns when the first chunk has landed."""
    await decode.ask("receive", room=room, prefill=prefill.hello["link"], pages=pages, row=row)
    await prefill.ask("landed")


async def why(rank: Child, room: int) -> str:
    return str((await rank.ask("result", room=room))["why"])


async def digest(rank: Child, pages: list[int], row: int) -> str:
    return str((await rank.ask("digest", pages=pages, row=row))["sha"])


async def assert_empty(prefill: Child, decode: Child | None = None) -> None:
    state = await prefill.ask("state")
    del state["causes"]
    assert state == PREFILL_EMPTY
    assert decode is None or await decode.ask("state") == DECODE_EMPTY


@pytest.mark.parametrize("kv", [MHA, MLA], ids=["mha", "mla"])
async def test_chunks_of_a_room_arrive_byte_for_byte(kv: Kv) -> None:
    chunks, pages = [[5, 6, 7], [30], [12, 11], [40, 41]], [9, 10, 11, 3, 60, 61, 0, 1]
    with pair(kv) as (prefill, decode):
        await prefill.ask("send", room=7, chunks=chunks, row=2)
        await receive(decode, prefill, 7, pages, 5)
        assert await why(decode, 7) == await why(prefill, 7) == ""
        assert await digest(decode, pages, 5) == await digest(prefill, list(itertools.chain(*chunks)), 2)
        untouched = [page for page in range(kv.n_pages) if page not in pages]
        assert await digest(decode, untouched, 4) == await digest(decode, untouched, 6) != ""
        await assert_empty(prefill, decode)


async def test_rooms_of_the_same_moment_do_not_mix() -> None:
    rooms = {room: [8 * room + k for k in (3, 1, 0, 2, 7)] for room in range(8)}
    with pair(MHA) as (prefill, decode):
        for room, pages in rooms.items():
            await prefill.ask("send", room=room, chunks=[pages[:2], pages[2:]], row=7 - room)
        for room, pages in rooms.items():
            await decode.ask("receive", room=room, prefill=prefill.hello["link"], pages=pages, row=room)
        for room, pages in rooms.items():
            assert await why(decode, room) == await why(prefill, room) == ""
            assert await digest(decode, pages, room) == await digest(prefill, pages, 7 - room)
        await assert_empty(prefill, decode)


async def test_an_aborted_room_gives_its_pages_back_after_the_ack() -> None:
    with pair(BIG) as (prefill, decode):
        await prefill.ask("send", room=7, chunks=[[0], list(range(1, 40))], row=0, paced=True)
        await receive(decode, prefill, 7, list(range(40)), 0)
        await prefill.ask("proceed")
        await decode.ask("abort", room=7)
        assert "has given the room up" in await why(prefill, 7)
        assert (await decode.ask("let_go", n=1))["released"] == [list(range(40))]
        await assert_empty(prefill, decode)


async def test_a_decode_killed_in_mid_room_fails_the_room_and_a_new_one_is_served() -> None:
    with pair(MHA) as (prefill, decode):
        await prefill.ask("send", room=7, chunks=[[0], [1]], row=0, paced=True)
        await receive(decode, prefill, 7, [0, 1], 0)
        await prefill.ask("send", room=8, chunks=[[2]], row=1)
        await receive(decode, prefill, 8, [2], 1)
        assert await why(prefill, 8) == ""  # so the connection stands
        decode.kill()
        await prefill.ask("proceed")
        said = await why(prefill, 7)
        assert f"transfer with {decode.session} failed (peer_gone)" in said or "refused" in said
        assert (await prefill.ask("state"))["causes"] != []
        await assert_empty(prefill)
        with rank("decode", MHA) as again:
            await prefill.ask("send", room=9, chunks=[[3]], row=1)
            await receive(again, prefill, 9, [5], 1)
            assert await why(again, 9) == await why(prefill, 9) == ""
            assert await digest(again, [5], 1) == await digest(prefill, [3], 1)
            await assert_empty(prefill, again)


async def test_a_decode_stopped_in_mid_room_learns_why_when_it_goes_on() -> None:
    with pair(BIG) as (prefill, decode):
        pages = list(range(48))
        await prefill.ask("send", room=7, chunks=[pages[:1], pages[1:]], row=0, paced=True)
        await receive(decode, prefill, 7, pages, 0)
        await prefill.ask("send", room=8, chunks=[[]], row=0)
        await receive(decode, prefill, 8, [], 1)
        assert await why(decode, 8) == ""
        decode.stop()
        await prefill.ask("proceed")
        said = await why(prefill, 7)
        assert f"transfer with {decode.session} failed" in said
        await assert_empty(prefill)
        decode.resume()
        assert said[said.index("transfer with") :] in await why(decode, 7)
        assert len((await decode.ask("let_go", n=2))["released"]) == 2
        await assert_empty(prefill, decode)


async def test_a_prefill_killed_in_mid_room_frees_the_pages_only_when_it_is_proven_gone() -> None:
    with pair(MHA, waiting_s=1.5) as (prefill, decode):
        await prefill.ask("send", room=7, chunks=[[0], [1]], row=0, paced=True)
        await receive(decode, prefill, 7, [0, 1], 0)
        prefill.kill()
        assert "no final status from prefill at" in await why(decode, 7)
        assert (await decode.ask("let_go", n=1))["released"] == [[0, 1]]
        assert await decode.ask("state") == DECODE_EMPTY


async def test_a_stopped_prefill_keeps_the_pages_in_quarantine_until_it_has_answered() -> None:
    with pair(MHA, waiting_s=1.5) as (prefill, decode):
        await prefill.ask("send", room=7, chunks=[[0], [1]], row=0, paced=True)
        await receive(decode, prefill, 7, [0, 1], 0)
        prefill.stop()
        assert "no final status from prefill at" in await why(decode, 7)
        assert (await decode.ask("let_go", n=1, within_s=1))["released"] == []  # several times release_s
        assert (await decode.ask("state"))["quarantine"] == [7]
        prefill.resume()
        assert (await decode.ask("let_go", n=1))["released"] == [[0, 1]]  # though its engine still computes
        await prefill.ask("proceed")
        assert "has given the room up" in await why(prefill, 7)
        await assert_empty(prefill, decode)


@pytest.mark.parametrize("checksum", [Checksum.OFF, Checksum.OFFERED])
async def test_a_small_room_beside_a_large_one_ends_first(checksum: Checksum) -> None:
    with rank("prefill", BIG, checksum=checksum) as prefill, rank("decode", BIG, checksum=checksum) as decode:
        large, small = list(range(1, 47)), [47]
        await prefill.ask("send", room=1, chunks=[large], row=0)
        await decode.ask("receive", room=1, prefill=prefill.hello["link"], pages=large, row=0)
        await prefill.ask("send", room=2, chunks=[small], row=1)
        await decode.ask("receive", room=2, prefill=prefill.hello["link"], pages=small, row=1)
        assert await why(decode, 2) == await why(prefill, 2) == ""
        assert (await decode.ask("state"))["rooms"] == [1], "184 MiB that began before it are still on their way"
        assert await why(decode, 1) == await why(prefill, 1) == ""
        assert await digest(decode, large, 0) == await digest(prefill, large, 0)
        await assert_empty(prefill, decode)


async def test_real_bytes_that_change_on_their_way_fail_the_room_and_name_the_page() -> None:
    how = Checksum.REQUIRED
    with rank("prefill", MHA, checksum=how) as prefill, rank("decode", MHA, checksum=how) as decode:
        await prefill.ask("send", room=7, chunks=[[5, 6, 7], [30]], row=2, paced=True)
        await receive(decode, prefill, 7, [9, 10, 11, 3], 5)
        await decode.ask("spoil", entry=4, page=10)
        await prefill.ask("proceed")
        said = "page 10 (6 at the prefill): not what prefill rank 0 sent, by checksum"
        assert said in await why(decode, 7)
        assert said in await why(prefill, 7)
        assert await decode.ask("let_go", n=1) == {"released": [[9, 10, 11, 3]]}
        await assert_empty(prefill, decode)


async def test_one_bit_that_turns_over_on_the_network_fails_the_room_on_both_sides_and_names_the_page() -> None:
    sent, named, victim = [5, 6, 7], [9, 10, 11], 6
    with (
        rank("prefill", MHA, checksum=Checksum.REQUIRED) as prefill,
        rank("decode", MHA, checksum=Checksum.REQUIRED) as decode,
    ):
        async with Cable.to(decode.session) as cable:
            await decode.ask("via", session=cable.session)
            for room, entry in ((1, None), (2, 5), (3, 0), (4, None)):
                page = b"" if entry is None else content(MHA)[entry][victim].tobytes()
                cable.spoil([page[at : at + 16] for at in range(0, len(page), 256)])
                await prefill.ask("send", room=room, chunks=[sent], row=2)
                await decode.ask("receive", room=room, prefill=prefill.hello["link"], pages=named, row=5)
                said = "" if entry is None else "page 10 (6 at the prefill): not what prefill rank 0 sent, by checksum"
                assert said in (here := await why(decode, room))
                assert said in (there := await why(prefill, room))
                assert bool(here) is bool(there) is bool(said)
            assert await digest(decode, named, 5) == await digest(prefill, sent, 2)
            await decode.ask("let_go", n=4)
            await assert_empty(prefill, decode)


async def test_rooms_of_a_healthy_decode_succeed_while_those_of_a_stopped_one_stand_still() -> None:
    with pair(BIG) as (prefill, stopped), rank("decode", BIG) as well:
        for room, end in ((1, 40), (2, 6)):
            await prefill.ask("send", room=room, chunks=[[room], list(range(3, end))], row=0, paced=True)
        await receive(stopped, prefill, 1, list(range(38)), 0)
        await receive(well, prefill, 2, list(range(4)), 0)
        stopped.stop()
        await prefill.ask("proceed")
        await prefill.ask("proceed")
        assert await why(prefill, 2) == await why(well, 2) == ""
        assert (await prefill.ask("state"))["rooms"] == [1], "a block may stand still for a second before it is over"
        assert f"transfer with {stopped.session} failed" in await why(prefill, 1)
        await assert_empty(prefill)
        stopped.resume()
        assert "transfer with" in await why(stopped, 1)
