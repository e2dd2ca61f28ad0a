"""Server-sent events: whole ones, however the stream is cut; bounded, whatever it sends."""

from __future__ import annotations

from itertools import pairwise, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.events import Event, Events
from pdctl.errors import TooLarge

STREAM = (
    b"retry: 1873\n\n: alive\n\nevent: reset\ndata: {}\n\n"
    b'id: 5f0c-17\nevent: change\ndata: {"a":1}\n\ndata:one\ndata: two\nunknown: x\n\nevent: nothing\n\n'
)
SAID = [Event("reset", b"{}"), Event("change", b'{"a":1}', "5f0c-17"), Event("message", b"one\ntwo")]


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12), ends=st.sampled_from([b"\n", b"\r\n"]))
def test_the_same_events_come_wherever_the_stream_is_cut(cuts: list[int], ends: bytes) -> None:
    stream, events = STREAM.replace(b"\n", ends), Events(1000)
    at = [0, *sorted(cuts), len(stream)]
    assert [event for a, b in pairwise(at) for event in events.feed(stream[a:b])] == SAID


def test_what_the_stream_ends_in_the_middle_of_was_never_said() -> None:
    assert Events(1000).feed(b'event: change\ndata: {"a":1}\n') == []


@pytest.mark.parametrize("piece", [b"x" * 40, b"data: 12\n", b": \n" * 3 + b"data: 1234567890\n"], ids=str)
def test_a_line_or_an_event_without_end_is_refused(piece: bytes) -> None:
    events = Events(100)
    with pytest.raises(TooLarge, match="more than 100 bytes"):
        list(map(events.feed, repeat(piece, 1000)))


def test_signs_of_life_are_not_held_against_a_stream() -> None:
    events = Events(100)
    for _ in range(1000):
        events.feed(b": alive\n\n: and again\nevent: x\n")
    assert events.feed(b"data: 1\n\n") == [Event("x", b"1")]
