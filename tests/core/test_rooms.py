"""Rooms: the last announcement wins, the limit holds, and nothing is forgotten too early or kept for ever."""

from __future__ import annotations

import statistics
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.rooms import EXTENSIONS, RoomBook
from pdctl.errors import LimitReached

HUGE = 2**63 + 5


def sweep(book: RoomBook, now: float, budget: int = 1000) -> None:
    while book.expire(now, budget) == budget:
        pass


def test_the_last_announcement_wins() -> None:
    book = RoomBook()
    book.put(77, 1, now=0.0)
    book.put(77, 2, now=1.0)
    assert book.get([77], now=1.0) == {77: 2}
    assert len(book) == 1


@pytest.mark.parametrize("room", [0, -1, HUGE, -HUGE])
def test_any_integer_is_a_room(room: int) -> None:
    book = RoomBook()
    book.put(room, 3, now=0.0)
    assert book.get([room, room + 1], now=0.0) == {room: 3}


def test_a_room_nobody_asks_for_ends_on_time_swept_or_not() -> None:
    book = RoomBook(ttl_s=10.0)
    book.put(1, 0, now=0.0)
    book.put(2, 0, now=0.0)
    assert book.get([1], now=9.9) == {1: 0}
    assert book.get([2], now=10.0) == {}
    assert len(book) == 1


def test_a_room_that_is_asked_for_lives_on_but_not_for_ever() -> None:
    book = RoomBook(ttl_s=10.0)
    book.put(1, 0, now=0.0)
    lived = 0.0
    for second in range(1, 200):
        sweep(book, now=float(second))
        if book.get([1], now=float(second)):
            lived = float(second)
    assert 10.0 * EXTENSIONS <= lived < 10.0 * (EXTENSIONS + 2)
    assert len(book) == 0


def test_being_asked_for_once_gives_one_more_term() -> None:
    book = RoomBook(ttl_s=10.0)
    book.put(1, 0, now=0.0)
    book.get([1], now=5.0)
    sweep(book, now=10.0)
    assert len(book) == 1
    sweep(book, now=20.0)
    assert len(book) == 0


def test_a_room_asked_for_long_ago_is_not_revived_by_a_late_question() -> None:
    book = RoomBook(ttl_s=10.0)
    book.put(1, 0, now=0.0)
    book.get([1], now=5.0)
    assert book.get([1], now=20.0) == {}


def test_announcing_again_starts_a_new_life() -> None:
    book = RoomBook(ttl_s=10.0)
    book.put(1, 0, now=0.0)
    book.put(1, 0, now=9.0)
    sweep(book, now=15.0)
    assert book.get([1], now=15.0) == {1: 0}


def test_a_room_too_many_is_refused_naming_the_limit_and_the_rest_goes_on() -> None:
    book = RoomBook(limit=2, ttl_s=10.0)
    book.put(1, 0, now=0.0)
    book.put(2, 0, now=5.0)
    with pytest.raises(LimitReached, match="2 rooms are held, the limit"):
        book.put(3, 0, now=5.0)
    book.put(2, 7, now=6.0)
    assert book.get([2, 3], now=6.0) == {2: 7}
    book.put(3, 0, now=10.0)
    assert book.get([1, 2, 3], now=10.0) == {2: 7, 3: 0}


def test_a_sweep_keeps_to_its_budget_and_says_when_it_is_done() -> None:
    book = RoomBook(ttl_s=10.0)
    for room in range(1000):
        book.put(room, 0, now=0.0)
    assert book.expire(9.0, budget=300) == 0
    assert [book.expire(10.0, budget=300) for _ in range(4)] == [300, 300, 300, 100]
    assert len(book) == 0


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(["put", "get", "sweep"]), st.floats(0, 4)), max_size=60))
def test_no_order_of_events_loses_a_room_early_or_keeps_one_late(events: list[tuple[int, str, float]]) -> None:
    """Against a plain record of when each room was announced: alive for one term surely, over after all of them."""
    book, announced, now = RoomBook(ttl_s=10.0), dict[int, float](), 0.0
    for room, event, pause in events:
        now += pause
        if event == "put":
            book.put(room, room, now)
            announced[room] = now
        elif event == "sweep":
            sweep(book, now, budget=7)
        found = book.get([room], now) if event == "get" else {}
        if event == "get" and now < announced.get(room, -1000.0) + 10.0:
            assert found == {room: room}
        if event == "get" and now >= announced.get(room, -1000.0) + 10.0 * (EXTENSIONS + 2):
            assert found == {}
        assert len(book) <= len(announced)


def test_a_room_costs_less_than_half_of_what_it_costs_stock() -> None:
    """303 bytes there (measured: a million rooms in its table)."""
    numbers = [number * 0x9E37_79B9_7F4A_7C15 % 2**63 for number in range(100_000)]
    tracemalloc.start()
    book = RoomBook()
    for place, room in enumerate(numbers):
        book.put(room, place % 8, now=place / 20_000)
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    a_number = 48  # its own, which the table keeps: made before the count began
    assert nbytes / len(numbers) + a_number < 151


def test_no_slice_of_a_large_sweep_holds_up_the_loop() -> None:
    book = RoomBook(limit=200_000, ttl_s=10.0)
    for room in range(200_000):
        book.put(room * 7919, room % 8, now=0.0)
    book.get((room * 7919 for room in range(0, 200_000, 2)), now=1.0)
    slices: list[float] = []
    for _ in range(400):
        began = time.perf_counter()
        assert book.expire(10.0, budget=500) == 500
        slices.append(time.perf_counter() - began)
    assert statistics.median(slices) < 0.005
    assert book.expire(10.0, budget=500) == 0
    assert len(book) == 100_000
