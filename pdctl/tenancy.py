"""
A pool that an engine has handed over, from then to the end: its rank, its rooms, and the tickets that say whose pages
are in use.

Whoever takes a room out of the tables closes it. A ticket is free when nothing touches its pages any more, which is
said once. Never speaks to a peer or to the engine: what is to be said next waits in `events`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from pdctl.core.handover import Mapped, Offer
from pdctl.core.layout import RankPools
from pdctl.core.plan import Ints
from pdctl.core.trace import TraceContext
from pdctl.core.transfer import Quarantined
from pdctl.errors import CallerError, RoomFailed

_LAST_WORD_S = 0.2  # for the engine to take it: it may be stopped, and then its socket is full
_MOST_REVOKED = 4096

Release = Callable[[Ints], None]


class NotOpen(CallerError):
    """What the request speaks of is not here, or not any more."""


class Sending(Protocol):
    """A room at a prefill rank."""

    @property
    def prefix_len(self) -> int: ...

    @property
    def n_pages(self) -> int: ...

    async def peers_ready(self) -> None: ...

    async def send(self, pages: npt.ArrayLike, layers: range | None = None) -> None: ...

    async def finish(
        self,
        aux_row: int | None = None,
        state_rows: Sequence[npt.ArrayLike] = (),
        pages: npt.ArrayLike | None = None,
    ) -> None: ...


class Arriving(Protocol):
    """A room at a decode rank."""

    async def arrived(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """What an engine asks of `receive`."""

    pages: list[int]
    aux_row: int
    prefix_len: int
    state_rows: tuple[tuple[int, ...], ...]
    trace: TraceContext | None = None


class Rank(Protocol):
    """A rank that is open; of `sending` and `receiving` it can do one."""

    @property
    def session(self) -> str: ...

    @property
    def metrics_url(self) -> str: ...

    @property
    def registered(self) -> bool: ...

    @property
    def rooms(self) -> Sequence[int]: ...

    @property
    def quarantine(self) -> Sequence[Quarantined]: ...

    def sending(
        self, room: int, release: Release, trace: TraceContext | None
    ) -> AbstractAsyncContextManager[Sending]: ...

    async def announce(self, room: int) -> None:
        """Say at the registry that this rank's DP group has the room."""

    async def receiving(self, room: int, asked: Arrival, release: Release) -> AbstractAsyncContextManager[Arriving]:
        """Find who sends the room. Raises before anybody was told of the pages."""


@dataclass(slots=True)
class _Room:
    """A room at the sending side between two requests; whoever takes it out of the table closes it."""

    sending: Sending
    stack: AsyncExitStack
    ticket: int


class _Arrival(NamedTuple):
    """A room at the receiving side."""

    task: asyncio.Task[bool]
    ticket: int


@dataclass(slots=True)
class Tenancy:
    """From the handover to the end. `left`: nobody wants it any more; `events`: what the open answer says next."""

    offer: Offer
    pools: RankPools
    mapped: list[Mapped]
    engine_pid: int
    opened: asyncio.Future[Rank]
    left: asyncio.Event = field(default_factory=asyncio.Event)
    events: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    rank: Rank | None = None
    sending: dict[int, _Room] = field(default_factory=dict)
    receiving: dict[int, _Arrival] = field(default_factory=dict)
    tickets: set[int] = field(default_factory=set)
    revoked: dict[int, None] = field(default_factory=dict)
    _answering: dict[int, list[int]] = field(default_factory=dict)

    def release(self, room: int, ticket: int) -> Release:
        return lambda _: self.free(room, ticket)

    def free(self, room: int, ticket: int) -> None:
        """Nothing touches the pages any more: say so, once."""
        if ticket in self.tickets:
            self.tickets.discard(ticket)
            if (freed := self._answering.get(ticket)) is not None:
                freed.append(room)
            else:
                self._say_free(room, ticket)

    def _say_free(self, room: int, ticket: int) -> None:
        self.events.put_nowait({"event": "released", "room": room, "ticket": ticket})

    @contextmanager
    def answering(self, ticket: int) -> Iterator[Callable[[], bool]]:
        """Within, its room ends. Gives what the answer has to say: whether its pages are free. What becomes free and is
        not asked for, since there will be no such answer, the open answer says."""
        freed = self._answering[ticket] = list[int]()

        def is_free() -> bool:
            was = bool(freed)
            freed.clear()
            return was

        try:
            yield is_free
        finally:
            self._answering.pop(ticket, None)
            for room in freed:
                self._say_free(room, ticket)

    def take(self, ticket: int) -> None:
        """Raises CallerError for one that is in use, or that was given up before it came."""
        if ticket in self.revoked:
            raise CallerError(f"ticket {ticket} was given up before: this request came after its own end")
        if ticket in self.tickets:
            raise CallerError(f"ticket {ticket} is in use: give each room a ticket of its own")
        self.tickets.add(ticket)

    def revoke(self, ticket: int) -> bool:
        """Give a ticket up; whether its pages are free already. One that has not come yet is refused if it does."""
        if ticket in self.tickets:
            return False
        self.revoked[ticket] = None
        while len(self.revoked) > _MOST_REVOKED:
            self.revoked.pop(next(iter(self.revoked)))
        return True

    @asynccontextmanager
    async def entered(self, rank: Rank, room: int, ticket: int, trace: TraceContext | None) -> AsyncIterator[Sending]:
        """A new room; closed, and so failed, if the block is left by an error."""
        self.take(ticket)
        stack, release = AsyncExitStack(), self.release(room, ticket)
        try:
            sending = await stack.enter_async_context(rank.sending(room, release, trace))
        except BaseException:
            self.tickets.discard(ticket)  # nothing was begun
            raise
        self.sending[room] = _Room(sending, stack, ticket)
        try:
            yield sending
        except BaseException:
            await self.close(room)
            raise

    @asynccontextmanager
    async def at(self, room: int) -> AsyncIterator[Sending]:
        """Our own mistakes leave the room as it is; what ends it, or cuts the request short, closes it."""
        if room not in self.sending:
            raise NotOpen(f"room {room} is not open: open it first; it may have failed, and that was answered then")
        try:
            yield self.sending[room].sending
        except CallerError:
            raise
        except BaseException:
            await self.close(room)
            raise

    async def close(self, room: int) -> None:
        if (held := self.sending.pop(room, None)) is not None:
            await held.stack.aclose()

    async def give_up_sending(self, room: int, ticket: int | None) -> bool:
        """`ticket`: which opening of the room is meant; None: whichever there is. Whether its pages are free."""
        free = ticket is not None and self.revoke(ticket)
        held = self.sending.get(room)
        if held is not None and ticket in (None, held.ticket):
            await self.close(room)
        return free

    async def finish(
        self, room: int, aux_row: int | None, states: Sequence[Sequence[int]], pages: list[int] | None
    ) -> bool:
        """The last of a room that is open, which is closed then. Whether its pages are free."""
        held = self.sending[room]
        with self.answering(held.ticket) as is_free:
            await held.sending.finish(aux_row, states, pages)
            await self.close(room)
            return is_free()

    async def arrive(self, rank: Rank, room: int, ticket: int, asked: Arrival) -> bool:
        """Until all of it is there; whether its pages are free. Raises RoomFailed where it is given up meanwhile."""
        if room in self.receiving:
            raise CallerError(f"room {room} is open already: give each request a room of its own")
        task = asyncio.create_task(self._arrival(rank, room, ticket, asked), name=f"arrival of room {room}")
        self.receiving[room] = _Arrival(task, ticket)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            await asyncio.wait({task})
            del self.receiving[room]
        if task.cancelled():
            raise RoomFailed(room, "this engine has given it up")
        return task.result()

    async def _arrival(self, rank: Rank, room: int, ticket: int, asked: Arrival) -> bool:
        """The ticket is taken here, and not before: a task that is cancelled at once never runs."""
        self.take(ticket)
        with self.answering(ticket) as is_free:
            try:
                entering = await rank.receiving(room, asked, self.release(room, ticket))
            except BaseException:
                self.free(room, ticket)
                raise
            async with entering as arriving:
                await arriving.arrived()
            return is_free()

    async def give_up_arrival(self, room: int, ticket: int | None) -> bool:
        """As `give_up_sending`."""
        free = ticket is not None and self.revoke(ticket)
        held = self.receiving.get(room)
        if held is not None and ticket in (None, held.ticket):
            held.task.cancel()
            await asyncio.wait({held.task})
        return free

    async def end_rooms(self) -> None:
        """Give up what is under way; decode ranks, or prefill ranks, hear of it."""
        arrivals = [arrival.task for arrival in self.receiving.values()]
        for task in arrivals:
            task.cancel()
        rooms = [self.sending.pop(room) for room in list(self.sending)]
        closing = [asyncio.ensure_future(room.stack.aclose()) for room in rooms]
        if waiting := [*closing, *arrivals]:
            await asyncio.wait(waiting)

    async def say_last(self, word: dict[str, Any]) -> None:
        self.events.put_nowait(word)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.events.join(), _LAST_WORD_S)


@contextmanager
def watching(pid: int, gone: Callable[[], None]) -> Iterator[None]:
    """Call `gone` when that process ends: a child that it has forked may keep its connection open."""
    try:
        fd = os.pidfd_open(pid) if pid else None
    except OSError:  # it is gone, and so will be its connection; or it lives where its number means nothing
        fd = None
    if fd is None:
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, gone)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)
