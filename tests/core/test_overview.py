"""What a registry remembers of its ranks and of what has happened: bounded, of one life each, and only while fresh."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.capacity import ReportLimits
from pdctl.core.chronicle import CROWD, SAME_WITHIN_S, Chronicle, wall
from pdctl.core.kinds import Kind, State
from pdctl.core.latest import Latest
from pdctl.core.overview import News, Place, ReportBook
from pdctl.core.report import LinkSeen, Report, Wanted, in_a_line, short_seat
from pdctl.core.route import Seat
from pdctl.core.sayings import place_in
from pdctl.errors import BadField, ConfigError, LimitReached
from tests.conftest import Clock

AT = 1_790_000_000.0


def place(tp: int = 0) -> Place:
    return "p", Seat(0, 0, tp, 0)


def report(**more: Any) -> Report:
    return Report("prefill", **more)


def told(book: ReportBook, tp: int = 0, epoch: int = 1, now: float = 0.0, body: bytes = b"{}", **more: Any) -> News:
    return book.take(place(tp), epoch, report(**more), body, now)


# Reports


def test_no_more_reports_are_held_than_may_be_and_who_reports_again_is_no_further_one() -> None:
    book = ReportBook(ReportLimits(max_reports=2))
    told(book, 0)
    told(book, 1)
    with pytest.raises(LimitReached, match="max_reports"):
        told(book, 2)
    told(book, 1)
    assert len(book) == 2


def test_no_more_bytes_are_held_than_may_be_and_a_report_that_goes_makes_room() -> None:
    book = ReportBook(ReportLimits(max_nbytes=100))
    told(book, 0, body=b"x" * 60)
    with pytest.raises(LimitReached, match="max_nbytes"):
        told(book, 1, body=b"x" * 41)
    told(book, 0, body=b"x" * 100)
    assert book.drop(place(0))
    told(book, 1, body=b"x" * 100)
    assert book.nbytes == 100


def test_a_report_goes_with_its_own_life_only() -> None:
    book = ReportBook()
    told(book, epoch=2)
    assert not book.drop(place(), epoch=1)
    assert book.drop(place(), epoch=2)
    assert not book.drop(place(), epoch=2)


def test_only_those_that_were_silent_for_long_expire(clock: Clock) -> None:
    book = ReportBook()
    told(book, 0, now=clock())
    told(book, 1, now=clock())
    clock.forward(10.0)
    told(book, 0, now=clock())
    clock.forward(5.0)
    assert book.expire(clock()) == [place(1)]
    assert book.expire(clock()) == []


def test_a_crowd_is_asked_to_report_less_often_and_is_waited_for_longer(clock: Clock) -> None:
    book = ReportBook(ReportLimits(per_s=1.0))
    for tp in range(10):
        told(book, tp, now=clock())
    assert (book.again_s, book.expire_after_s) == (10.0, 30.0)
    clock.forward(29.0)
    assert book.expire(clock()) == []
    assert ReportBook().again_s == 5.0


@pytest.mark.parametrize(
    "wrong", [{"again_s": 0.0}, {"expire_after_s": 5.0}, {"max_reports": -1}, {"per_s": 0.0}, {"per_s": float("nan")}]
)
def test_limits_that_cannot_hold_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ReportLimits(**wrong)


links = st.dictionaries(st.sampled_from("abcd"), st.sampled_from(State), max_size=4)


@given(st.lists(links, max_size=6))
def test_who_hears_only_what_turned_knows_how_every_link_stands(reports: list[dict[str, State]]) -> None:
    book, known = ReportBook(), dict[str, State]()
    for standing in reports:
        news = told(book, links=tuple(LinkSeen(session, state) for session, state in standing.items()))
        for was, link in news.links:
            assert was is known.get(link.session, State.TRUSTED)
            assert link.state is not was
            known[link.session] = link.state
        for session in "abcd":
            assert known.get(session, State.TRUSTED) is standing.get(session, State.TRUSTED)


def test_another_life_in_the_seat_begins_anew() -> None:
    book = ReportBook()
    out = (LinkSeen("a", State.BLOCKED),)
    assert told(book, epoch=1, links=out).links
    assert not told(book, epoch=1, links=out).links
    assert told(book, epoch=2, links=out).links


def test_what_a_registry_answers_is_read_or_refused() -> None:
    assert Wanted.from_body({"again_s": 5, "more": 1}) == Wanted(5.0)
    wrong: object
    for wrong in ({}, {"again_s": 0}, {"again_s": True}, {"again_s": "5"}, []):
        with pytest.raises(BadField):
            Wanted.from_body(wrong)


@pytest.mark.parametrize(
    ("seat", "short"),
    [((0, 0, 0, 0), "tp0"), ((0, 0, 3, 0), "tp3"), ((1, 0, 0, 0), "dp1"), ((1, 2, 3, 4), "dp1-cp2-tp3-pp4")],
)
def test_a_seat_is_written_without_its_zeros(seat: tuple[int, int, int, int], short: str) -> None:
    assert short_seat(Seat(*seat)) == short


@given(st.text(max_size=600))
def test_whatever_is_said_becomes_a_line_that_a_report_may_bear(text: str) -> None:
    line = in_a_line(text)
    assert 0 < len(line) <= 400
    assert line.isprintable()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v1/instances/p/ranks/tp1/report", ("p", "tp1")),
        ("/v1/instances/p/drain", ("p", None)),
        ("/route", (None, None)),
    ],
)
def test_a_path_says_whom_it_was_about(path: str, found: tuple[str | None, str | None]) -> None:
    assert place_in(path) == found


# Events


def test_a_reader_that_asks_from_where_it_stopped_misses_nothing_and_hears_nothing_twice() -> None:
    book, heard, following = Chronicle(), list[int](), 0
    for number in range(10):
        book.add("left" if number % 2 else "seated", f"event {number}", AT)
        found, following = book.since(following, 1)
        heard += [event.id for event in found]
    assert heard == list(range(1, 11))
    assert book.since(0, 2, kind="left")[1] == 5, "after the second of its kind"
    assert book.since(following, 9) == ([], 11)


def test_the_last_events_are_kept_and_the_oldest_go() -> None:
    book = Chronicle(max_events=3)
    for number in range(5):
        book.add("left", f"event {number}", AT)
    assert (book.oldest, book.next) == (3, 6)
    assert [event.id for event in book.since(0, 9)[0]] == [3, 4, 5]
    assert book.get(2) is None
    assert book.get(6) is None
    kept = book.get(5)
    assert kept is not None
    assert kept.sentence == "event 4"


def test_one_refusal_that_is_repeated_is_counted_and_others_are_apart(clock: Clock) -> None:
    book = Chronicle()

    def refused(**about: Any) -> int:
        known = {"peer": "h", "instance": "p", "reason": "stale", "field": None}
        return book.refused("no", AT, clock(), **known | about).count

    assert [refused(), refused(), refused(peer="other"), refused(field="page_size"), refused()] == [1, 2, 1, 1, 3]
    clock.forward(SAME_WITHIN_S)
    assert refused() == 1
    assert len(book.since(0, 99)[0]) == 4


def test_a_refusal_whose_event_is_gone_already_is_a_new_one(clock: Clock) -> None:
    book = Chronicle(max_events=2)
    book.refused("no", AT, clock(), peer="h")
    for _ in range(3):
        book.add("left", "x", AT)
    assert book.refused("no", AT, clock(), peer="h").id == 5


def test_strangers_cannot_make_it_remember_more_and_more(clock: Clock) -> None:
    book = Chronicle()
    for number in range(3000):
        book.refused("no\n" * 1000, AT, clock(), peer=str(number), held="x" * 10_000)
    assert len(book._said) <= 1024
    (last,) = book.since(3000, 1)[0]
    assert len(last.sentence) <= 800
    assert last.held is not None
    assert len(last.held) <= 200


def test_who_is_kept_out_is_counted_by_peer_and_a_crowd_of_them_together(clock: Clock) -> None:
    book = Chronicle()

    def deny(peer: str, reason: str = "bad_token") -> None:
        book.kept_out(Kind.DENIED, f"{peer} was denied", "many more", AT, clock(), peer=peer, reason=reason)

    for _ in range(1000):
        deny("10.0.0.9")
    deny("10.0.0.9", "untrusted")
    first, other = book.since(0, 9)[0]
    assert (first.peer, first.count, first.reason) == ("10.0.0.9", 1000, "bad_token")
    assert (other.peer, other.count, other.reason) == ("10.0.0.9", 1, "untrusted")
    for number in range(5000):
        deny(f"10.1.{number}")
    told = book.since(0, 9999)[0]
    assert len(told) == CROWD + 1
    assert (told[-1].sentence, told[-1].peer, told[-1].count) == ("many more", None, 5000 - (CROWD - 2))
    deny("10.0.0.9")
    assert book.since(0, 1)[0][0].count == 1001, "who has an event keeps it"
    clock.forward(SAME_WITHIN_S)
    deny("10.2.0.1")
    assert book.since(0, 9999)[0][-1].peer == "10.2.0.1"


def test_a_moment_is_written_so_that_people_and_machines_can_read_it() -> None:
    assert wall(1_795_305_541.1234) == "2026-11-21T23:59:01.123Z"


# What has changed since when


@given(st.lists(st.one_of(st.sampled_from("abc"), st.none()), max_size=30))
def test_a_reader_is_told_each_name_that_changed_since_once_in_order(steps: list[str | None]) -> None:
    """None: it reads."""
    latest, seen, changed = Latest[str](), 0, list[str]()
    for step in steps:
        if step is None:
            assert latest.since(seen) == changed
            seen, changed = latest.number, []
        else:
            latest.touch(step)
            changed = [*(name for name in changed if name != step), step]
    assert latest.since(latest.number) == []


def test_who_missed_a_change_that_is_not_known_any_more_is_told_so() -> None:
    latest = Latest[int](max_keys=2)
    for name in range(3):
        latest.touch(name)
    assert latest.since(0) is None
    assert latest.since(1) == [1, 2]
