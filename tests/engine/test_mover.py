"""When the mover says that a transfer is over: never while a block of it is still to go, or on its way."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from pdctl.engine.blocks import Block, Direction, Lane, Transfer
from pdctl.engine.mover import DONE, PENDING, Calls, Submit, _Window


class Engine:
    """Tickets that end when a test says so; what was submitted, in order."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Direction, object]] = []
        self.over: set[int] = set()

    def calls(self) -> Calls:
        return Calls({way: self._submit(way) for way in Direction}, lambda t: DONE if t in self.over else PENDING)

    def _submit(self, way: Direction) -> Submit:
        def submit(*block: object) -> int:
            self.submitted.append((way, block[2]))
            return len(self.submitted)

        return submit

    def end_all(self) -> None:
        self.over.update(range(1, len(self.submitted) + 1))


async def test_a_block_that_ends_together_with_anothers_greeting_does_not_end_their_transfer() -> None:
    """Seen: of a write that had returned, blocks landed later, and would have been sent from memory in use again."""
    engine, told = Engine(), list[Transfer]()
    lane = Lane((f"way {n}" for n in itertools.count()), greets=True)
    plan: list[Block] = [(n, 4096 * n, 8) for n in range(1, 3)]
    transfer = Transfer(lane, 0, Direction.WRITE, iter(plan), 2, 16, asyncio.get_running_loop().create_future())
    window = _Window(lane, 2, 1.0, engine.calls(), told.append)
    window.add(transfer)
    window.turn(prune=False)
    engine.end_all()  # the first way's greeting: its block goes, and then a second greeting
    window.turn(prune=False)
    window.turn(prune=False)
    assert engine.submitted == [(Direction.READ, 4096), (Direction.WRITE, 4096), (Direction.READ, 8192)]
    engine.end_all()  # that block, and in the same look the second greeting
    window.turn(prune=False)
    assert engine.submitted[3:] == [(Direction.WRITE, 8192)]
    assert told == [], "its second block is on its way"
    engine.end_all()
    window.turn(prune=False)
    assert told == [transfer]
    assert window.empty


def transfer_of(lane: Lane, first: int, n: int, nbytes: int) -> Transfer:
    """Of `n` blocks, told apart by where they go: from `first` on."""
    plan: list[Block] = [(first + k, first + k, nbytes) for k in range(n)]
    return Transfer(lane, 0, Direction.WRITE, iter(plan), n, n * nbytes, asyncio.get_running_loop().create_future())


def proven(**given: Any) -> Lane:
    lane = Lane((f"way {n}" for n in itertools.count()), **given)
    lane.proven = True
    return lane


@pytest.mark.parametrize(("nbytes", "most", "in_flight"), [(4 << 10, 1024, 64), (1 << 20, 1024, 16), (4 << 10, 8, 8)])
async def test_so_many_are_in_flight_that_they_are_few_bytes_and_few_connections(
    nbytes: int, most: int, in_flight: int
) -> None:
    engine, lane = Engine(), proven(most=most)
    window = _Window(lane, 64, 1.0, engine.calls(), lambda _: None)
    window.add(transfer_of(lane, 0, 200, nbytes))
    for _ in range(3):
        window.turn(prune=False)
        assert len(window.flying) == in_flight
        engine.end_all()


async def test_bytes_that_have_landed_or_failed_count_no_more() -> None:
    engine, lane = Engine(), proven()
    window = _Window(lane, 64, 1.0, engine.calls(), lambda _: None)
    window.add(transfer_of(lane, 0, 100, 1 << 20))
    while not window.empty:
        window.turn(prune=False)
        engine.end_all()
    assert (len(engine.submitted), window.nbytes) == (100, 0)


async def test_a_look_ends_where_many_in_a_row_have_not_ended_and_the_next_begins_there() -> None:
    engine, lane, asked = Engine(), proven(), list[int]()
    calls = engine.calls()

    def check(ticket: int) -> int:
        asked.append(ticket)
        return calls.check(ticket)

    window = _Window(lane, 64, 1.0, Calls(calls.submit, check), lambda _: None)
    window.add(transfer_of(lane, 0, 64, 4 << 10))
    window.turn(prune=False)
    for _ in range(4):
        window.turn(prune=False)
    assert asked == list(range(1, 65)), "all of them in four looks"
    engine.over.update({1, 64})
    for left in (63, 63, 63, 62):
        window.turn(prune=False)
        assert len(window.flying) == left
    engine.end_all()
    window.turn(prune=False)
    assert window.empty


async def test_who_finds_one_that_has_ended_looks_on() -> None:
    engine, lane = Engine(), proven()
    window = _Window(lane, 64, 1.0, engine.calls(), lambda _: None)
    window.add(transfer_of(lane, 0, 64, 4 << 10))
    window.turn(prune=False)
    engine.over.update({16, 32, 48, 64})  # 15 before each that have not
    window.turn(prune=False)
    assert len(window.flying) == 60


async def test_no_block_goes_by_an_old_look_at_the_tether() -> None:
    """Blocks are given away in bursts, and the thread may be held up between two of them."""
    engine, lane, looks = Engine(), proven(), list[int]()

    def over() -> None:
        looks.append(len(engine.submitted))

    def slow(*block: Any) -> int:
        until = time.monotonic() + 1e-3
        while time.monotonic() < until:
            pass
        engine.submitted.append((Direction.WRITE, block[2]))
        return len(engine.submitted)

    lane.over = over
    window = _Window(lane, 8, 1.0, Calls(dict.fromkeys(Direction, slow), lambda _: PENDING), lambda _: None)
    window.add(transfer_of(lane, 0, 8, 4096))
    window.turn(prune=False)
    assert looks == list(range(8)), "one before each"


async def test_a_burst_takes_one_look_and_the_next_takes_another() -> None:
    engine, lane, looks = Engine(), proven(), list[int]()
    lane.over = lambda: looks.append(len(engine.submitted))
    window = _Window(lane, 4, 1.0, engine.calls(), lambda _: None)
    window.add(transfer_of(lane, 0, 8, 4096))
    window.turn(prune=False)
    engine.end_all()
    window.turn(prune=False)
    assert {0, 4} <= set(looks)


async def test_a_peer_is_looked_at_as_often_as_its_blocks_end() -> None:
    window = _Window(proven(), 64, 1.0, Engine().calls(), lambda _: None)
    for _ in range(20):
        window._pace(ended=2, left=60)
    slow = window.nap_s
    for _ in range(20):
        window._pace(ended=60, left=2)
    assert slow >= 5 * window.nap_s
    assert slow <= 1e-3, "a small write beside large ones waits for it"
