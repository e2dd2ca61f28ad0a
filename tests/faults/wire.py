"""A TCP port in front of another one that a test can cut, silence and mend: the way to a peer's control link."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pdctl.core.address import Endpoint


class Wire:
    """`here` stands for `there`."""

    def __init__(self, there: Endpoint) -> None:
        self._there = there
        self._is_cut = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.swallowing: set[asyncio.StreamReader] = set()
        """Connections that have taken bytes since it fell silent."""
        self._ways: set[asyncio.StreamWriter] = set()
        self._carrying: set[asyncio.Task[Any]] = set()
        self.here: Endpoint

    @classmethod
    @asynccontextmanager
    async def to(cls, there: Endpoint) -> AsyncIterator[Wire]:
        it = cls(there)
        async with await asyncio.start_server(it._taken, "127.0.0.1", 0) as server:
            it.here = Endpoint(*server.sockets[0].getsockname())
            try:
                yield it
            finally:
                server.close()
                if taken := [task for task in asyncio.all_tasks() if _is_accepting(task)]:
                    await asyncio.wait(taken)  # of a connection that was taken in that moment somebody must know
                it.cut()
                if it._carrying:
                    await asyncio.wait(it._carrying, timeout=5)

    def cut(self) -> None:
        """Every connection breaks, and each new one at once. The port listens on: nobody there has ended."""
        self._is_cut = True
        for writer in list(self._ways):
            writer.transport.abort()
        self._flowing.set()

    def silence(self) -> None:
        """It takes connections and bytes, and not one goes on."""
        self.swallowing.clear()
        self._flowing.clear()

    def mend(self) -> None:
        self._is_cut = False
        self._flowing.set()

    def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """At once, and no task that a loop which ends may cancel before its first step."""
        if self._is_cut:
            writer.transport.abort()
            return
        self._ways.add(writer)
        task = asyncio.create_task(self._carry(reader, writer))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ways = {writer}
        try:
            with contextlib.suppress(OSError):
                there, back = await asyncio.open_connection(self._there.host, self._there.port)
                ways.add(back)
                self._ways.add(back)
                if not self._is_cut:  # since it was asked for
                    await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        finally:
            self._ways -= ways
            for way in ways:
                way.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                if not self._flowing.is_set():
                    self.swallowing.add(source)
                await self._flowing.wait()
                if self._is_cut:
                    break
                sink.write(data)
                await sink.drain()
        sink.close()


def _is_accepting(task: asyncio.Task[Any]) -> bool:
    """asyncio's own: between a connection that was accepted and the protocol that is told of it."""
    return getattr(task.get_coro(), "__qualname__", "").endswith("_accept_connection2")
