"""
The names under which our own engine gets to know one life of a peer, each a way of its own to it.

The engine asks whoever has a name; that is us, who have asked the peer before. So its first use of a peer takes a
millisecond even if the peer has stopped since (61 s otherwise, all other peers included), and no stale descriptor is
ever met: the engine caches them by name for ever, and no name comes twice.

A way is one connection. The engine keys its connections by the text of the peer's host, so each way spells the host as
no other does (127.0.0.1 and 0177.0.0.01 lead to the same place). Of a host with few spellings (most of IPv6) some are
used again, and then ways share what the engine knows of their connections.

Never asks a peer anything.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

from pdctl.core.address import Endpoint
from pdctl.engine.handshake import Kind
from pdctl.errors import LimitReached

_LENGTH = struct.Struct("<Q")
_OCTAL_ZEROS = 31  # with them an octet has 32 spellings, and an address a million


def spelled(host: str, n: int) -> str:
    """The numeric address in its n-th spelling, counted round; 0 is the usual one."""
    address, percent, zone = host.partition("%")
    return (":" if ":" in address else ".").join(_digits(_parts(address), n)) + percent + zone


def n_spellings(host: str) -> int:
    """Until they come round."""
    return math.prod(map(len, _parts(host.partition("%")[0])))


@lru_cache(16)
def _parts(address: str) -> list[list[str]]:
    """Each part of it in all its spellings."""
    if ":" not in address:
        return [[part, *_octals(int(part))] for part in address.split(".")]
    groups = [f"{int(part, 16):x}" for part in ipaddress.ip_address(address).exploded.split(":")]
    return [[group.rjust(width, "0") for width in range(len(group), 5)] for group in groups]


def _octals(part: int) -> Iterator[str]:
    return ("0" * zeros + f"{part:o}" for zeros in range(1, _OCTAL_ZEROS + 1))


def _digits(parts: list[list[str]], n: int) -> Iterator[str]:
    for part in parts:
        n, choice = divmod(n, len(part))
        yield part[choice]


class Serial:
    """Numbers for all ways of one process's engines, and how many names of each port were given away."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._given: dict[tuple[str, int], Iterator[int]] = {}  # one a port at most

    def number(self) -> int:
        return next(self._count)

    def name(self, host: str, port: int) -> str:
        """From any thread; a name that was never given before. Raises LimitReached when all were, of a million."""
        n, limit = next(self._given.setdefault((host, port), itertools.count())), n_spellings(host)
        if n >= limit:
            raise LimitReached(f"all {limit} names of port {port} at {host} were given to the engine: start it anew")
        return str(Endpoint(spelled(host, n), port))


class Introduction:
    """Answers whatever is asked under its names with a descriptor that is known already."""

    _server: asyncio.Server
    _port: int

    def __init__(self, opening: bytes, host: str, serial: Serial) -> None:
        self._opening: dict[str, Any] = json.loads(opening)
        self._host = host
        self._serial = serial

    @classmethod
    async def listening(cls, opening: bytes, host: str, serial: Serial) -> Introduction:
        """At a port of the loopback `host`."""
        it = cls(opening, host, serial)
        loop = asyncio.get_running_loop()
        it._server = await loop.create_server(lambda: _Answering(it._answer), host, 0, start_serving=False)
        try:
            await it._server.start_serving()
        except BaseException:  # cancelled in there, create_server would leave it listening, and nobody could close it
            it._server.close()
            raise
        it._port = it._server.sockets[0].getsockname()[1]
        return it

    @property
    def names(self) -> Iterator[str]:
        """Without end; from any thread."""
        while True:
            yield self._serial.name(self._host, self._port)

    def close(self) -> None:
        self._server.close()

    def _answer(self) -> bytes:
        n = self._serial.number()
        # The engine retires the connections to a peer when its host changes, and knows the peer by the name that the
        # descriptor has, so no two descriptors have one name (else each block made a connection of its own: measured).
        body = {**self._opening, "name": f"way {n}", "tcp_data_host": spelled(self._opening["tcp_data_host"], n)}
        text = bytes([Kind.METADATA]) + json.dumps(body).encode() + b"\n"
        return _LENGTH.pack(len(text)) + text


class _Answering(asyncio.Protocol):
    """One question, whole or in pieces, and its answer."""

    def __init__(self, answer: Callable[[], bytes]) -> None:
        self._answer = answer
        self._asked = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._asked += data
        if len(self._asked) >= _LENGTH.size and len(self._asked) >= _LENGTH.size + _LENGTH.unpack_from(self._asked)[0]:
            self._transport.write(self._answer())
            self._transport.close()
