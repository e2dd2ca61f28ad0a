"""One line a room, and no more lines than a log can bear."""

from __future__ import annotations

import logging
from random import Random
from typing import Any

import pytest
from structlog.testing import capture_logs

from pdctl.core.course import Course, Ended
from pdctl.core.trace import Span, TraceContext
from pdctl.core.transfer import Event, Phase, Side
from pdctl.spans import CURRENT, Open, Spans, spanned, within
from pdctl.telling import Telling

CALLER = TraceContext("a" * 32, "b" * 16)
PEER = TraceContext("d" * 32, "e" * 16)

pytestmark = pytest.mark.usefixtures("info_is_logged")


def spans(into: list[Span], ratio: float = 1.0) -> Spans:
    return Spans(into.append, ratio, Random(3).getrandbits, clock=lambda: 5.0)


def end(telling: Telling, now: float = 2.0, phase: Phase = Phase.SUCCESS, given: Course | None = None) -> None:
    course = given or telling.begin(Phase.BOOTSTRAPPING, 1.0, None, is_first=True)
    course.step(phase, now)
    event, reason = (Event.ABORTED, "why") if phase is Phase.FAILED else (Event.ALL_ANSWERED, None)
    ended = Ended(Side.RECEIVER, 7, phase, event, None, reason, 1, 64, ("10.0.0.9:5",), course)
    telling.ended(phase, course, lambda: ended)


def said(telling: Telling, *ends: tuple[float, Phase]) -> list[Any]:
    with capture_logs() as lines:
        for now, phase in ends:
            end(telling, now, phase)
    return lines


def test_a_room_that_succeeds_has_one_line() -> None:
    (line,) = said(Telling(), (2.0, Phase.SUCCESS))
    assert (line["event"], line["log_level"], line["seconds"]) == ("room succeeded", "info", 1.0)


def test_of_many_rooms_a_second_few_have_lines_and_the_next_line_says_how_many_had_none() -> None:
    telling = Telling(a_second=2.0)
    lines = said(telling, *[(2.0 + n / 1000, Phase.SUCCESS) for n in range(1000)], (10.0, Phase.SUCCESS))
    assert len(lines) == 2 + 1 + 1  # what may come at once, what a second adds, and the last
    assert lines[-1]["unsaid"] + sum(line.get("unsaid", 0) for line in lines[:-1]) + len(lines) == 1001


def test_after_a_pause_a_log_bears_a_second_of_lines_and_not_an_hours() -> None:
    telling = Telling(a_second=3.0)
    assert len(said(telling, *[(4000.0, Phase.SUCCESS)] * 50)) == 3
    assert len(said(telling, *[(9000.0, Phase.SUCCESS)] * 50)) == 3


def test_every_failure_has_its_line_however_many_come() -> None:
    lines = said(Telling(a_second=1.0), *[(2.0, Phase.FAILED)] * 100)
    assert len(lines) == 100
    assert {line["event"] for line in lines} == {"room failed"}
    assert {line["log_level"] for line in lines} == {"warning"}


def test_no_lines_a_second_are_none() -> None:
    assert said(Telling(a_second=0.0), (2.0, Phase.SUCCESS), (900.0, Phase.SUCCESS)) == []


def test_where_nobody_listens_a_room_is_not_even_described() -> None:
    logging.getLogger().setLevel(logging.WARNING)
    telling = Telling()
    course = telling.begin(Phase.BOOTSTRAPPING, 1.0, None, is_first=True)

    def describe() -> Ended:
        raise AssertionError("it was described")

    telling.ended(Phase.SUCCESS, course, describe)
    assert course.trace is None


def test_a_callers_trace_is_handed_on_as_it_came_where_nobody_records() -> None:
    course = Telling().begin(Phase.BOOTSTRAPPING, 1.0, CALLER, is_first=True)
    assert course.trace == CALLER


def test_where_spans_are_recorded_peers_hear_of_our_own() -> None:
    found: list[Span] = []
    telling = Telling(spans(found))
    course = telling.begin(Phase.BOOTSTRAPPING, 1.0, CALLER, is_first=True)
    assert course.trace is not None
    assert (course.trace.trace_id, course.trace.span_id == CALLER.span_id) == (CALLER.trace_id, False)
    end(telling, given=course)
    (span,) = found
    assert (span.context, span.parent) == (course.trace, CALLER)


def test_a_sender_that_was_given_none_takes_the_trace_that_decode_says() -> None:
    found: list[Span] = []
    telling = Telling(spans(found))
    course = telling.begin(Phase.BOOTSTRAPPING, 1.0, None, is_first=False)
    assert course.trace is None
    telling.learned(course, PEER)
    end(telling, given=course)
    assert (found[0].parent, found[0].context.trace_id) == (PEER, PEER.trace_id)


def test_a_sender_that_was_given_one_keeps_it_and_links_the_others() -> None:
    found: list[Span] = []
    telling = Telling(spans(found))
    course = telling.begin(Phase.BOOTSTRAPPING, 1.0, CALLER, is_first=False)
    for heard in (PEER, PEER, CALLER):
        telling.learned(course, heard)
    end(telling, given=course)
    assert (found[0].parent, found[0].links) == (CALLER, (PEER,))


def test_a_caller_that_does_not_record_has_no_span() -> None:
    found: list[Span] = []
    telling = Telling(spans(found))
    unrecorded = TraceContext(CALLER.trace_id, CALLER.span_id, flags=0)
    end(telling, given=telling.begin(Phase.BOOTSTRAPPING, 1.0, unrecorded, is_first=True))
    assert found == []


async def test_work_is_asked_within_its_span_and_so_told_to_others() -> None:
    found: list[Span] = []
    asked: list[TraceContext | None] = []

    async def work(span: Open | None) -> int:
        assert span is not None
        asked.append(CURRENT.get())
        span.say("refused", attempt=1)
        span.show(registry="http://r")
        return 7

    with within(CALLER):
        assert await spanned(spans(found), "pdctl.registration", work) == 7
    (span,) = found
    assert asked == [span.context]
    assert (span.parent, span.attributes, span.error) == (CALLER, {"pdctl.registry": "http://r"}, None)
    assert [event.name for event in span.events] == ["refused"]
    assert CURRENT.get() is None


async def test_work_that_fails_says_why_in_its_span() -> None:
    found: list[Span] = []

    async def work(span: Open | None) -> None:
        raise ValueError("no such seat")

    with pytest.raises(ValueError, match="no such seat"):
        await spanned(spans(found), "pdctl.registration", work)
    assert found[0].error == "ValueError: no such seat"


async def test_work_of_which_nobody_wants_a_span_is_done_as_it_is() -> None:
    async def work(span: Open | None) -> object:
        return span

    assert await spanned(None, "pdctl.registration", work) is None
