"""
`GET /v1/overview/watch`: how things are, as server-sent events, for readers of whom each is only a number.

    retry: 1873                                how long to stay away after a break, drawn for each connection
    event: overview    data: {...}             all of it; forget what you knew
    event: instance    data: {...}             one thing as it is now, or {"name": ..., "gone": true}
    : alive                                    nothing has happened for a while
    event: bye         data: {"error": {...}}  the service ends this stream, and why

Four times a second at most, less often where there is much to say, and then the last state of all that has changed: a
reader that is slow, or far away, hears less often and never of what is over. Nothing is queued for it; who takes
nothing for `send_within_s` is cut off. Knows no thing's fields: what a name stands for is asked when somebody is told
of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from functools import partial
from random import Random
from typing import Any, NoReturn

from pdctl.core.feed import WatchLimits
from pdctl.core.latest import Latest
from pdctl.counts.service import WatchEnd
from pdctl.dialects.audience import Audience, Stream, bye, event
from pdctl.metrics import Metrics

EVERY_S = 0.25
AT_ONCE = 64
SHARE = 0.05
"""Of the loop, for one reader at most: an instance of 3,000 ranks takes 30 ms to put into words, and its ranks come one
after another for seconds."""

Key = tuple[str, Hashable]
"""The kind of a thing, which its event is called by, and its name."""
Tell = Callable[[Any], bytes | None]
"""What there is to say of a name, as JSON on one line; None: nothing."""


class Board:
    """Stand its `run` beside the server.

    latest  what has changed
    kinds   how things of each kind are told of
    kept    kinds that are told of in the same words until they change: those that take long to put into words
    whole   all of it, as one JSON object in pieces
    """

    def __init__(
        self,
        latest: Latest[Key],
        kinds: Mapping[str, Tell],
        kept: frozenset[str],
        whole: Callable[[], AsyncIterator[bytes]],
        metrics: Metrics,
        limits: WatchLimits,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.latest = latest
        self._clock = clock
        self.whole = whole
        self.audience = Audience(metrics, limits, random)
        self._kinds = kinds
        self._kept_kinds = kept
        self._kept: dict[Key, bytes] = {}

    def changed(self, kind: str, name: Hashable) -> None:
        """It is otherwise now, or gone."""
        self.latest.touch((kind, name))
        self._kept.pop((kind, name), None)
        if self.audience:
            self.audience.wake()
        else:
            self._kept.clear()

    def response(self, peer: str) -> Stream:
        """The stream of one more reader. Raises LimitReached."""
        stuck = partial(self.audience.ended, WatchEnd.STUCK, peer, of="overview")
        return self.audience.stream(partial(self._told, peer), stuck)

    async def run(self) -> NoReturn:
        """As `Audience.run`."""
        await self.audience.run()

    async def _told(self, peer: str, retry_ms: int) -> AsyncIterator[bytes]:
        yield b"retry: %d\n\n" % retry_ms
        while not self.audience.is_over:
            seen = self.latest.number
            yield b"event: overview\ndata: "
            async for piece in self.whole():
                yield piece
            yield b"\n\n"
            async for piece in self._changes(seen):
                yield piece
        self.audience.ended(WatchEnd.STOPPED, peer, of="overview")
        yield bye("this registry stops", "connect again, to it or to its successor")

    async def _changes(self, seen: int) -> AsyncIterator[bytes]:
        """What has changed after `seen`, until we stop, or the reader is so far behind that it must hear everything."""
        audience = self.audience
        while not audience.is_over and (keys := self.latest.since(seen)) is not None:
            if not keys:
                if not await audience.news_within(audience.limits.heartbeat_s):
                    yield b": alive\n\n"
                continue
            seen, took_s = self.latest.number, 0.0
            for start in range(0, len(keys), AT_ONCE):
                began = self._clock()
                some = b"".join(map(self._entry, keys[start : start + AT_ONCE]))
                took_s += self._clock() - began
                yield some
            await asyncio.sleep(max(EVERY_S, took_s / SHARE))

    def _entry(self, key: Key) -> bytes:
        if key in self._kept:
            return self._kept[key]
        kind, name = key
        told = self._kinds[kind](name)
        entry = b"" if told is None else event(kind, told)
        if kind in self._kept_kinds:
            self._kept[key] = entry
        return entry
