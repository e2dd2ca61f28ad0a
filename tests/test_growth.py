"""What came and went leaves nothing behind, however often: bytes held by Python, after much against after little.

A million of each, in the memory of a real process: `./dev bench memory`.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.feed import Feed
from pdctl.core.lives import Claim, Owner
from pdctl.core.registry import REMEMBER_S, Registry
from pdctl.core.rooms import RoomBook
from pdctl.core.route import Announcement, Seat, Shape

GROWTH = 1.05
SLACK_NBYTES = 16_384
"""What Python's own free lists come to, and longer numbers."""
SEATS = 32
STEP_S = REMEMBER_S / 10
WARM_UP, MEASURED = 15, 30
"""Rounds: after the first ones everything that is kept for a time is there in full."""

Round = Callable[[float], None]


def shape(seats: int) -> Shape:
    return Shape(attn_tp_size=seats, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")


FLEET, SINGLE = shape(SEATS), shape(1)


def claim(instance: str, life: int, ttl_s: float | None, seat: int = 0, of: Shape = SINGLE) -> Claim:
    # few hosts, many ports: what is known of 4,096 hosts is kept, and would pass for growth
    address = Endpoint(f"10.0.0.{life % 64}", 1024 + life % 60_000)
    announcement = Announcement(Seat(0, 0, seat, 0), of, address)
    return Claim(instance, announcement, Owner(address.host), labels={"life": str(life)}, ttl_s=ttl_s)


def restarts(registry: Registry) -> Iterator[Round]:
    """Stock ranks: each round every seat is taken by a new life."""
    life = 0

    def one(now: float) -> None:
        nonlocal life
        for seat in range(SEATS):
            life += 1
            registry.claim(claim("fleet", life, None, seat, FLEET), now)

    yield one


def expiries(registry: Registry) -> Iterator[Round]:
    """Pods: instances of a name that never comes again; they fall silent and are forgotten."""
    life = 0

    def one(now: float) -> None:
        nonlocal life
        for _ in range(20):
            life += 1
            registry.claim(claim(f"pod-{life}", life, 30.0), now)

    yield one


def flaps(registry: Registry) -> Iterator[Round]:
    """One instance that comes, goes and comes, and is away most of the time."""
    life = 0

    def one(now: float) -> None:
        nonlocal life
        for second in range(20):
            life += 1
            taken = registry.claim(claim("flapping", life, 30.0), now + second)
            registry.leave("flapping", Seat(0, 0, 0, 0), taken.life.epoch, None, now + second)

    yield one


def reshapes(registry: Registry) -> Iterator[Round]:
    """An instance that is restarted with another shape each time, and never complete."""
    life = 0

    def one(now: float) -> None:
        nonlocal life
        for n in range(2, SEATS):
            life += 1
            registry.claim(claim("reshaped", life, None, 0, shape(n)), now)

    yield one


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """How many bytes Python holds that were asked for since."""

    def held() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        yield held
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [restarts, expiries, flaps, reshapes], ids=lambda kind: kind.__name__)
def test_a_registry_through_which_many_came_and_went_is_no_larger(kind: Callable[[Registry], Iterator[Round]]) -> None:
    with traced() as held:
        registry, now = Registry(), 0.0
        one = next(kind(registry))

        def rounds(n: int) -> int:
            nonlocal now
            for _ in range(n):
                one(now)
                now += STEP_S
                while registry.next_deadline <= now and registry.tick(now):
                    pass
            return held()

        before = rounds(WARM_UP)
        assert rounds(MEASURED) < before * GROWTH + SLACK_NBYTES


def test_a_room_book_through_which_many_rooms_went_is_no_larger() -> None:
    with traced() as held:
        book, room, now = RoomBook(), 0, 0.0

        def rounds(n: int) -> int:
            nonlocal room, now
            for _ in range(n):
                for _ in range(1000):
                    room += 1
                    book.put(room * 7919, 0, now)
                book.get(range(7919 * (room - 500), 7919 * room, 7919), now)
                now += 60.0
                while book.expire(now, 500) == 500:
                    pass
            return held()

        before = rounds(WARM_UP)
        assert rounds(MEASURED) < before * GROWTH + SLACK_NBYTES


def test_a_feed_through_which_many_changes_went_is_no_larger() -> None:
    with traced() as held:
        feed = Feed(max_entries=1000)
        for revision in range(1, 5_001):
            feed.append(revision, b"%0100d" % revision)
        before = held()
        for revision in range(5_001, 25_001):
            feed.append(revision, b"%0100d" % revision)
        assert held() < before * GROWTH + SLACK_NBYTES
