"""The registry's owner: journalled before acknowledged, each change told once, rooms swept in slices."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from pdctl.core.address import Endpoint
from pdctl.core.listening import rest_s
from pdctl.core.lives import Change, Claim, Owner
from pdctl.core.registry import Registry
from pdctl.core.rooms import RoomBook
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import BadField, JournalUnavailable, NotReady, Refused
from pdctl.metrics import Metrics
from pdctl.persistence.base import Room
from pdctl.persistence.memory import MemoryJournal
from pdctl.registrar import SWEEP_BUDGET, SWEEP_REST_S, Registrar
from tests.conftest import Clock

TP2 = Shape(attn_tp_size=2, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype=None)


def claim(tp: int, shape: Shape = TP2, port: int = 0, ttl_s: float | None = None) -> Claim:
    announcement = Announcement(Seat(0, 0, tp, 0), shape, Endpoint("10.0.0.1", port or 40000 + tp))
    return Claim("a", announcement, Owner("10.0.0.1"), ttl_s=ttl_s)


class SlowJournal(MemoryJournal):
    """Takes rows only when the gate is open, and can be full."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.full = False

    async def append(self, changes: Sequence[Change], rooms: Sequence[Room] = ()) -> None:
        await self.gate.wait()
        if self.full:
            raise JournalUnavailable("no space is left on the device: free some", cause="full")
        await super().append(changes, rooms)


def told(logs: Sequence[object]) -> list[object]:
    return [entry["event"] for entry in logs if isinstance(entry, dict)]


async def test_a_claim_is_acknowledged_when_the_journal_has_it(clock: Clock) -> None:
    journal = SlowJournal()
    registrar = Registrar(Registry(), RoomBook(), journal, Metrics(), clock)
    pending = asyncio.create_task(registrar.register(claim(0)))
    done, _ = await asyncio.wait({pending}, timeout=0.05)
    assert not done
    journal.gate.set()
    await pending
    assert len((await journal.load()).records) == 1


async def test_a_journal_that_takes_no_rows_is_an_error_for_the_caller(clock: Clock) -> None:
    journal = SlowJournal()
    journal.full = True
    journal.gate.set()
    registrar = Registrar(Registry(), RoomBook(), journal, Metrics(), clock)
    with pytest.raises(JournalUnavailable, match="no space"):
        await registrar.register(claim(0))


async def test_each_change_is_told_once_and_a_repeated_claim_never(registrar: Registrar) -> None:
    with capture_logs() as logs:
        for tp in (0, 0, 1, 1):
            await registrar.register(claim(tp))
        await registrar.register(claim(1, port=50000))
    assert told(logs) == ["seat taken", "seat taken", "instance complete", "seat taken by a new life"]
    assert logs[-1]["before"] == "10.0.0.1:40001"
    assert logs[-1]["address"] == "10.0.0.1:50000"


async def test_a_refused_claim_is_neither_journalled_nor_told(clock: Clock) -> None:
    journal = MemoryJournal()
    registrar = Registrar(Registry(), RoomBook(), journal, Metrics(), clock)
    await registrar.register(claim(0))
    with capture_logs() as logs, pytest.raises(Refused):
        await registrar.register(claim(1, replace(TP2, page_size=64)))
    assert logs == []
    assert len((await journal.load()).records) == 1


@pytest.mark.parametrize("ttl_s", [None, 10.0], ids=["stock", "leased"])
async def test_a_loopback_address_from_another_host_is_refused_and_changes_nothing(
    registrar: Registrar, ttl_s: float | None
) -> None:
    said = claim(0, ttl_s=ttl_s)
    here = replace(said.announcement, address=Endpoint("127.0.0.1", 40000))
    with pytest.raises(BadField, match=r"speaks from 10\.0\.0\.1"):
        await registrar.register(replace(said, announcement=here))
    assert registrar.view("a") is None
    await registrar.register(replace(said, announcement=here, owner=Owner("::1")))


async def test_a_restarted_registry_takes_back_what_the_journal_kept(clock: Clock) -> None:
    journal = MemoryJournal()
    first = Registrar(Registry(), RoomBook(), journal, Metrics(), clock)
    for tp in (0, 1):
        await first.register(claim(tp))
    clock.forward(100.0)
    second = Registrar(Registry(), RoomBook(), journal, Metrics(), clock)
    with pytest.raises(NotReady, match="0 workers"):
        second.topology("a")
    await journal.note([("keys", "a", b"1")])
    others = await second.restore()
    assert (others.notes, others.records, others.rooms) == ((("keys", "a", b"1"),), (), ())
    assert second.rank("a", Seat(0, 0, 1, 0)) == Endpoint("10.0.0.1", 40001)
    assert second.age_s(second.topology("a").alive[Seat(0, 0, 0, 0)].since) == 0.0


async def test_a_rank_outside_a_complete_instance_is_unknown_not_an_error(registrar: Registrar) -> None:
    for tp in (0, 1):
        await registrar.register(claim(tp))
    assert registrar.rank("a", Seat(0, 0, 2, 0)) is None


async def test_the_sweep_empties_the_rooms_and_lets_others_run_meanwhile(clock: Clock) -> None:
    rooms = RoomBook(ttl_s=10.0)
    registrar = Registrar(Registry(), rooms, MemoryJournal(), Metrics(), clock)
    await asyncio.gather(*(registrar.announce_room(room, 0) for room in range(10 * SWEEP_BUDGET)))
    clock.forward(10.0)
    turns, began = 0, time.monotonic()
    sweeping = asyncio.create_task(registrar.sweep())
    async with asyncio.timeout(60):
        while len(rooms):
            turns += 1
            await asyncio.sleep(0)
    sweeping.cancel()
    await asyncio.wait({sweeping})
    assert turns >= 10
    assert time.monotonic() - began >= 8 * SWEEP_REST_S  # it has not taken all of the loop that was to be had
    assert sweeping.cancelled()


class Stopped(Exception):
    pass


async def stop_for(clock: Clock, registrar: Registrar, stops_s: Sequence[float]) -> None:
    """Listen, by a clock turned by hand, while the process is stopped for so long in each of the loop's rests."""
    left = iter(stops_s)

    async def sleep(for_s: float) -> None:
        try:
            clock.forward(for_s + next(left))
        except StopIteration:
            raise Stopped from None

    with contextlib.suppress(Stopped):
        await registrar.listen(sleep)


async def swept(registrar: Registrar, until: Callable[[], bool]) -> bool:
    """Whether the sweep brings this about, which it does at once or not at all: nothing here waits for a disk."""
    sweeping = asyncio.create_task(registrar.sweep())
    for _ in range(20):
        await asyncio.sleep(0)
    sweeping.cancel()
    await asyncio.wait({sweeping})
    return until()


@pytest.mark.parametrize("ttl_s", [0.5, 2.0, 15.0])
async def test_a_stop_that_a_lease_cannot_bear_begins_it_anew_and_is_told(
    registrar: Registrar, clock: Clock, ttl_s: float
) -> None:
    await registrar.register(claim(0, ttl_s=ttl_s))
    with capture_logs() as logs:
        await stop_for(clock, registrar, [0.0, 0.9 * ttl_s, 0.0])
    assert told(logs) == ["the loop was stalled: leases begin anew"]
    assert logs[0]["log_level"] == ("warning" if 0.9 * ttl_s > 1 else "info")
    rest = rest_s(ttl_s)
    await stop_for(clock, registrar, [0.0] * int(0.7 * ttl_s / rest))
    assert not await swept(registrar, lambda: not alive(registrar))
    await stop_for(clock, registrar, [0.0] * math.ceil(0.3 * ttl_s / rest))
    assert await swept(registrar, lambda: not alive(registrar))


async def test_hiccups_that_a_lease_can_bear_do_not_keep_a_silent_rank(registrar: Registrar, clock: Clock) -> None:
    await registrar.register(claim(0, ttl_s=15.0))
    with capture_logs() as logs:
        await stop_for(clock, registrar, [1.0] * 10)
    assert told(logs) == []
    assert await swept(registrar, lambda: not alive(registrar))


async def test_a_stop_just_before_a_lease_is_judged_is_no_silence_of_the_rank(
    registrar: Registrar, clock: Clock
) -> None:
    """The sweep may come to run before the loop's own look at the clock."""
    await registrar.register(claim(0, ttl_s=2.0))
    listening = asyncio.create_task(registrar.listen())
    await asyncio.sleep(0)
    clock.forward(60.0)
    assert not await swept(registrar, lambda: not alive(registrar))
    listening.cancel()
    await asyncio.wait({listening})


def alive(registrar: Registrar) -> int:
    view = registrar.view("a")
    return len(view.alive) if view else 0
