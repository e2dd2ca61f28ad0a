"""
Who reads a stream of server-sent events: how many there may be, woken together, each write with a deadline, and all of
them told when the service stops. Knows nothing of what they are told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random, SystemRandom
from typing import NoReturn

import structlog
from fastapi.responses import StreamingResponse
from starlette.types import Message, Send

from pdctl.core.feed import WatchLimits
from pdctl.counts.service import WatchEnd
from pdctl.errors import LimitReached
from pdctl.metrics import Metrics

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

log = structlog.get_logger(__name__)


class Audience:
    """The readers of one feed. Stand its `run` beside the server."""

    def __init__(self, metrics: Metrics, limits: WatchLimits, random: Random | None = None) -> None:
        self.limits = limits
        self.is_over = False
        self._counts = metrics.watch
        self._random = random or SystemRandom()
        self._news = asyncio.Event()
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def stream(self, told: Callable[[int], AsyncIterator[bytes]], is_stuck: Callable[[], None]) -> Stream:
        """One reader more: `told` gets the milliseconds that it should stay away after a break. Raises LimitReached."""
        if self._n >= self.limits.max_watchers:
            self._counts.ended(WatchEnd.LIMIT)
            raise LimitReached(
                f"{self._n} watchers are connected, the limit (max_watchers): "
                "close one, share one among several readers, or raise the limit"
            )
        pieces = told(self._random.randint(1000, 3000))
        return Stream(pieces, self.counted, is_stuck, self.limits.send_within_s)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """One more, as long as this lasts."""
        self._n += 1
        self._counts.came()
        try:
            yield
        finally:
            self._n -= 1
            self._counts.went()

    async def run(self) -> NoReturn:
        """Until cancelled; then all streams say goodbye, so that no open one holds the server up."""
        try:
            await asyncio.Event().wait()
            raise AssertionError
        finally:
            self.is_over = True
            self.wake()

    def wake(self) -> None:
        """Those who wait hold the old event; those who come next wait for the new one."""
        self._news.set()
        self._news = asyncio.Event()

    async def news_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    def ended(self, end: WatchEnd, peer: str, **where: object) -> None:
        """Count it, and say so."""
        self._counts.ended(end)
        say = log.info if end is WatchEnd.STOPPED else log.warning
        say("watcher cut off", reason=end.value, peer=peer, **where)


class Stream(StreamingResponse):
    """What one reader is sent, with a deadline for every write. The base class ends it when the client leaves.

    counted   stands around it, as long as it lasts
    is_stuck  is told when the reader takes nothing any more
    """

    def __init__(
        self,
        told: AsyncIterator[bytes],
        counted: Callable[[], contextlib.AbstractContextManager[None]],
        is_stuck: Callable[[], None],
        send_within_s: float,
    ) -> None:
        super().__init__(told, headers=_HEADERS, media_type="text/event-stream")
        self._counted = counted
        self._is_stuck = is_stuck
        self._send_within_s = send_within_s

    async def stream_response(self, send: Send) -> None:
        async def within(message: Message) -> None:
            async with asyncio.timeout(self._send_within_s):
                await send(message)

        with self._counted():
            try:
                await super().stream_response(within)
            except TimeoutError:  # its buffers are full, so that no goodbye would reach it
                self._is_stuck()


def event(kind: str, data: bytes, cursor: str | None = None) -> bytes:
    first = b"" if cursor is None else b"id: %b\n" % cursor.encode()
    return b"%bevent: %b\ndata: %b\n\n" % (first, kind.encode(), data)


def bye(what: str, fix: str) -> bytes:
    return event("bye", _json({"error": {"message": f"{what}: {fix}", "fix": fix}}))


def _json(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
