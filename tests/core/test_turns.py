"""A lane's turns: room after room, while few enough bytes are under way; and plans cut into turns."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.plan import CopyPlan
from pdctl.core.turns import Turns, cut


def test_rooms_take_turns_however_many_one_of_them_asks_for() -> None:
    turns = Turns(max_nbytes=10)
    asked = [turns.ask(room, 10) for room in "AAAABAC"]
    order = []
    while now := list(turns.begin()):
        assert len(now) == 1
        order.append(now[0].room)
        turns.end(now[0])
    assert "".join(map(str, order)) == "ABCAAAA"
    assert len(asked) == 7
    assert turns.is_idle


def test_a_room_that_comes_goes_before_the_second_turn_of_those_that_wait() -> None:
    turns = Turns(max_nbytes=1)
    for room in "ABAB":
        turns.ask(room, 1)
    first = next(turns.begin())
    turns.ask("C", 1)
    turns.end(first)
    order = [first.room]
    while now := list(turns.begin()):
        order.append(now[0].room)
        turns.end(now[0])
    assert "".join(map(str, order)) == "ABACB"


def test_no_more_than_the_limit_is_under_way_but_for_the_last_turn() -> None:
    turns = Turns(max_nbytes=10)
    asked = [turns.ask(room, 6) for room in range(4)]
    assert list(turns.begin()) == asked[:2]
    assert turns.nbytes == 12
    turns.end(asked[1])
    assert list(turns.begin()) == [asked[2]]


def test_a_turn_larger_than_the_limit_goes_too() -> None:
    turns = Turns(max_nbytes=10)
    huge = turns.ask("A", 1000)
    assert list(turns.begin()) == [huge]
    turns.ask("B", 1)
    assert list(turns.begin()) == []


def test_who_gives_up_waiting_is_not_called_and_leaves_its_place() -> None:
    turns = Turns(max_nbytes=1)
    first, second, third = (turns.ask(room, 1) for room in "ABC")
    assert list(turns.begin()) == [first]
    turns.end(second)
    turns.end(first)
    assert list(turns.begin()) == [third]
    turns.end(third)
    assert turns.is_idle


def test_a_small_turn_does_not_wait_for_large_ones_and_few_pass_at_once() -> None:
    turns = Turns(max_nbytes=640)
    large = [turns.ask(room, 640) for room in "AB"]
    small = [turns.ask(room, 10) for room in "CDEFGHIJK"]
    assert list(turns.begin()) == [large[0], *small[:8]]
    turns.end(small[3])
    assert list(turns.begin()) == [small[8]]
    turns.end(large[0])
    assert list(turns.begin()) == [large[1]]


def test_small_ones_that_never_end_to_come_keep_no_large_one_waiting() -> None:
    turns = Turns(max_nbytes=640)
    first, second = (turns.ask(room, 640) for room in "AB")
    passing = [turns.ask(room, 10) for room in range(8)]
    assert list(turns.begin()) == [first, *passing]
    for number in range(8, 40):
        turns.end(passing.pop(0))
        passing.append(turns.ask(number, 10))
        assert list(turns.begin()) == passing[-1:]
    turns.end(first)
    assert next(turns.begin()) is second


@given(st.lists(st.tuples(st.sampled_from("ABCDE"), st.integers(1, 100)), max_size=60))
def test_who_passes_comes_once_too_and_is_bounded(asks: list[tuple[str, int]]) -> None:
    turns = Turns(640)
    asked = [turns.ask(room, nbytes) for room, nbytes in asks]
    came = []
    while not turns.is_idle:
        now = list(turns.begin())
        assert sum(turn.nbytes for turn in now if turn.passes) < 640 / 8 + 10
        assert all(turn.nbytes <= 10 for turn in now if turn.passes)
        came += now
        for turn in now:
            turns.end(turn)
    assert sorted(map(id, came)) == sorted(map(id, asked))


@given(st.lists(st.tuples(st.sampled_from("ABCDE"), st.integers(1, 50)), max_size=60), st.integers(1, 60))
def test_every_turn_comes_once_and_between_two_of_a_room_all_others_had_theirs(
    asks: list[tuple[str, int]], limit: int
) -> None:
    turns = Turns(limit)
    asked = [turns.ask(room, nbytes) for room, nbytes in asks]
    came, left = [], {room: [t for t in asked if t.room == room] for room in "ABCDE"}
    while not turns.is_idle:
        now = list(turns.begin())
        assert sum(t.nbytes for t in now[:-1]) < limit
        came += now
        for turn in now:
            turns.end(turn)
    assert sorted(map(id, came)) == sorted(map(id, asked))
    for at, turn in enumerate(came):
        left[str(turn.room)].remove(turn)
        nxt = next((n for n, t in enumerate(came[at + 1 :], at + 1) if t.room == turn.room), None)
        if nxt is not None:
            between = {t.room for t in came[at + 1 : nxt]}
            assert between == {room for room, rest in left.items() if rest} - {turn.room}


@given(st.lists(st.integers(1, 100), min_size=1, max_size=50), st.integers(1, 200))
def test_a_cut_plan_is_the_same_copies_in_order_in_pieces_of_about_the_size(lens: list[int], nbytes: int) -> None:
    sizes = np.array(lens, np.int64)
    plan = CopyPlan(np.arange(len(sizes)), np.arange(len(sizes)) + 1000, sizes)
    pieces = cut(plan, nbytes)
    whole = CopyPlan.join(*pieces)
    assert (whole.src.tolist(), whole.dst.tolist(), whole.nbytes.tolist()) == (
        plan.src.tolist(),
        plan.dst.tolist(),
        lens,
    )
    assert all(len(piece) for piece in pieces)
    assert all(piece.total < nbytes + max(lens) for piece in pieces)
    assert len(pieces) <= -(-plan.total // nbytes)
