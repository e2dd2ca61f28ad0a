"""A reader who comes back gets every change once and in order, or is told that some are gone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.feed import Feed
from pdctl.errors import ConfigError


def filled(*revisions: int, max_entries: int = 100, max_nbytes: int = 10_000) -> Feed:
    feed = Feed(max_entries=max_entries, max_nbytes=max_nbytes)
    for revision in revisions:
        feed.append(revision, b"%d" % revision)
    return feed


def test_a_reader_gets_what_came_after_its_revision() -> None:
    feed = filled(1, 2, 5)
    assert feed.since(1, 10) == [(2, b"2"), (5, b"5")]
    assert feed.since(3, 10) == [(5, b"5")]
    assert feed.since(5, 10) == []


def test_a_reader_takes_no_more_than_it_asked_for() -> None:
    assert filled(1, 2, 3).since(0, 2) == [(1, b"1"), (2, b"2")]


def test_a_reader_below_the_floor_is_told_of_the_gap() -> None:
    feed = filled(1, 2, 3, max_entries=2)
    assert feed.floor == 1
    assert feed.since(0, 10) is None
    assert feed.since(1, 10) == [(2, b"2"), (3, b"3")]


def test_a_reader_from_a_later_revision_has_read_another_feed() -> None:
    assert filled(1, 2).since(3, 10) is None


def test_a_feed_that_starts_late_knows_nothing_of_before() -> None:
    feed = Feed(41)
    assert feed.since(41, 10) == []
    assert feed.since(40, 10) is None


def test_long_entries_push_old_ones_out() -> None:
    feed = Feed(max_entries=100, max_nbytes=10)
    for revision in (1, 2, 3):
        feed.append(revision, b"12345")
    assert (len(feed), feed.nbytes, feed.floor) == (2, 10, 1)


def test_one_entry_over_the_limit_is_kept_alone() -> None:
    feed = Feed(max_entries=100, max_nbytes=10)
    feed.append(1, b"12345")
    feed.append(2, b"x" * 50)
    assert feed.since(1, 10) == [(2, b"x" * 50)]
    feed.append(3, b"y")
    assert (len(feed), feed.nbytes) == (1, 1)


@pytest.mark.parametrize("revision", [2, 1])
def test_a_revision_that_does_not_rise_is_a_defect(revision: int) -> None:
    with pytest.raises(ValueError, match="only rise"):
        filled(2).append(revision, b"")


def test_a_feed_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds nothing"):
        Feed(max_entries=0)


@given(
    steps=st.lists(st.integers(1, 3), max_size=40),
    max_entries=st.integers(1, 10),
    seen=st.integers(-1, 130),
    limit=st.integers(1, 50),
)
def test_there_is_never_a_gap(steps: list[int], max_entries: int, seen: int, limit: int) -> None:
    revisions = [sum(steps[: n + 1]) for n in range(len(steps))]
    feed = filled(*revisions, max_entries=max_entries)
    due = [(revision, b"%d" % revision) for revision in revisions if revision > seen]
    got = feed.since(seen, limit)
    assert got == due[:limit] if got is not None else len(due) > max_entries or not 0 <= seen <= feed.revision
    assert len(feed) <= max_entries
    assert feed.nbytes == sum(len(entry) for _, entry in feed.since(feed.floor, 100) or [])
