"""W3C trace context: what is read, what is not, and what is handed on."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.trace import MAX_STATE, TraceContext, trace_of
from pdctl.errors import BadField

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_what_is_read_is_written_again() -> None:
    context = TraceContext.parse(GOOD, "a=1,b=2")
    assert context == TraceContext(TRACE, SPAN, 1, "a=1,b=2")
    assert context.is_sampled
    assert context.headers() == {"traceparent": GOOD, "tracestate": "a=1,b=2"}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(None, id="nothing"),
        pytest.param("", id="empty"),
        pytest.param(GOOD.upper(), id="upper case"),
        pytest.param(f"ff-{TRACE}-{SPAN}-01", id="the version that is none"),
        pytest.param(f"00-{'0' * 32}-{SPAN}-01", id="no trace"),
        pytest.param(f"00-{TRACE}-{'0' * 16}-01", id="no span"),
        pytest.param(GOOD + "-00", id="more than version 00 has"),
        pytest.param(GOOD + "x", id="a letter too much"),
        pytest.param(GOOD[:-1], id="a letter too few"),
        pytest.param(GOOD.replace("-", "_"), id="other separators"),
        pytest.param(GOOD + "\n", id="a line end"),
        pytest.param(GOOD.replace("4", "\u0664", 1), id="digits of another alphabet"),
        pytest.param(f"{GOOD},{GOOD}", id="two of them"),
    ],
)
def test_what_is_no_traceparent_is_no_context(text: str | None) -> None:
    assert TraceContext.parse(text) is None


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    context = TraceContext.parse(f"cc-{TRACE}-{SPAN}-fd-what-comes-later")
    assert context is not None
    assert context.traceparent == GOOD


def test_a_caller_that_does_not_record_is_believed() -> None:
    context = TraceContext.parse(f"00-{TRACE}-{SPAN}-00")
    assert context is not None
    assert not context.is_sampled
    assert context.below(Random(1).getrandbits).traceparent.endswith("-00")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        pytest.param("a=1 ,\tb=2,,", "a=1,b=2", id="blanks and empty members go"),
        pytest.param("tenant@vendor=x y", "tenant@vendor=x y", id="a tenant"),
        pytest.param("A=1", "", id="upper case"),
        pytest.param("a=1,a=2", "", id="a key twice"),
        pytest.param("a", "", id="no value"),
        pytest.param("a=1=2", "", id="two values"),
        pytest.param("a=\u00e4", "", id="not ASCII"),
        pytest.param("a=1\r\nx: y", "", id="a header within"),
        pytest.param(",".join(f"k{n}=1" for n in range(33)), "", id="33 members"),
        pytest.param("a=" + "x" * MAX_STATE, "", id="too long"),
    ],
)
def test_a_state_that_cannot_be_read_costs_only_itself(said: str, kept: str) -> None:
    context = TraceContext.parse(GOOD, said)
    assert context is not None
    assert context.state == kept


def test_a_span_below_is_of_the_same_trace_and_keeps_what_vendors_say() -> None:
    context = TraceContext(TRACE, SPAN, 1, "a=1")
    below = context.below(Random(1).getrandbits)
    assert (below.trace_id, below.flags, below.state) == (TRACE, 1, "a=1")
    assert below.span_id != SPAN
    assert TraceContext.parse(below.traceparent, "a=1") == below


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.0, 0, 0), (0.25, 200, 300), (1.0, 1000, 1000)])
def test_of_our_own_traces_so_many_are_sampled(ratio: float, least: int, most: int) -> None:
    bits = Random(7).getrandbits
    assert least <= sum(TraceContext.begun(bits, ratio).is_sampled for _ in range(1000)) <= most


def test_no_draw_makes_an_id_that_is_none() -> None:
    context = TraceContext.begun(lambda _: 0)
    assert TraceContext.parse(context.traceparent) == context
    assert TraceContext.parse(context.below(lambda _: 0).traceparent) is not None


def test_a_caller_may_give_a_context_a_text_or_nothing() -> None:
    context = TraceContext(TRACE, SPAN)
    assert trace_of(context) is context
    assert trace_of(GOOD) == context
    assert trace_of("nonsense") is None
    assert trace_of(None) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("trace_id", TRACE[1:]), ("trace_id", "0" * 32), ("span_id", SPAN.upper()), ("state", "a=1\r\nx: y")],
)
def test_a_context_made_by_hand_holds_only_what_a_header_may(field: str, value: str) -> None:
    with pytest.raises(BadField, match=field):
        replace(TraceContext(TRACE, SPAN), **{field: value})  # type: ignore[arg-type]  # of several kinds


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_text_makes_it_raise_and_what_it_takes_is_fit_for_a_header(parent: str, state: str) -> None:
    context = TraceContext.parse(parent, state) or TraceContext.parse(GOOD, state)
    assert context is not None
    assert all(value.isascii() and value.isprintable() for value in context.headers().values())
    assert TraceContext.from_headers(context.headers()) == context
