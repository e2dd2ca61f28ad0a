"""
Tells of each room once, when it is over: one line in the log, and a span where somebody wants spans.

Every failure has its line. Of rooms that succeed only so many a second have one, and the next line says how many had
none: at a thousand rooms a second lines would cost more than the rooms.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import structlog

from pdctl.core.course import Course, Ended
from pdctl.core.trace import TraceContext
from pdctl.core.transfer import Phase
from pdctl.spans import Spans

log = structlog.get_logger(__name__)
_plain = logging.getLogger(__name__)

A_SECOND = 10.0


class Telling:
    """Of the rooms of one rank. `a_second`: lines for rooms that succeed, 0 for none.

    ended_in, nbytes  rooms that are over, by phase, and what they have moved
    hear              called with each that has failed
    """

    def __init__(self, spans: Spans | None = None, a_second: float = A_SECOND) -> None:
        self._spans = spans
        self._a_second = a_second
        self._allowed, self._allowed_at = max(1.0, a_second), float("-inf")
        self._unsaid = 0
        self.ended_in = {Phase.SUCCESS: 0, Phase.FAILED: 0}
        self.nbytes = 0
        self.hear: Callable[[Ended], None] | None = None

    def begin(self, phase: Phase, now: float, given: TraceContext | None, *, is_first: bool) -> Course:
        """Of a new room. `is_first`: whether the other side is told by us what trace it is, so that it must be known;
        else it may still be told to us."""
        course = Course(phase, now, given)
        if self._spans is not None and (is_first or given is not None):
            course.trace = self._spans.begin(given)
        return course

    def learned(self, course: Course, said: TraceContext) -> None:
        """A peer has said for which trace it works: ours too, unless our own caller has named one."""
        if course.given is None:
            course.given = said
            course.trace = said if self._spans is None else self._spans.begin(said)
        elif said != course.given and said not in course.links:
            course.links = (*course.links, said)

    def ended(self, phase: Phase, course: Course, describe: Callable[[], Ended]) -> None:
        """A room is over. Most have nothing said of them, and then nobody describes them."""
        self.ended_in[phase] += 1
        self.nbytes += course.nbytes
        says = phase is Phase.FAILED or (_plain.isEnabledFor(logging.INFO) and self._may_say(course.ended))
        if not says and self._spans is None:
            return
        ended = describe()
        if self._spans is not None:
            context = ended.course.trace = ended.course.trace or self._spans.begin(None)
            if context.is_sampled:
                self._spans.record(ended.span(context))
        if ended.failed:
            log.warning("room failed", **ended.line())
            if self.hear is not None:
                self.hear(ended)
        elif says:
            more = {"unsaid": self._unsaid} if self._unsaid else {}
            self._unsaid = 0
            log.info("room succeeded", **ended.line(), **more)

    def _may_say(self, now: float) -> bool:
        since, self._allowed_at = now - self._allowed_at, now
        self._allowed = min(max(1.0, self._a_second), self._allowed + since * self._a_second)
        if self._allowed < 1.0 or not self._a_second:
            self._unsaid += 1
            return False
        self._allowed -= 1.0
        return True
