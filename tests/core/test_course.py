"""What is said of a room when it is over."""

from __future__ import annotations

import pytest

from pdctl.core.course import MAX_PEERS, Course, Ended
from pdctl.core.trace import TraceContext
from pdctl.core.transfer import Event, Phase, Side
from pdctl.errors import Cause

CALLER = TraceContext("a" * 32, "b" * 16, state="v=1")
OWN = TraceContext("a" * 32, "c" * 16)


def course(*steps: tuple[Phase, float], given: TraceContext | None = None) -> Course:
    (phase, since), *later = steps
    made = Course(phase, since, given)
    for step in later:
        made.step(*step)
    return made


SENT = course(
    (Phase.BOOTSTRAPPING, 10.0),
    (Phase.WAITING_FOR_INPUT, 11.0),
    (Phase.TRANSFERRING, 11.5),
    (Phase.SUCCESS, 11.75),
    given=CALLER,
)
TORN = course((Phase.BOOTSTRAPPING, 10.0), (Phase.WAITING_FOR_INPUT, 10.5), (Phase.FAILED, 13.5))


def succeeded(peers: tuple[str, ...] = ("10.0.0.9:5000",)) -> Ended:
    return Ended(Side.SENDER, 7, Phase.SUCCESS, Event.LAST_CHUNK_LANDED, None, None, 3, 4096, peers, SENT)


def failed(cause: Cause | None = None) -> Ended:
    why = (Event.TIMED_OUT, cause, "no first chunk from the prefill engine")
    return Ended(Side.SENDER, 2**63, Phase.FAILED, *why, 0, 0, (), TORN)


def test_the_line_says_how_long_each_phase_took_and_all_of_them() -> None:
    line = succeeded().line()
    assert line["seconds"] == 1.75
    assert (line["bootstrapping_s"], line["waiting_for_input_s"], line["transferring_s"]) == (1.0, 0.5, 0.25)
    assert sum(succeeded().by_phase().values()) == succeeded().seconds
    assert (line["room"], line["side"], line["nbytes"], line["pages"]) == (7, "sender", 4096, 3)
    assert line["peers"] == ["10.0.0.9:5000"]
    assert line["trace_id"] == CALLER.trace_id


@pytest.mark.parametrize(("cause", "said"), [(None, "timed_out"), (Cause.PEER_GONE, "peer_gone")])
def test_the_line_of_a_failure_says_in_which_phase_and_why(cause: Cause | None, said: str) -> None:
    line = failed(cause).line()
    assert (line["phase"], line["ended_by"], line["cause"]) == ("waiting_for_input", "timed_out", said)
    assert line["reason"] == "no first chunk from the prefill engine"
    assert "trace_id" not in line


def test_many_peers_are_counted_and_the_first_are_named() -> None:
    line = succeeded(tuple(f"10.0.0.{n}:5000" for n in range(40))).line()
    assert line["peers_in_all"] == 40
    assert isinstance(line["peers"], list)
    assert len(line["peers"]) == MAX_PEERS


def test_the_span_lies_below_the_callers_and_has_a_phase_an_event() -> None:
    span = succeeded().span(OWN)
    assert (span.name, span.context, span.parent) == ("pdctl.room.sender", OWN, CALLER)
    assert (span.began, span.ended) == (10.0, 11.75)
    assert [(event.name, event.at) for event in span.events] == [
        ("waiting_for_input", 11.0),
        ("transferring", 11.5),
        ("success", 11.75),
    ]
    assert span.error is None
    assert span.attributes["pdctl.nbytes"] == 4096


def test_the_span_of_a_failure_has_its_words_and_its_cause() -> None:
    span = failed(Cause.REFUSED).span(OWN)
    assert span.error == "no first chunk from the prefill engine"
    assert span.attributes["error.type"] == "refused"
    assert span.attributes["pdctl.room"] == str(2**63)
    assert span.parent is None


def test_a_room_that_failed_at_once_has_a_phase_too() -> None:
    ended = Ended(
        Side.RECEIVER, 1, Phase.FAILED, Event.ABORTED, None, "x", 0, 0, (), course((Phase.BOOTSTRAPPING, 1.0))
    )
    assert (ended.line()["phase"], ended.seconds) == ("failed", 0.0)
