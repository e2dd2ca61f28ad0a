"""A session in front of a real peer, whose handshake always answers and whose data port does what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from pdctl.engine import handshake
from pdctl.engine.handshake import Kind


class Cable:
    """`session` answers with the descriptor of the peer behind it, except for the data port, which is `data_port`."""

    def __init__(self, behind: str) -> None:
        self._host, port = behind.rsplit(":", 1)
        self._port = int(port)
        self._there = 0
        self._ways: set[asyncio.StreamWriter] = set()
        self._carrying: set[asyncio.Task[Any]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._place: socket.socket | None = None
        self._clog: list[socket.socket] = []
        self._spoil: list[bytes] = []
        self.session = ""
        self.data_port = 0
        self.connections = 0

    @classmethod
    @asynccontextmanager
    async def to(cls, behind: str) -> AsyncIterator[Cable]:
        it = cls(behind)
        it._there = (await handshake.metadata(behind, deadline_s=30)).card.data_port
        await it.mend()
        async with await asyncio.start_server(it._introduce, "127.0.0.1", 0) as greeting:
            it.session = "{}:{}".format(*greeting.sockets[0].getsockname())
            try:
                yield it
            finally:
                await it.cut()
                await asyncio.sleep(0.05)  # of a connection that was taken in that moment somebody must know
                await it.cut()
                it.unclog()
                if it._place is not None:
                    it._place.close()
                if it._carrying:
                    await asyncio.wait(it._carrying, timeout=5)

    async def cut(self) -> None:
        """Nothing listens there any more, and what was connected is not."""
        if self._server:
            self._server.close()
            self._server = None
        for writer in list(self._ways):
            writer.transport.abort()
        self._flowing.set()

    @property
    def is_cut(self) -> bool:
        return self._server is None

    async def mend(self) -> None:
        if self._place is None:
            self._place = socket.socket()  # bound and never listening: while cut, nobody else gets the port
            self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._place.bind(("127.0.0.1", 0))
            self.data_port = self._place.getsockname()[1]
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.data_port)

    def hold(self) -> None:
        """It takes connections and bytes, and not one goes on."""
        self._flowing.clear()

    def release(self) -> None:
        self._flowing.set()

    def spoil(self, any_of: list[bytes]) -> None:
        """Turn one bit over in the first of these that comes by on its way to the peer; then no more."""
        self._spoil = any_of

    async def clog(self) -> None:
        """As a firewall that drops: the port takes no connection and refuses none."""
        await self.cut()
        full = socket.create_server(("127.0.0.1", self.data_port), backlog=0)
        self._clog = [full]
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(("127.0.0.1", self.data_port))
            self._clog.append(one)

    def unclog(self) -> None:
        for one in self._clog:
            one.close()
        self._clog = []

    async def _introduce(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            (length,) = struct.unpack("<Q", await reader.readexactly(8))
            await reader.readexactly(length)
            shown = await handshake.ask(self._host, self._port, Kind.METADATA, {}, deadline_s=30)
            body = json.dumps({**shown.body, "tcp_data_port": self.data_port}).encode()
            writer.write(struct.pack("<Q", len(body) + 1) + bytes([Kind.METADATA]) + body)
            await writer.drain()
        writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)
        self._ways.add(writer)
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection(self._host, self._there)
            self._ways.add(back)
            await asyncio.gather(self._pump(reader, back, self._spoiled), self._pump(there, writer))
            self._ways.discard(back)
        self._ways.discard(writer)
        writer.close()

    def _spoiled(self, data: bytes) -> bytes:
        for each in self._spoil:
            if (at := data.find(each)) >= 0:
                self._spoil = []
                return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        return data

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, through: Callable[[bytes], bytes] = bytes
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._flowing.wait()
                sink.write(through(data))
                await sink.drain()
        sink.close()
