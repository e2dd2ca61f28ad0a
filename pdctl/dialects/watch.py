"""
`GET /v1/watch`: changes as server-sent events, for any number of readers, each of which is only a number.

    retry: 1873                                       how long to stay away after a break, drawn for each connection
    event: reset                                      forget what you know: all of it follows
    event: instance    data: {...}                    one instance whole, as often as there are instances
    event: synced      id: 5f0c-17  data: {...}       now you know what there was at revision 17
    event: change      id: 5f0c-18  data: {...}       one change, and the row that it left behind
    : alive                                           nothing has happened for a while
    event: bye         data: {"error": {...}}         the service ends this stream, and why

A reader comes back with `since` or `Last-Event-ID` and goes on without a gap, or gets `reset` where the gap cannot be
filled: it was away too long, or the registry is another process than it was. While it is being listed, changes may be
told that the list has already; each carries its row whole, so that at `synced` the two have come together.

Nothing is queued for a reader. All read one bounded feed, whose entries were encoded once; who falls behind it, or
takes nothing for `send_within_s`, is cut off. Decides nothing about instances and knows no field of theirs.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import islice
from random import Random
from typing import Annotated, NoReturn

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response

from pdctl.core.feed import Feed, WatchLimits
from pdctl.counts.service import WatchEnd
from pdctl.dialects.audience import Audience, bye, event
from pdctl.dialects.edge import peer_of
from pdctl.dialects.strict import fails
from pdctl.errors import BadField
from pdctl.metrics import Metrics

BATCH = 256  # entries in one write: 64 KB or so, what uvicorn buffers before it asks us to wait
ROOM_TO_BREATHE_S = 0.02  # 10,000 ranks that register in 5 s wake 100 watchers 250 times, not 10,000 times


class Broadcast:
    """One feed and its readers. `publish` and `forget` never wait; `run` stands beside the server and says goodbye.

    names   which instances there are
    detail  one of them as JSON, None when it is gone meanwhile; kept until it changes, unless `kept` is off, because
            what it says of the clock is stale at once
    row     what one of them is called in the stream
    """

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        detail: Callable[[str], bytes | None],
        metrics: Metrics,
        *,
        feed: Feed | None = None,
        limits: WatchLimits | None = None,
        random: Random | None = None,
        lineage: str | None = None,
        row: str = "instance",
        kept: bool = True,
    ) -> None:
        self._row, self._kept = row, kept
        self.names = names
        self._detail = detail
        self.audience = Audience(metrics, limits or WatchLimits(), random)
        self._feed = Feed() if feed is None else feed
        # Two processes may give one revision to two changes; a cursor says whose it is
        self._lineage = lineage or secrets.token_hex(4)
        self._details: dict[str, bytes] = {}
        self._waking: asyncio.TimerHandle | None = None
        self._hearers: list[Callable[[str], None]] = []

    @property
    def revision(self) -> int:
        return self._feed.revision

    @property
    def cursor(self) -> str:
        """Where a reader stands who has just read everything."""
        return self.cursor_at(self._feed.revision)

    def publish(self, revision: int, instance: str, data: bytes) -> None:
        """Tell all readers of one change. `data` is JSON on one line."""
        self._details.pop(instance, None)
        self._feed.append(revision, event("change", data, self.cursor_at(revision)))
        for hear in self._hearers:
            hear(instance)
        if self.audience and self._waking is None:
            self._waking = asyncio.get_running_loop().call_later(ROOM_TO_BREATHE_S, self._wake)

    def read_cursor(self, text: str) -> int:
        """The revision in `5f0c-17` or `17`; -1, which no feed covers, from another lineage. Raises BadField."""
        lineage, _, revision = (text if "-" in text else f"{self._lineage}-{text}").rpartition("-")
        if not (lineage and revision.isascii() and revision.isdigit() and len(revision) < 20):
            raise BadField("since", f"{text[:40]!r} is no cursor: send the id of the last event, or leave it out")
        return int(revision) if lineage == self._lineage else -1

    def add_to(self, api: APIRouter, summary: str) -> None:
        """The path below which readers find it."""

        @api.get(
            "/watch",
            summary=summary,
            description=f"Events: reset, {self._row}, synced, change, bye. Come back with the id of the last one.",
            response_class=Response,
            responses={200: {"content": {"text/event-stream": {}}}, **fails(400, 429)},
        )
        async def watch(
            request: Request,
            since: Annotated[str | None, Query(description="The id of the last event; everything without it.")] = None,
            last_event_id: Annotated[
                str | None, Header(description="As `since`, and before it: browsers send it.")
            ] = None,
        ) -> Response:
            cursor = last_event_id or since
            return self.response(-1 if cursor is None else self.read_cursor(cursor), peer_of(request))

    def response(self, since: int, peer: str) -> Response:
        """The stream of one reader who has seen `since`. Raises LimitReached."""
        reader = _Reader(self, since, peer)
        return self.audience.stream(reader.told, reader.is_stuck)

    def subscribe(self, hear: Callable[[str], None]) -> None:
        """Call `hear` with the name of each instance of which something is told."""
        self._hearers.append(hear)

    async def run(self) -> NoReturn:
        """As `Audience.run`."""
        await self.audience.run()

    def covers(self, revision: int) -> bool:
        return self._feed.covers(revision)

    def since(self, revision: int) -> list[tuple[int, bytes]]:
        """The next entries. Raises FellBehind where some of them are gone."""
        entries = self._feed.since(revision, BATCH)
        if entries is None:
            raise FellBehind
        return entries

    def instances(self) -> Iterator[bytes]:
        """All of them, as events of which each holds one, sixteen at a time."""
        names = iter(list(self.names()))
        while some := list(islice(names, 16)):
            yield b"".join(map(self._instance, some))

    def _instance(self, name: str) -> bytes:
        if name in self._details:
            return self._details[name]
        detail = self._detail(name)
        if detail is None:
            return b""
        row = event(self._row, detail)
        if self._kept:
            self._details[name] = row
        return row

    def _wake(self) -> None:
        self._waking = None
        self.audience.wake()

    def cursor_at(self, revision: int) -> str:
        return f"{self._lineage}-{revision}"

    def ended(self, end: WatchEnd, peer: str, seen: int) -> None:
        self.audience.ended(end, peer, seen=seen, revision=self._feed.revision)


class FellBehind(Exception):
    """What the reader should be told next is not kept any more."""


class _Reader:
    """One reader: a number."""

    def __init__(self, news: Broadcast, since: int, peer: str) -> None:
        self._news = news
        self._seen = since
        self._peer = peer

    def is_stuck(self) -> None:
        self._news.ended(WatchEnd.STUCK, self._peer, self._seen)

    async def told(self, retry_ms: int) -> AsyncIterator[bytes]:
        """What the reader is sent; ends with a goodbye."""
        yield b"retry: %d\n\n" % retry_ms
        try:
            if not self._news.covers(self._seen):
                async for piece in self._listed():
                    yield piece
            async for piece in self._changes():
                yield piece
        except FellBehind:
            self._news.ended(WatchEnd.BEHIND, self._peer, self._seen)
            yield bye("this reader is so far behind that changes are lost to it", "connect again, and read faster")

    async def _listed(self) -> AsyncIterator[bytes]:
        """All instances, and what changed while they were being told."""
        self._seen = self._news.revision
        yield event("reset", _json({"revision": self._seen}))
        for piece in self._news.instances():
            if piece:
                yield piece
        while piece := self._next():
            yield piece
        yield event("synced", _json({"revision": self._seen}), self._news.cursor_at(self._seen))

    async def _changes(self) -> AsyncIterator[bytes]:
        audience = self._news.audience
        while not audience.is_over:
            if piece := self._next():
                yield piece
            elif not await audience.news_within(audience.limits.heartbeat_s):
                yield b": alive\n\n"
        self._news.ended(WatchEnd.STOPPED, self._peer, self._seen)
        yield bye("this registry stops", "connect again, to it or to its successor")

    def _next(self) -> bytes:
        entries = self._news.since(self._seen)
        if entries:
            self._seen = entries[-1][0]
        return b"".join(entry for _, entry in entries)


def _json(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
