"""Whose blocks go next: nothing waits for what is much larger, equals end one after another, and nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.blocks import Direction, Lane, Transfer
from pdctl.engine.order import Order
from pdctl.errors import Cause

KIB, MIB = 1 << 10, 1 << 20
LANE = Lane(iter(()))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def transfer(loop: asyncio.AbstractEventLoop, n: int, nbytes: int, kind: type[Transfer] = Transfer) -> Transfer:
    return kind(LANE, 0, Direction.WRITE, iter([(0, 0, nbytes)] * n), n, n * nbytes, loop.create_future())


def gone(order: Order, most: int = 1 << 30) -> list[Transfer]:
    """Of whom each block was that is submitted now, at most so many."""
    found: list[Transfer] = []
    while order and len(found) < most:
        whose, is_over = order.take(), False
        while not whose.exhausted and not is_over and len(found) < most:
            _, _, nbytes = next(whose.blocks)
            whose.submitted += 1
            found.append(whose)
            is_over = order.went(nbytes)
        order.put_back(whose)
    return found


def order_of(*transfers: Transfer) -> Order:
    order = Order()
    for each in transfers:
        order.add(each)
    return order


def test_small_blocks_do_not_wait_for_a_large_block_each(loop: asyncio.AbstractEventLoop) -> None:
    large, small = transfer(loop, 20, MIB), transfer(loop, 64, 4 * KIB)
    went = gone(order_of(large, small))
    before = Counter(map(id, went[: len(went) - went[::-1].index(small)]))
    assert 2 <= before[id(large)] <= 3, "64 blocks of 4 KiB cost about as much as 2 of 1 MiB"


def test_a_large_one_goes_on_beside_small_ones_that_never_end(loop: asyncio.AbstractEventLoop) -> None:
    large = transfer(loop, 64, MIB)
    order, small = order_of(large), itertools.count()
    while not large.exhausted:
        order.add(transfer(loop, 8, 64 * KIB))  # half a block of the large one
        gone(order, most=8)
        assert next(small) < 3 * 2 * 64, "it has its half"


def test_few_of_one_size_end_one_after_another(loop: asyncio.AbstractEventLoop) -> None:
    """In turns all would end at once, and nothing moved until the next ones had come."""
    each = [transfer(loop, 6, MIB) for _ in range(3)]
    assert gone(order_of(*each)) == [whose for whose in each for _ in range(6)]


def test_of_many_a_quarter_takes_turns_until_it_is_over(loop: asyncio.AbstractEventLoop) -> None:
    """Their ends come together, which costs the loop less, while three quarters are left to move."""
    each = [transfer(loop, 6, MIB) for _ in range(8)]
    went = gone(order_of(*each))
    assert went[:6] == [each[0], each[1]] * 3
    assert set(map(id, went[:12])) == {id(each[0]), id(each[1])}
    assert {id(whose) for whose in went[12:18]} == {id(each[2])}, "of six that were left one goes alone"


def test_what_comes_later_is_not_before_its_equals(loop: asyncio.AbstractEventLoop) -> None:
    first, later = transfer(loop, 6, MIB), transfer(loop, 6, MIB)
    order = order_of(first)
    gone(order, most=2)
    order.add(later)
    assert gone(order) == [first] * 4 + [later] * 6


def test_who_was_alone_for_long_is_not_in_debt_to_who_comes_then(loop: asyncio.AbstractEventLoop) -> None:
    old, new = transfer(loop, 80, MIB), transfer(loop, 20, MIB)
    order = order_of(old)
    gone(order, most=20)
    order.add(new)
    assert 4 <= Counter(map(id, gone(order, most=10)))[id(old)] <= 6


def test_what_is_stopped_while_another_has_its_turn_is_taken_out_once(loop: asyncio.AbstractEventLoop) -> None:
    each = [transfer(loop, 6, MIB) for _ in range(8)]
    order = order_of(*each)
    whose = order.take()
    whose.stop(Cause.PEER_GONE, "its own block failed")
    order.stop(Cause.PEER_GONE, "another failed first")
    assert order.prune() == each[1:]
    assert [one.by_another for one in each] == [False] + [True] * 7
    assert not order.put_back(whose)
    assert not order
    assert order.prune() == []


class StoppedBetweenTwoLooks(Transfer):
    """By the loop's thread, while the mover's prunes."""

    @property
    def exhausted(self) -> bool:
        was, self.verdict = self.verdict, (Cause.LOCAL, "cancelled")
        return was is not None


def test_what_is_stopped_while_it_is_looked_at_is_not_lost(loop: asyncio.AbstractEventLoop) -> None:
    """Else nobody would ever tell it that it is at rest."""
    beside, late = transfer(loop, 6, MIB), transfer(loop, 6, MIB, StoppedBetweenTwoLooks)
    beside.stop(Cause.LOCAL, "cancelled")
    order = order_of(beside, late)
    assert order.prune() == [beside]
    assert order.prune() == [late]
    assert not order


SIZES = st.tuples(st.integers(1, 40), st.sampled_from([1 * KIB, 4 * KIB, 64 * KIB, 100 * KIB, MIB]))
STEPS = st.lists(st.one_of(SIZES, st.integers(1, 60), st.just("stop")), max_size=40)


@given(steps=STEPS)
def test_each_block_goes_once_or_its_transfer_was_stopped(steps: list[tuple[int, int] | int | str]) -> None:
    loop = asyncio.new_event_loop()
    order, known, pruned = Order(), list[Transfer](), list[Transfer]()
    went: Counter[int] = Counter()
    for step in [*steps, 1 << 30]:
        if isinstance(step, tuple):
            known.append(transfer(loop, *step))
            order.add(known[-1])
        elif isinstance(step, int):
            went.update(map(id, gone(order, most=step)))
        elif alive := [one for one in known if not one.exhausted]:
            alive[len(alive) // 2].stop(Cause.LOCAL, "cancelled")
            pruned += order.prune()
    loop.close()
    assert not order
    for one in known:
        assert went[id(one)] == one.submitted
        assert one.exhausted
        assert (one in pruned) == (one.verdict is not None), "told once, by whoever took it out"
    assert len(pruned) == len({id(one) for one in pruned})
