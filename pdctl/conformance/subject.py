"""
The server in question, and the ranks that are made up for it: where they listen, what they say, what has to go again.

A made-up instance is prefill of TP `SIZE`. Its ranks listen, so that a registry that looks whether they live finds that
they do; they answer nothing. Whatever is registered is remembered, and taken out again where the server has a way.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from pdctl.conformance.asking import Asker, NoAnswer, Said
from pdctl.core.address import Endpoint
from pdctl.core.native import Registration, rank_path, seat_name
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import Unreachable

SIZE = 16
"""TP ranks of the made-up instance: enough that a few strangers who are taken by mistake do not make it complete."""

SPARES = 6
PAGE_SIZE, DTYPE = 16, "bfloat16"
LEFT_BEHIND_PAGE_SIZE = 64
"""What the claim says that must be refused whole: a server that keeps a part of it shows this later."""

LEASE_S = 60.0
_TOLD = re.compile(r"\b(\d+) workers? registered", re.ASCII)
_MAX_INSTANCES_SEARCHED = 1000

Body = dict[str, Any]


@dataclass(slots=True)
class Subject:
    """One server, as far as the promises have come with it. Make one with `subject`.

    ask, elsewhere  put questions from this host's usual address, and from another one
    anew            makes a further way to ask, with connections of its own
    addresses       where the ranks listen: of `SIZE` ranks, and `SPARES`
    has_leases      pdctl's own wire is there too; `is_locked`: and wants a token
    """

    ask: Asker
    elsewhere: Asker | None
    anew: Callable[[], AbstractAsyncContextManager[Asker]]
    addresses: Sequence[Endpoint]
    rooms: int
    idle_s: float
    has_leases: bool
    is_locked: bool = False
    instance: str | None = None
    is_complete: bool = False

    def rank(self, tp: int, address: int | None = None, size: int = SIZE, **changes: Any) -> Body:
        """What TP rank `tp` PUTs, listening at the address of that number (its own); `...` leaves a field out."""
        body = self.announcement(tp, address, size).to_body() | changes
        return {name: value for name, value in body.items() if not isinstance(value, type(...))}

    def announcement(
        self, tp: int, address: int | None = None, size: int = SIZE, page_size: int = PAGE_SIZE
    ) -> Announcement:
        shape = Shape(size, 1, 1, 1, page_size, DTYPE)
        return Announcement(Seat(0, 0, tp, 0), shape, self.addresses[tp if address is None else address])

    async def put(self, tp: int, address: int | None = None, size: int = SIZE, **changes: Any) -> Said:
        return await self.ask("PUT", "/route", self.rank(tp, address, size, **changes))

    async def topology(self) -> Said:
        return await self.look_up(-1, -1, -1, -1)

    async def look_up(self, tp: object, dp: object = 0, cp: object = 0, pp: object = 0) -> Said:
        names = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
        return await self.ask("GET", "/route", params=dict(zip(names, (dp, cp, tp, pp), strict=True)))

    async def finds(self, tp: int, address: int | None = None) -> bool:
        """Whether the look-up of that rank gives the address of that number (its own)."""
        found = (await self.look_up(tp)).row()
        wanted = self.addresses[tp if address is None else address]
        return (found.get("rank_ip"), found.get("rank_port")) == (wanted.host, wanted.port)

    async def place(self) -> str | None:
        """The name that pdctl's own /v1 has for the instance in which our ranks are; None where it has none."""
        if self.instance is None and self.has_leases:
            listed = (await self.ask("GET", "/v1/instances")).row().get("instances")
            for name in _names(listed):
                if await self.seated(name):
                    self.instance = name
                    break
        return self.instance

    async def seated(self, instance: str) -> list[tuple[str, int]]:
        """Our ranks in that instance: (seat, epoch)."""
        shown = (await self.ask("GET", f"/v1/instances/{quote(instance, safe='')}")).row()
        ours = {str(address) for address in self.addresses}
        groups = [shown, shown.get("forming")]
        rows = [row for group in groups if isinstance(group, Mapping) for row in _rows(group.get("alive_seats"))]
        with contextlib.suppress(KeyError, ValueError, TypeError):  # another's /v1, which means something else
            return [(seat_name_of(row), int(row["epoch"])) for row in rows if row.get("address") in ours]
        return []

    async def hold(self, tp: int) -> Said:
        """Take that seat with a lease, on pdctl's own wire."""
        instance = await self.place()
        if instance is None:
            raise NoAnswer("no instance of that name: its /v1 does not show the ranks that it has taken")
        said = Registration.of(self.announcement(tp), LEASE_S)
        return await self.ask("PUT", rank_path(instance, Seat(0, 0, tp, 0)), said.to_body())

    async def leave(self, tp: int) -> Said | None:
        """Take that rank out; None where the server has no way to."""
        instance = await self.place()
        if instance is None:
            return None
        return await self.ask("DELETE", rank_path(instance, Seat(0, 0, tp, 0)))

    async def clear(self) -> list[str]:
        """Take out all that can be; what is left, in words."""
        try:
            instance = await self.place()
            if instance is None:
                how = (
                    "its way to take a rank out wants a token" if self.is_locked else "it has no way to take a rank out"
                )
                return [f"the made-up ranks: {how}, restart it"]
            for seat, epoch in await self.seated(instance):
                await self.ask("DELETE", f"/v1/instances/{instance}/ranks/{seat}", params={"epoch": epoch})
            left = len(await self.seated(instance))
        except NoAnswer as error:
            return [f"what was registered: {error}"]
        return [f"{left} of the made-up ranks in {instance}, which it does not let go"] if left else []


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[Sequence[Endpoint]]:
    """Addresses for ranks that listen where this host is for the server. Raises Unreachable."""
    host = await _own_address(url)
    async with contextlib.AsyncExitStack() as stack:
        addresses = []
        for _ in range(SIZE + SPARES):
            server = await stack.enter_async_context(await asyncio.start_server(_hang_up, host, 0))
            addresses.append(Endpoint(host, int(server.sockets[0].getsockname()[1])))
        yield addresses


def registered_there(said: Said) -> int | None:
    """How many ranks the server says that it has, when it is asked for the topology; None: it does not say."""
    found = _TOLD.search(said.text)
    return None if found is None else int(found[1])


def seat_name_of(row: Mapping[str, Any]) -> str:
    return seat_name(Seat(*(int(row[axis]) for axis in ("dp", "cp", "tp", "pp"))))


async def _own_address(url: str) -> str:
    """Where we are, as the server would see it. Nothing is sent."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, where in found:
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as way:
                way.connect(where)
                return str(way.getsockname()[0])
    except OSError as error:
        raise Unreachable(f"host {host} of {url} is not known ({error.strerror or error}): check the name") from error
    raise Unreachable(f"there is no way from here to {url}: check the address")


async def _hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


def _names(listed: object) -> Iterable[str]:
    rows = _rows(listed)[:_MAX_INSTANCES_SEARCHED]
    return [str(row["name"]) for row in rows if "name" in row]


def _rows(listed: object) -> list[Mapping[str, Any]]:
    return [row for row in listed if isinstance(row, Mapping)] if isinstance(listed, list) else []
