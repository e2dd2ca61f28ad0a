"""Who says that a room's pages are free: the answer that ends the room, or the open answer, and never both."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from pdctl.core.layout import Pool, RankPools
from pdctl.errors import RoomFailed
from pdctl.tenancy import Tenancy

LINE = {"event": "released", "room": 5, "ticket": 7}


@pytest.fixture
def life() -> Tenancy:
    pools = RankPools(Pool((1,), (64,)), Pool((2,), (64,)))
    found = Tenancy(None, pools, [], 0, None)  # type: ignore[arg-type]  # nothing is asked of the offer and the opening
    found.take(7)
    return found


def lines(life: Tenancy) -> list[dict[str, Any]]:
    return [life.events.get_nowait() for _ in range(life.events.qsize())]


async def test_an_answer_that_says_it_is_followed_by_no_line(life: Tenancy) -> None:
    with life.answering(7) as is_free:
        life.release(5, 7)(None)  # type: ignore[arg-type]
        assert is_free()
    assert (lines(life), life.tickets) == ([], set())


async def test_an_answer_that_comes_before_is_followed_by_a_line(life: Tenancy) -> None:
    with life.answering(7) as is_free:
        assert not is_free()
    assert lines(life) == []
    life.free(5, 7)
    life.free(5, 7)
    assert lines(life) == [LINE]


async def test_where_the_room_fails_a_line_says_it(life: Tenancy) -> None:
    with suppress(RoomFailed), life.answering(7):
        life.free(5, 7)
        raise RoomFailed(5, "it fails")
    assert lines(life) == [LINE]


async def test_of_two_requests_that_end_one_room_one_at_most_says_it(life: Tenancy) -> None:
    with life.answering(7) as first, life.answering(7) as second:
        life.free(5, 7)
        said = [first(), second()]
    assert len(lines(life)) + sum(said) == 1
