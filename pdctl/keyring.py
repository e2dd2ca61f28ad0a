"""
The one owner of Mooncake's metadata keys: asks the holder where two want a name, journals, then acknowledges.

What may be written is decided in `core.metadata`; no wire is spoken here. Commands on one name take turns, because a
question to its holder lies between judging and writing; commands on different names share the journal's group commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NoReturn
from weakref import WeakValueDictionary

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.metadata import KeyBook, KeyWitness, Row, Segment, name_of
from pdctl.counts.wires import KeyChange
from pdctl.errors import Behind
from pdctl.metrics import Metrics
from pdctl.retry import deciding
from pdctl.several import of_each

AT_ONCE = 32

Answers = Callable[[Endpoint], Awaitable[bool]]
"""Whether the engine that said it answers there is still there. Bounded in time by itself."""

log = structlog.get_logger(__name__)


class Keyring:
    """The dialect calls it; `watch` runs beside the server."""

    def __init__(
        self,
        book: KeyBook,
        keep: Callable[[Sequence[Row]], Awaitable[None]],
        answers: Answers,
        metrics: Metrics,
        witness: KeyWitness | None = None,
    ) -> None:
        self._book = book
        self._keep = keep
        self._answers = answers
        self._counts = metrics.keys
        self._witness = witness or KeyWitness()
        self._misses: dict[str, int] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._counts.follow(lambda: len(book), lambda: book.nbytes)

    def restore(self, rows: Sequence[Row]) -> None:
        """Take back what the journal kept. Before the first request."""
        self._book.apply(rows)

    def learn(self, rows: Sequence[Row]) -> None:
        """Rows that another registry has journalled."""
        self._book.apply(rows)

    def get(self, key: str) -> bytes | None:
        return self._book.get(key)

    async def put(self, key: str, value: bytes, host: str) -> None:
        """Return when the key is written and journalled. Raises Occupied, TooLarge, LimitReached, ..."""
        async with self._turn(key):
            await deciding(partial(self._put, key, value, host))

    async def _put(self, key: str, value: bytes, host: str) -> None:
        gone = await self._holder_is_gone(key, value, host)
        rows = self._book.put(key, value, host, holder_gone=gone)
        await self._perform(rows, KeyChange.TAKEN_OVER if gone else KeyChange.WRITTEN)

    async def delete(self, key: str, host: str) -> bool:
        """Return when it is gone and that is journalled; False for a key that was not there. Raises Occupied."""
        async with self._turn(key):
            return await deciding(partial(self._delete, key, host))

    async def _delete(self, key: str, host: str) -> bool:
        gone = await self._holder_is_gone(key, None, host)
        rows = self._book.delete(key, host, holder_gone=gone)
        await self._perform(rows, KeyChange.REMOVED)
        return bool(rows)

    async def watch(self) -> NoReturn:
        """Drop the keys of engines that are gone, where the operator wants that; until cancelled."""
        if not self._witness.every_s:
            await asyncio.Event().wait()
        while True:
            await asyncio.sleep(self._witness.every_s)
            await self.look()

    async def look(self) -> None:
        """Ask every holder once."""
        asked = [segment for segment in self._book if segment.witness is not None]
        gone = await of_each(self._is_gone, asked, at_once=AT_ONCE)
        missing = [segment.name for segment, is_gone in zip(asked, gone, strict=True) if is_gone]
        if len(missing) > max(1, len(asked) // 2):
            log.warning("most engines do not answer: taking it for a fault of ours", missing=len(missing))
            return
        self._misses = {name: self._misses.get(name, 0) + 1 for name in missing}
        for segment in asked:
            if self._misses.get(segment.name, 0) >= self._witness.misses:
                await self._drop(segment)

    async def _drop(self, segment: Segment) -> None:
        async with self._turn_of(segment.name):
            await deciding(partial(self._drop_if_gone, segment))

    async def _drop_if_gone(self, segment: Segment) -> None:
        if await self._is_gone(segment):  # the name may have an heir by now
            await self._perform(self._book.drop(segment), KeyChange.EXPIRED)
            self._misses.pop(segment.name, None)

    async def _holder_is_gone(self, key: str, value: bytes | None, host: str) -> bool:
        """Whether somebody else holds it who is gone. Raises Behind where another registry has put an heir there."""
        rival = self._book.rival(key, value, host)
        gone = rival is not None and await self._is_gone(rival)
        if self._book.rival(key, value, host) != rival:
            raise Behind
        return gone

    async def _is_gone(self, segment: Segment) -> bool:
        """Who gave no address cannot be asked, and silence is not death."""
        witness = segment.witness
        return witness is not None and (self._book.replaced(segment) or not await self._answers(witness))

    async def _perform(self, rows: Sequence[Row], change: KeyChange) -> None:
        if not rows:
            return
        await self._keep(rows)
        self._book.apply(rows)
        self._counts.changed(change)
        for row in rows:
            log.info(
                "metadata key changed", change=change.value, key=row.key, host=row.host, there=row.value is not None
            )

    def _turn(self, key: str) -> asyncio.Lock:
        return self._turn_of(name_of(key))

    def _turn_of(self, name: str) -> asyncio.Lock:
        """One for each name, for as long as somebody holds it or waits for it."""
        return self._turns.setdefault(name, asyncio.Lock())
