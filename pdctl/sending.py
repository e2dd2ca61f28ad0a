"""
One room at the prefill side: its phases, its pages on their way, and how it ends.

Its state lives and dies with it; what its rank shares with others, its sender gives it. Never asks what another room
does, and retries nothing: the first cause ends it, here and at every decode rank.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import structlog

from pdctl.core.address import Endpoint
from pdctl.core.course import Ended
from pdctl.core.destination import Destination, Last, LayerGroups
from pdctl.core.plan import CopyPlan, Ints
from pdctl.core.sums import Summand, Sums
from pdctl.core.trace import TraceContext
from pdctl.core.transfer import OVERDUE, SENDER, Event, Phase, Quarantined, RoomTimeouts, Side, step
from pdctl.core.wire import Abort, Matched, Metadata
from pdctl.engine.base import Engine
from pdctl.engine.checksums import Checksums
from pdctl.errands import Errands
from pdctl.errors import (
    Cause,
    ChecksumsMissing,
    LayoutMismatch,
    LimitReached,
    PdctlError,
    RoomFailed,
    SessionBlocked,
    TransferFailed,
    Unpairable,
)
from pdctl.lag import Alarm
from pdctl.lastwords import LastWords
from pdctl.pace import Pace
from pdctl.partners import Partners
from pdctl.telling import Telling
from pdctl.writing import Writer

log = structlog.get_logger(__name__)

Release = Callable[[Ints], None]


class Rank(Protocol):
    """What the rooms of one prefill rank share. `layers`: of its pipeline stage."""

    engine: Engine
    partners: Partners
    writer: Writer
    pace: Pace
    checksums: Checksums
    words: LastWords
    telling: Telling
    settling: Errands
    timeouts: RoomTimeouts
    clock: Callable[[], float]
    layers: frozenset[int]

    def enter(self, room: SendingRoom) -> tuple[list[Metadata], str | None]:
        """Take the room in; what was said about it before, and why it is over already if it is."""

    def leave(self, room: SendingRoom) -> None: ...

    def unsettled(self, room: SendingRoom, n_pages: int) -> None:
        """The engine may still read so many of its pages."""

    def settled(self, room: SendingRoom, n_pages: int) -> None: ...


class SendingRoom:
    """One room at the prefill side. Every failure comes out of its methods as RoomFailed with the first cause."""

    def __init__(
        self, sender: Rank, room: int, required: int | None, release: Release | None, trace: TraceContext | None
    ) -> None:
        self.room = room
        self.phase = Phase.BOOTSTRAPPING
        self.reason: str | None = None
        self.is_permanent = False
        self.cause: Cause | None = None
        self.opened_at = sender.clock()
        self.course = sender.telling.begin(self.phase, self.opened_at, trace, is_first=False)
        self._of = sender
        self._required = required
        self._release = release
        self._named: dict[str, Metadata] = {}
        self._destinations: dict[str, Destination] = {}
        self._acks: dict[Endpoint, int] = {}
        self._writes: set[asyncio.Task[None]] = set()
        self._busy = 0
        self._unsettled: set[str] = set()
        self._sums: dict[str, list[Sums]] = {}
        self._comparing: set[str] = set()
        self._compared = asyncio.Event()
        self._sources: list[Ints] = []
        self._n_sent = 0
        self._open_chunk: LayerGroups | None = None
        self._left_at = 0.0
        self._no_longer_bootstrapping = asyncio.Event()
        self._timer: Alarm | None = None

    async def __aenter__(self) -> Self:
        early, over = self._of.enter(self)
        self._watch()
        for named in early:
            self.named(named)
        if over is not None:
            self._fail(Event.PEER_FAILED, over)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        why = "before its last chunk" if error is None else f"on {type(error).__name__}: {error}"
        self._fail(Event.ABORTED, f"the prefill engine left the room {why}")
        try:
            await self._rest()
        finally:
            self._leave()

    @property
    def sessions(self) -> tuple[str, ...]:
        """Decode ranks that have named pages in it."""
        return tuple(self._destinations)

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(f"{named.reply} ({session})" for session, named in self._named.items())

    @property
    def prefix_len(self) -> int:
        """Tokens that decode has already; known when the peers are ready."""
        return max((named.prefix_len for named in self._named.values()), default=0)

    @property
    def n_pages(self) -> int:
        """Pages that decode expects; known when the peers are ready."""
        return max((len(named.pages) for named in self._named.values()), default=0)

    async def peers_ready(self) -> None:
        """Return when every decode rank of the room has named its pages."""
        await self._no_longer_bootstrapping.wait()
        self._check()

    async def send(self, pages: npt.ArrayLike, layers: range | None = None) -> None:
        """Copy `pages`, shape (n,), to the next n of the pages that decode named; returns when they have landed.

        `layers`: only those of the model's layers, as they are computed. Give the same pages for each group of layers
        until every layer of this stage has been sent once; then comes the next chunk.
        """
        source = np.asarray(pages, dtype=np.int64).ravel()
        self._check()
        start = self._next_chunk(source, layers)
        with self._sending():
            await self._write(
                lambda to: to.chunk(source, start, layers), lambda to: to.chunk_summands(source, start, layers)
            )
            self._step(Event.CHUNK_LANDED)

    def _next_chunk(self, source: Ints, layers: range | None) -> int:
        """The number of the chunk's first page among those that were named. Raises CallerError, and changes nothing."""
        start, chunk = self._n_sent, self._open_chunk or LayerGroups.of(self._of.layers, source)
        self._open_chunk = chunk.sent(source, layers)
        if chunk.is_new:
            self._sources.append(source)
        if self._open_chunk is None:
            self._n_sent += len(source)
        return start

    async def finish(
        self,
        aux_row: int | None = None,
        state_rows: Sequence[npt.ArrayLike] = (),
        pages: npt.ArrayLike | None = None,
    ) -> None:
        """Copy the aux row and the rows of each group of state, when all chunks have landed; then the decode ranks hear
        of success. Those that sum have to say first that what arrived is what was sent.

        `pages`: the last chunk, or the only one, as for `send`: it goes in one transfer with the rows, which costs half
        of the two.
        """
        while self._writes:
            await asyncio.wait(self._writes)
        self._check()
        source, start = None, self._n_sent
        if pages is not None:
            source = np.asarray(pages, dtype=np.int64).ravel()
            start = self._next_chunk(source, None)
        if self._open_chunk is not None:
            raise self._open_chunk.unfinished()
        last = Last(source, start, self._n_sent, aux_row, state_rows)
        with self._sending():
            await self._write(last.plan, last.summands)
            self._comparing = set(self._sums)
            for destination in self._destinations.values():
                sums = self._sums.get(destination.session)
                self._of.words.report(destination.named, Phase.SUCCESS, sums=sums)
            for named in self._named.values():
                if named.is_dummy:
                    self._of.words.over(self.room, named.reply, named.use)
            if self._comparing:
                await self._comparison()
            self._step(Event.LAST_CHUNK_LANDED)

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """Within, each wait is bounded by what is waited for: writes by their deadlines, a comparison by its own."""
        self._busy += 1
        try:
            self._step(Event.CHUNK_QUEUED)
            self._watch()
            yield
        finally:
            self._busy -= 1
            self._watch()

    async def _comparison(self) -> None:
        """Return when every decode rank that sums has found what was sent. Raises RoomFailed."""
        limit_s = self._of.timeouts.transfer_s
        try:
            async with asyncio.timeout(limit_s):
                while not self._compared.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._of.timeouts.remind_s):
                            await self._compared.wait()
                    for session in self._comparing:
                        self._of.words.again(self._named[session])
        except TimeoutError:
            silent = ", ".join(sorted(self._comparing))
            self._fail(
                Event.TIMED_OUT,
                f"no word from decode session {silent} within {limit_s:g} s whether what arrived is what was sent: see "
                "its log for this room, and whether it can reach this control port, or raise transfer_s",
            )
        self._check()

    # --- what peers say

    def named(self, named: Metadata) -> bool:
        """A decode rank has named its pages; whether it had done so before, or its memory is not known and must come
        first. What comes when the room is complete is late or a repetition."""
        known = self._named.get(named.session)
        if known is not None and known.use is not None and known.use == named.use:
            return True
        if self.phase is not Phase.BOOTSTRAPPING:
            log.debug("late metadata", room=self.room, session=named.session)
            return True
        if named.use is not None and not named.is_dummy and not self._of.partners.knows(named.session):
            self._of.words.ask_memory(named)
            return True
        self._named[named.session] = named
        if named.trace is not None:
            self._of.telling.learned(self.course, named.trace)
        if not named.is_dummy:
            try:
                destination = self._of.partners.pair(named)
                if named.session not in self._destinations:
                    self._of.partners.take_in(named.session)
                self._destinations[named.session] = destination
                if destination.wants_sums and self._of.timeouts.checksum.is_on:
                    self._sums[named.session] = []
            except PdctlError as error:
                is_permanent = isinstance(error, Unpairable | ChecksumsMissing)
                self._fail(Event.TRANSFER_FAILED, str(error), is_permanent=is_permanent)
                return False
        required = self._required or max(each.required for each in self._named.values())
        complete = len(self._named) >= required
        self._step(Event.ALL_NAMED_PAGES if complete else Event.PEER_NAMED_PAGES)
        if complete:
            self._no_longer_bootstrapping.set()
        return False

    def matched(self, match: Matched) -> None:
        """What it has of the room is what our sums say; before they were given that is a mistake."""
        if match.session in self._comparing and match.use in (None, self._named[match.session].use):
            self._comparing.remove(match.session)
            if not self._comparing:
                self._compared.set()

    def aborted(self, abort: Abort) -> None:
        """A decode rank has given the room up; acknowledged when nothing of the room is in flight."""
        if self._never_heard_of(abort.reply):
            if abort.reply is not None and abort.generation is not None:
                self._of.words.acknowledge(self.room, abort.reply, abort.generation)  # nothing was ever sent there
            return
        who = f"decode rank {abort.reply}" if abort.reply else "a decode rank"
        why = f"{who} has given the room up: {abort.reason or 'see its log'}"
        self._fail(Event.PEER_FAILED, why, but_tell_not=abort.reply)
        if abort.reply is not None and abort.generation is not None:
            self._acks[abort.reply] = abort.generation
            self._acknowledge_at_rest()

    def _never_heard_of(self, reply: Endpoint | None) -> bool:
        """A room that is complete is not given up by a decode rank whose pages came too late for it: two that were
        given one number by mistake would end each other's room. Before that it may be one that is still awaited."""
        named = {each.reply for each in self._named.values()}
        return reply is not None and self.phase is not Phase.BOOTSTRAPPING and reply not in named

    def peer_replaced(self, session: str) -> None:
        """Another process, or other memory, has announced itself under this session."""
        if session in self._destinations:
            self._fail(Event.TRANSFER_FAILED, f"decode session {session} has registered other memory in mid-room")

    def quarantined(self) -> Quarantined:
        waiting_for = tuple(sorted(self._unsettled)) or tuple(sorted(self._destinations))
        return Quarantined(self.room, self._pages(), self._left_at, self.reason or "", waiting_for)

    # --- planning and writing

    async def _write(
        self, plan: Callable[[Destination], CopyPlan], summands: Callable[[Destination], list[Summand]]
    ) -> None:
        """Perform one plan for each destination, at once, and sum meanwhile what is to be summed; return when all have
        landed, or raise RoomFailed."""
        try:
            await self._of.pace.step()
            self._check()  # it may have been given up, and acknowledged, while others had their step
            await self._begun(plan, summands).over()
        except asyncio.CancelledError:
            self._fail(Event.ABORTED, "the prefill engine cancelled the send")
            await self._rest()
            raise
        self._check()

    def _begun(
        self, plan: Callable[[Destination], CopyPlan], summands: Callable[[Destination], list[Summand]]
    ) -> _Landing:
        landing = _Landing()
        try:
            plans = [(each, plan(each)) for each in self._destinations.values()]
        except LayoutMismatch as error:
            self._fail(Event.TRANSFER_FAILED, str(error))
            return landing
        alone = len(plans) == 1  # else the first of them would have the step of all
        for to, what in plans:
            if len(what):
                self._start(self._write_one(to, what, in_step=alone), landing)
            if to.session in self._sums:
                for summand in summands(to):
                    self._start(self._sum(to.session, summand), landing)
        return landing

    def _start(self, write: Coroutine[Any, Any, None], landing: _Landing) -> None:
        task = asyncio.create_task(write, name=f"write of room {self.room}")
        self._writes.add(task)
        landing.begun()
        task.add_done_callback(lambda task: self._write_ended(task, landing))

    async def _write_one(self, to: Destination, plan: CopyPlan, *, in_step: bool) -> None:
        try:
            await self._of.writer.write(self, to.session, plan, in_step=in_step)
        except (SessionBlocked, TransferFailed, LimitReached) as error:
            self.cause = self.cause or getattr(error, "cause", None)
            self._fail(Event.TRANSFER_FAILED, str(error))

    def landed(self, nbytes: int) -> None:
        self.course.nbytes += nbytes

    def left_unsettled(self, session: str) -> None:
        self._unsettled.add(session)

    async def _sum(self, session: str, what: Summand) -> None:
        crcs = await self._of.checksums.of(what.source, what.items, what.ours)
        self._sums[session].append(what.to(crcs))

    def _write_ended(self, task: asyncio.Task[None], landing: _Landing) -> None:
        self._writes.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("write failed by a defect", room=self.room, exc_info=error)
            self._fail(Event.TRANSFER_FAILED, f"defect in the transfer engine's adapter: {error!r}")
        self._acknowledge_at_rest()
        landing.ended()

    async def _rest(self) -> None:
        while self._writes:
            await asyncio.wait(self._writes)

    # --- phases and endings

    def _step(self, event: Event) -> None:
        before, self.phase = self.phase, step(SENDER, self.phase, event)
        if self.phase is not before:
            self.course.step(self.phase, self._of.clock())
            self._watch()
            if self.phase.is_final:
                self._of.telling.ended(self.phase, self.course, lambda: self._outcome(event))

    def _outcome(self, event: Event) -> Ended:
        pages = self._n_sent if self._open_chunk is None else len(self._pages())
        why = (event, self.cause, self.reason)
        return Ended(Side.SENDER, self.room, self.phase, *why, pages, self.course.nbytes, self.peers, self.course)

    def _check(self) -> None:
        if self.phase is Phase.FAILED:
            raise RoomFailed(self.room, self.reason or "for no known reason", is_permanent=self.is_permanent)

    def _fail(
        self, event: Event, reason: str, but_tell_not: Endpoint | None = None, *, is_permanent: bool = False
    ) -> None:
        """The first cause wins: a finished room stays as it is."""
        if self.phase.is_final:
            return
        self.reason, self.is_permanent = reason, is_permanent
        if self.phase is Phase.BOOTSTRAPPING:
            self._of.words.gave_up(self.room, reason)
        self._step(event)
        current = asyncio.current_task()
        for write in self._writes:
            if write is not current:
                write.cancel()
        for named in self._named.values():
            if named.is_dummy or named.reply == but_tell_not:
                self._of.words.over(self.room, named.reply, named.use)
            else:
                self._of.words.report(named, Phase.FAILED, reason, is_permanent=is_permanent)
        self._no_longer_bootstrapping.set()
        self._compared.set()

    def _acknowledge_at_rest(self) -> None:
        if self._writes or self._unsettled:
            return
        while self._acks:
            to, generation = self._acks.popitem()
            self._of.words.acknowledge(self.room, to, generation)

    def _watch(self) -> None:
        """Bound the wait that the room is in, where nothing is being sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._busy and not self.phase.is_final:
            limit_s = OVERDUE[Side.SENDER, self.phase].limit_s(self._of.timeouts)
            self._timer = Alarm(limit_s, self._overdue)

    def _overdue(self) -> None:
        if self.phase is Phase.BOOTSTRAPPING:
            known = f" (heard of: {', '.join(sorted(self._named))})" if self._named else ""
            who = f"the decode ranks of room {self.room}{known}"
        else:
            who = "the prefill engine"
        self._fail(Event.TIMED_OUT, OVERDUE[Side.SENDER, self.phase].sentence(self._of.timeouts, who))

    def _pages(self) -> Ints:
        return np.concatenate(self._sources) if self._sources else np.empty(0, np.int64)

    def _leave(self) -> None:
        self._left_at = self._of.clock()
        self._of.leave(self)
        if self._writes or self._unsettled:
            self._of.unsettled(self, len(self._pages()))
            self._of.settling.spawn(f"settle room {self.room}", self._settle())
        elif self._release is not None:
            self._release(self._pages())

    async def _settle(self) -> None:
        await self._rest()
        for session in sorted(self._unsettled):
            await self._of.engine.settle(session)
        self._unsettled.clear()
        self._of.settled(self, len(self._pages()))
        self._acknowledge_at_rest()
        if self._release is not None:
            self._release(self._pages())


class _Landing:
    """Writes that were begun together. Not asyncio.wait(), which costs a room as much as planning its page."""

    __slots__ = ("_left", "_over")

    def __init__(self) -> None:
        self._left = 0
        self._over: asyncio.Future[None] | None = None

    def begun(self) -> None:
        self._left += 1

    def ended(self) -> None:
        self._left -= 1
        if not self._left and self._over is not None and not self._over.done():
            self._over.set_result(None)

    async def over(self) -> None:
        if self._left:
            self._over = asyncio.get_running_loop().create_future()
            await self._over
