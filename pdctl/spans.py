"""
The port for spans: what is given one when a piece of work is over; and for whose request a task works just now.

    with within(context):                     # what is asked of a registry here says so in its headers
        async with ...

Knows no exporter: tracing.py has that, and `None` stands for "nobody wants any", which costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from random import SystemRandom
from typing import TypeVar

from pdctl.core.trace import Attribute, Bits, Event, Span, TraceContext

T = TypeVar("T")

MAX_EVENTS = 32  # a registry may be away for a day, and each attempt is an event

CURRENT: ContextVar[TraceContext | None] = ContextVar("pdctl_trace", default=None)
"""For whom the present task works; tasks born in it inherit it."""


@contextmanager
def within(trace: TraceContext | None) -> Iterator[None]:
    """Ask others on behalf of `trace`, until the end of the block."""
    before = CURRENT.set(trace)
    try:
        yield
    finally:
        CURRENT.reset(before)


@dataclass(frozen=True, slots=True)
class Spans:
    """Where spans go, and how many traces of our own are recorded. `record` neither waits nor raises."""

    record: Callable[[Span], None]
    ratio: float = 1.0
    bits: Bits = field(default_factory=lambda: SystemRandom().getrandbits)
    clock: Callable[[], float] = time.monotonic

    def begin(self, given: TraceContext | None) -> TraceContext:
        """The context of a new span: below what was given, or the first of a trace of our own."""
        return TraceContext.begun(self.bits, self.ratio) if given is None else given.below(self.bits)


class Open:
    """A span under way: `say` what happens in it, the first MAX_EVENTS times, and `show` what is known of it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.events: list[Event] = []
        self.attributes: dict[str, Attribute] = {}

    def say(self, name: str, **attributes: Attribute) -> None:
        if len(self.events) < MAX_EVENTS:
            self.events.append(Event(name, self._clock(), attributes))

    def show(self, **attributes: Attribute) -> None:
        self.attributes |= {f"pdctl.{name}": value for name, value in attributes.items()}


async def spanned(spans: Spans | None, name: str, work: Callable[[Open | None], Awaitable[T]]) -> T:
    """`work`, with a span around it if somebody wants spans; what it asks of others is asked within that span."""
    if spans is None:
        return await work(None)
    given = CURRENT.get()
    context, began, opened, error = spans.begin(given), spans.clock(), Open(spans.clock), None
    try:
        with within(context):
            return await work(opened)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        if context.is_sampled:
            ended, events = spans.clock(), tuple(opened.events)
            spans.record(Span(name, context, given, began, ended, opened.attributes, events, error=error))
