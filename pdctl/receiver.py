"""
Drives one room's arrival: pages of this decode rank, named to prefill ranks that write into them.

The mirror image of sender.py. One object a room, whose state lives and dies with it; what outlives rooms is which
prefill ranks know our memory, and the pages that somebody may still write.

    async with Receiver(engine.session, link.send, link.endpoint, pools, 0, 1, timeouts, clock, metrics) as receiver:
        ... link.serve(receiver.handle) runs beside ...
        async with receiver.open(room, prefill, pages, aux_row, release=give_pages_back) as r:
            await r.arrived()

When is a page free for reuse? `release` is called with the pages (their aux row goes with them), once, when nothing can
write them any more:

- after success, on leaving the block: the prefill's engine has had every block acknowledged by ours;
- when no prefill rank was told of them;
- after any other ending, when every prefill rank that was told has confirmed our abort (it has stopped submitting and
  its blocks are at rest), or has proven to be gone, and `drain_margin_s` more have passed. The margin is for bytes that
  the prefill's kernel had taken before: they are written into our memory whatever the two engines think, registered or
  not (MOONCAKE_FACTS H12), and there is no word on the wire for their end.

Until then they show in `receiver.quarantine`. No time frees them by itself: a prefill rank that neither confirms nor
is gone is asked again every `release_s`, with a warning. Stock SGLang gives such pages away after 30 s, and a stopped
prefill that goes on writes into the next request.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import structlog

from pdctl.contacts import Contacts
from pdctl.core.address import Endpoint
from pdctl.core.comparing import Checked, Checksum
from pdctl.core.course import Course, Ended
from pdctl.core.layout import RankPools
from pdctl.core.pairing import Paired
from pdctl.core.plan import Ints
from pdctl.core.sums import AUX, KV, STATE, Sums, spoken
from pdctl.core.trace import Trace, trace_of
from pdctl.core.transfer import OVERDUE, RECEIVER, Event, Phase, Quarantined, RoomTimeouts, Side, Word, step
from pdctl.core.wire import (
    NOT_REGISTERED,
    Abort,
    AbortAck,
    AuxData,
    Matched,
    Metadata,
    RegisterBuffers,
    Send,
    Status,
    Unknown,
    parse_to_decode,
)
from pdctl.engine.checksums import Checksums
from pdctl.errands import Errands
from pdctl.errors import BadFrames, CallerError, ChecksumsMissing, LayoutMismatch, RoomFailed, Unreachable
from pdctl.lag import Alarm
from pdctl.metrics import Metrics
from pdctl.pace import Pace
from pdctl.telling import Telling

log = structlog.get_logger(__name__)

IsGone = Callable[[Endpoint], Awaitable[bool]]
Release = Callable[[Ints], None]

_FLUSH_S = 1.0  # what a peer is allowed for taking a last abort


async def never_gone(_: Endpoint) -> bool:
    """For those who cannot find out."""
    return False


@dataclass(slots=True)
class _Held:
    """Pages of a failed room; `asked`: by the generation of our abort, the prefill ranks that have not confirmed."""

    room: int
    use: int
    pages: Ints
    release: Release | None
    reason: str
    since: float
    asked: dict[int, Endpoint]
    timer: asyncio.TimerHandle | None = None


class Receiver:
    """A decode rank's receiving side. Open with `async with`; give `handle` every message of the control link.

    session: under which our engine is reached; reply: where this control link is. is_gone: whether a prefill rank's
    process has proven to have ended (`PeerLink.is_gone`): its engine is in that process.
    """

    def __init__(
        self,
        session: str,
        send: Send,
        reply: Endpoint,
        pools: RankPools,
        tp_rank: int,
        tp_size: int,
        timeouts: RoomTimeouts,
        clock: Callable[[], float],
        metrics: Metrics,
        is_gone: IsGone = never_gone,
        telling: Telling | None = None,
    ) -> None:
        self.session, self.reply, self.pools, self.timeouts = session, reply, pools, timeouts
        self.clock, self.metrics, self.telling = clock, metrics.rooms, telling or Telling()
        wants_sums = timeouts.checksum.is_on
        pools.check_aux_written_here()
        if wants_sums:
            pools.check_summed_here()
        self._nbytes = sum(pools.kv.item_lens), sum(pools.aux.item_lens)
        self.checksums = Checksums()
        self._send, self._is_gone = send, is_gone
        self._rooms: dict[int, ArrivingRoom] = {}
        self._held: list[_Held] = []
        self._generations = itertools.count(1)
        self._uses = itertools.count(secrets.randbits(62))  # as no process before it at this address has had them
        self.pace = Pace()
        self.errands = Errands()
        registration = _registration(session, reply, pools, tp_rank, tp_size, wants_sums)
        self.contacts = Contacts(send, registration, timeouts, clock, self.errands)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._held:
            log.warning("closing while pages may still be written", rooms=len(self._held))
        await self.errands.aclose(_FLUSH_S)
        for held in self._held:
            _cancel(held.timer)
        self.checksums.close()

    @property
    def rooms(self) -> tuple[int, ...]:
        """Open now."""
        return tuple(self._rooms)

    @property
    def open_rooms(self) -> Mapping[int, ArrivingRoom]:
        return self._rooms

    def nbytes_of(self, n_pages: int) -> int:
        """What a room of so many pages brings, with its aux row."""
        return n_pages * self._nbytes[0] + self._nbytes[1]

    @property
    def quarantine(self) -> tuple[Quarantined, ...]:
        """Pages of failed rooms that a prefill rank, or bytes on their way, may still write."""
        return tuple(
            Quarantined(held.room, held.pages, held.since, held.reason, tuple(map(str, held.asked.values())))
            for held in self._held
        )

    def open(
        self,
        room: int,
        prefill: Endpoint | Paired,
        pages: npt.ArrayLike,
        aux_row: int,
        prefix_len: int = 0,
        release: Release | None = None,
        *,
        state_rows: Sequence[Sequence[int]] = (),
        trace: Trace = None,
    ) -> ArrivingRoom:
        """`pages`, shape (n,), `aux_row` and the `state_rows` of each group are where `prefill` writes what follows
        `prefix_len` tokens: one rank that does it all, or several by `core.pairing`. They are told of the `trace`."""
        paired = Paired((prefill,)) if isinstance(prefill, Endpoint) else prefill
        given, rows = np.asarray(pages, dtype=np.int64).ravel(), tuple(tuple(group) for group in state_rows)
        self._check_own(given, aux_row, rows, paired.senders, paired.ranks)
        who, required = (room, self.reply, self.session), paired.required
        course = self.telling.begin(Phase.BOOTSTRAPPING, self.clock(), trace_of(trace), is_first=True)
        extra: dict[str, Any] = {"trace": course.trace, "use": next(self._uses)}
        named = Metadata(*who, given.astype(np.int32), aux_row, required, prefix_len, rows, **extra)
        dummy = Metadata(*who, np.empty(0, np.int32), None, required, prefix_len, **extra)
        telling = [(at, named) for at in paired.senders] + [(at, dummy) for at in paired.dummies]
        return ArrivingRoom(self, named, telling, paired.responses, paired.ranks, release, course)

    def handle(self, frames: Sequence[bytes]) -> None:
        """One message of a prefill rank. Raises BadFrames for one that cannot be read or must not be obeyed."""
        match parse_to_decode(frames):
            case Status() as status:
                self._status(status)
            case AbortAck() as ack:
                self._acknowledged(ack)
            case AuxData() as aux:
                self._aux_data(aux)
            case Unknown() as other:
                log.debug("message not used", message=other.tag)

    def gone(self, prefill: Endpoint, why: str) -> None:
        """The process at `prefill` has proven to have ended: its rooms fail now, and its pages wait for the margin."""
        self.contacts.forget(prefill)
        for room in list(self._rooms.values()):
            room.prefill_gone(prefill, why)
        self._confirm_gone(prefill)

    # --- what prefill ranks say

    def _status(self, status: Status) -> None:
        room = self._rooms.get(status.room)
        if room is not None and status.use in (None, room.use):
            room.reported(status)
        elif self.contacts.matched_before(status):
            self.metrics.lost(Word.MATCH)
        else:
            log.debug("status of an unknown room", room=status.room, rank=status.rank)

    def _acknowledged(self, ack: AbortAck) -> None:
        """Generations are ours and never used twice, so each names one prefill rank's share of one room."""
        if self.contacts.answered(ack):
            return
        for held in self._held:
            if held.room == ack.room and ack.generation in held.asked:
                self._confirm(held, ack.generation)
                return
        log.debug("late or unknown abort ack", room=ack.room, generation=ack.generation)

    def _aux_data(self, aux: AuxData) -> None:
        """Write it if it is this room's own row in one of our buffers, whole; stock writes wherever it is told to."""
        room = self._rooms.get(aux.room)
        if room is None or room.phase is not Phase.TRANSFERRING:
            raise BadFrames(f"aux data for room {aux.room}, which waits for none")
        if aux.row != room.named.aux_row:
            raise BadFrames(f"aux data frame 3 (row): {aux.row} is not the row of room {aux.room}")
        pool = self.pools.aux
        if aux.buffer >= len(pool):
            raise BadFrames(f"aux data frame 2 (buffer): {aux.buffer}, there are {len(pool)}")
        nbytes = pool.item_lens[aux.buffer]
        if len(aux.data) != nbytes:
            raise BadFrames(f"aux data frame 5 (data): {len(aux.data)} bytes, a row of the buffer has {nbytes}")
        ctypes.memmove(pool.pointers[aux.buffer] + aux.row * nbytes, aux.data, nbytes)

    # --- for the rooms

    def enter(self, room: ArrivingRoom) -> None:
        if room.room in self._rooms:
            raise CallerError(f"room {room.room} is open already: give each request a room of its own")
        silent = [str(at) for held in self._held if held.room == room.room for at in held.asked.values()]
        if silent:  # what they say yet of the room's last use would be taken for this one: a status has no generation
            raise CallerError(
                f"room {room.room} is not over at prefill {', '.join(silent)}, which has not confirmed yet that it was "
                "given up here: give each request a room of its own"
            )
        self._rooms[room.room] = room
        self.metrics.opened(Side.RECEIVER)

    def leave(self, room: ArrivingRoom) -> None:
        del self._rooms[room.room]
        self.metrics.ended(Side.RECEIVER, room.phase, self.clock() - room.opened_at)

    async def tell_pages(self, prefill: Endpoint, named: Metadata) -> None:
        """Raises Unreachable, and then `prefill` does not know of the pages."""
        await self._send(prefill, named.to_frames())

    def hold(self, room: ArrivingRoom, told: Sequence[Endpoint], release: Release | None) -> None:
        """Keep the room's pages until every one of `told` has confirmed that it writes no more."""
        asked = {next(self._generations): at for at in told}
        held = _Held(room.room, room.use, room.pages, release, room.reason or "", self.clock(), asked)
        self._held.append(held)
        self.metrics.quarantined(Side.RECEIVER, len(held.pages))
        self._ask(held)

    # --- quarantine

    def _ask(self, held: _Held) -> None:
        for generation, at in held.asked.items():
            self.errands.spawn(f"abort to {at}", self._ask_one(held, generation, at))
        held.timer = asyncio.get_running_loop().call_later(self.timeouts.release_s, self._ask_again, held)

    def _ask_again(self, held: _Held) -> None:
        log.warning(
            "pages stay in quarantine: no word that nobody writes them",
            room=held.room,
            pages=len(held.pages),
            for_s=round(self.clock() - held.since, 1),
            waiting_for=[str(at) for at in held.asked.values()],
        )
        self._ask(held)

    async def _ask_one(self, held: _Held, generation: int, at: Endpoint) -> None:
        try:
            await self._send(at, Abort(held.room, self.reply, generation, held.reason or None, held.use).to_frames())
            return
        except Unreachable as error:
            log.warning("prefill rank not told of an abort", room=held.room, to=str(at), why=str(error))
        await self.look_for(at)

    async def look_for(self, prefill: Endpoint) -> None:
        """Nothing can be said to it: is it there at all?"""
        if await self._is_gone(prefill):
            self.gone(prefill, "its host says that nobody listens there any more")

    def _confirm_gone(self, prefill: Endpoint) -> None:
        for held in list(self._held):
            for generation in [g for g, at in held.asked.items() if at == prefill]:
                self._confirm(held, generation)

    def _confirm(self, held: _Held, generation: int) -> None:
        del held.asked[generation]
        if not held.asked:
            _cancel(held.timer)
            loop = asyncio.get_running_loop()
            held.timer = loop.call_later(self.timeouts.drain_margin_s, self._let_go, held)

    def _let_go(self, held: _Held) -> None:
        self._held.remove(held)
        self.metrics.quarantined(Side.RECEIVER, -len(held.pages))
        if held.release is not None:
            held.release(held.pages)

    def _check_own(
        self,
        pages: Ints,
        aux_row: int,
        state_rows: Sequence[Sequence[int]],
        prefills: Sequence[Endpoint],
        ranks: Sequence[int] | None,
    ) -> None:
        """Our own mistakes are found here, before a stranger is asked to write somewhere."""
        if not prefills:
            raise CallerError("no prefill rank given: a room needs at least one")
        if ranks is None and len(prefills) > 1 and self.timeouts.checksum.is_on:
            raise CallerError("several prefill ranks are given without their ids: give Paired.ranks, to check by sums")
        if len(state_rows) > len(self.pools.states):
            raise CallerError(
                f"rows of {len(state_rows)} groups of state are named, this rank has {len(self.pools.states)}: "
                "give the pools of each group"
            )
        states = zip(state_rows, self.pools.states, strict=False)
        for what, items, pool in (
            ("page", pages, self.pools.kv),
            ("aux row", np.asarray([aux_row]), self.pools.aux),
            *((f"row of state {n}", np.asarray(rows, np.int64), pool) for n, (rows, pool) in enumerate(states)),
        ):
            limit = 2**31 if pool.n_items is None else pool.n_items
            wrong = items[(items < 0) | (items >= limit)]
            if len(wrong):
                raise CallerError(f"{what} {wrong[0]} is outside the pool, which has {limit}: check the page table")
        if len(np.unique(pages)) != len(pages):
            raise CallerError("a page is named twice in one room: check the page table")


class ArrivingRoom:
    """One room at the decode side. Every failure comes out of its methods as RoomFailed with the first cause."""

    def __init__(
        self,
        receiver: Receiver,
        named: Metadata,
        telling: Sequence[tuple[Endpoint, Metadata]],
        responses: int,
        ranks: tuple[int, ...] | None,
        release: Release | None,
        course: Course,
    ) -> None:
        self.room = named.room
        self.named = named
        self.pages = named.pages.astype(np.int64)
        self.phase = Phase.BOOTSTRAPPING
        self.reason: str | None = None
        self.course, self.opened_at = course, course.began
        self._of = receiver
        self._telling = telling
        self._responses = responses
        self._ranks = ranks
        self._release = release
        self._told: list[Endpoint] = []
        self._answers: set[int] = set()
        self._checks: dict[int, asyncio.Task[None]] = {}
        self._spoken = np.zeros(len(named.pages), bool)
        self._ended = asyncio.Event()
        self._timer: Alarm | None = None
        self._reminder: asyncio.TimerHandle | None = None
        self._told_at = self.opened_at
        self._is_hurried = False

    async def __aenter__(self) -> Self:
        self._of.enter(self)
        self._watch()
        try:
            await self._announce()
        except BaseException as error:
            self._fail(Event.ABORTED, f"the decode engine left the room on {type(error).__name__}: {error}")
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        why = "before its pages arrived" if error is None else f"on {type(error).__name__}: {error}"
        self._fail(Event.ABORTED, f"the decode engine left the room {why}")
        self._leave()

    @property
    def use(self) -> int:
        """Of its number, unlike any other that this process makes of one."""
        return self.named.use or 0

    async def arrived(self) -> None:
        """Return when every prefill rank that has to has reported success: pages and aux row are here."""
        await self._ended.wait()
        await self._of.pace.step()
        self._check()

    # --- what prefill ranks say

    def reported(self, status: Status) -> None:
        """Before we have named our pages it speaks of an earlier room; 2 only says that prefill has computed."""
        expected = self._ranks is None or status.rank in self._ranks
        if expected and status.phase is Phase.BOOTSTRAPPING and (status.reason or "").startswith(NOT_REGISTERED):
            self._hurry(self._at(status.rank))
        elif not expected or not self._told or status.phase not in (Phase.SUCCESS, Phase.FAILED):
            log.debug("status not used", room=self.room, rank=status.rank, phase=status.phase.name)
        elif status.phase is Phase.FAILED:
            self._prefill_failed(status)
        elif status.rank not in self._answers and status.rank not in self._checks:
            self._prefill_done(status)

    def prefill_gone(self, prefill: Endpoint, why: str) -> None:
        if any(at == prefill for at, _ in self._telling):
            self._fail(Event.PEER_FAILED, f"prefill rank at {prefill} is gone: {why}")

    def _prefill_failed(self, status: Status) -> None:
        reason = status.reason or "it gave no reason, see its log for this room"
        if reason.startswith(NOT_REGISTERED):
            self._forget_all()
        self._fail(Event.PEER_FAILED, f"prefill rank {status.rank} says: {reason}")

    # --- what has arrived

    def _prefill_done(self, status: Status) -> None:
        """Believe it, or, where it was asked for sums and gives them, see first whether that is what has arrived."""
        if not self._of.timeouts.checksum.is_on or self.phase.is_final:
            self._answered(status.rank)
        elif status.sums is None:
            self._came_without_sums(status.rank)
        else:
            check = asyncio.create_task(self._check_arrival(status.rank, status.sums), name=f"check of {self.room}")
            self._checks[status.rank] = check
            check.add_done_callback(self._check_ended)

    def _came_without_sums(self, rank: int) -> None:
        self._of.metrics.checked(Checked.ABSENT)
        if self._of.timeouts.checksum is Checksum.REQUIRED:
            self._forget_all()  # it has said once that it would
            self._fail(
                Event.PEER_FAILED,
                f"prefill rank {rank} gives no checksums, and room.checksum is required here: see whether it was "
                "started anew without",
            )
            return
        log.debug("room is not checked: its prefill sends no checksums", room=self.room, rank=rank)
        self._answered(rank)

    def _answered(self, rank: int) -> None:
        self._answers.add(rank)
        complete = len(self._answers) >= self._responses
        whole = self._of.pools.layout.tokens.is_all  # else a page may be named of which no token is this rank's
        if complete and whole and self._answers <= self._checks.keys() and not self._spoken.all():
            self._fail(
                Event.TRANSFER_FAILED,
                f"no prefill rank gives a checksum of pages {self.pages[~self._spoken].tolist()[:16]}, though each "
                "gives some: look at the logs of both sides for this room",
            )
            return
        self._step(Event.ALL_ANSWERED if complete else Event.PREFILL_ANSWERED)

    async def _check_arrival(self, rank: int, sums: Sequence[Sums]) -> None:
        """Stands beside the room: what comes of it is an answer, or the end."""
        wrong = [said for each in sums for said in await self._differ(rank, each)]
        self._of.metrics.checked(Checked.DIFFERED if wrong else Checked.MATCHED)
        if wrong:
            what = "; ".join(wrong)
            self._fail(
                Event.TRANSFER_FAILED,
                f"{what}: not what prefill rank {rank} sent, by checksum. Look for who else writes that memory, and at "
                "the network and the memory of both hosts",
            )
        else:
            self._spoken |= spoken(sums, len(self.pages))
            self._answered(rank)
            if self.phase is not Phase.FAILED:
                match = Matched(self.room, self._of.session, self.use)
                self._of.contacts.matched(self._at(rank), match, rank)

    def _at(self, rank: int) -> Endpoint:
        """Where that prefill rank is told; the senders come first in `_telling`, as their ids do."""
        return self._telling[0 if self._ranks is None else self._ranks.index(rank)][0]

    async def _differ(self, rank: int, sums: Sums) -> list[str]:
        named = self._items_of(sums.pool)
        try:
            pool = sums.pool_of(self._of.pools)
            problem = "they speak of a pool that is not here" if pool is None else sums.spans.problem(pool)
        except LayoutMismatch as error:
            pool, problem = None, str(error)
        if pool is None or problem is not None or sums.end > len(named):
            problem = problem or f"they speak of {sums.noun} {sums.end}, {len(named)} were named"
            return [f"checksums of prefill rank {rank} cannot be compared ({problem})"]
        mine = sums.items(named)
        said = sums.differ(await self._of.checksums.of(pool, mine, sums.spans), mine)
        return [] if said is None else [said]

    def _items_of(self, pool: int) -> Ints:
        """What we have named of it."""
        if pool == KV:
            return self.pages
        if pool == AUX:
            return np.array([] if self.named.aux_row is None else [self.named.aux_row], np.int64)
        rows = self.named.state_rows
        return np.array(rows[pool - STATE] if pool - STATE < len(rows) else (), np.int64)

    def _check_ended(self, check: asyncio.Task[None]) -> None:
        if not check.cancelled() and (error := check.exception()) is not None:
            log.error("check failed by a defect", room=self.room, exc_info=error)
            self._fail(Event.TRANSFER_FAILED, f"defect in the check of what arrived: {error!r}")

    # --- telling

    async def _announce(self) -> None:
        try:
            for at, _ in self._telling:
                await self._of.pace.step()
                await self._of.contacts.tell_memory(at)
            self._step(Event.BUFFERS_REGISTERED)
            for at, named in self._telling:
                self._check()
                await self._tell(at, named)
            self._step(Event.METADATA_SENT)
            self._remind_in(self._of.timeouts.remind_s)
        except Unreachable as error:
            self._forget_all()
            self._fail(Event.PEER_UNREACHABLE, str(error))
        except ChecksumsMissing as error:
            self._fail(Event.PEER_FAILED, str(error))
        self._check()

    async def _tell(self, at: Endpoint, named: Metadata) -> None:
        self._told.append(at)  # before: cancelled in the middle, it may have been told
        try:
            await self._of.tell_pages(at, named)
        except Unreachable:
            self._told.remove(at)
            raise

    def _forget_all(self) -> None:
        for at, _ in self._telling:
            self._of.contacts.forget(at)

    # --- telling again

    def _remind_in(self, wait_s: float) -> None:
        if not self.phase.is_final:
            self._reminder = asyncio.get_running_loop().call_later(wait_s, self._remind, wait_s)

    def _remind(self, wait_s: float) -> None:
        self._of.errands.spawn(f"room {self.room} once more", self._say_again())
        self._remind_in(2 * wait_s)

    def _hurry(self, prefill: Endpoint) -> None:
        """It has our pages and not our memory. Once a room, so that two who misunderstand each other keep the peace."""
        if not self._is_hurried:
            self._is_hurried = True
            self._of.contacts.not_known_at(prefill)
            self._of.errands.spawn(f"room {self.room} once more", self._say_again())

    async def _say_again(self) -> None:
        """Nobody has answered: the prefill may still compute, or may never have heard of the room."""
        for at, named in self._telling:
            try:
                if await self._of.contacts.remind(at, self._of.clock() - self._told_at) and not self.phase.is_final:
                    await self._of.tell_pages(at, replace(named, again=True))
                    log.debug("room named again", room=self.room, to=str(at))
            except Unreachable as error:
                log.debug("room not named again", room=self.room, to=str(at), why=str(error))
                await self._of.look_for(at)
            if self.phase.is_final:
                return

    # --- phases and endings

    def _step(self, event: Event) -> None:
        before, self.phase = self.phase, step(RECEIVER, self.phase, event)
        if self.phase is not before:
            self.course.step(self.phase, self._of.clock())
        if self.phase is not before and self.phase is not Phase.WAITING_FOR_INPUT:  # which shares a limit with before
            self._watch()
        if self.phase.is_final and not self._ended.is_set():
            self._ended.set()
            _cancel(self._reminder)
            self.course.nbytes = self._of.nbytes_of(len(self.pages)) if self.phase is Phase.SUCCESS else 0
            self._of.telling.ended(self.phase, self.course, lambda: self._outcome(event))

    def _outcome(self, event: Event) -> Ended:
        what = (len(self.pages), self.course.nbytes, self.peers, self.course)
        return Ended(Side.RECEIVER, self.room, self.phase, event, None, self.reason, *what)

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(str(at) for at, _ in self._telling)

    def _check(self) -> None:
        if self.phase is Phase.FAILED:
            raise RoomFailed(self.room, self.reason or "for no known reason")

    def _fail(self, event: Event, reason: str) -> None:
        """The first cause wins: a finished room stays as it is."""
        if self.phase.is_final:
            return
        self.reason = reason
        self._step(event)
        current = asyncio.current_task() if self._checks else None
        for check in self._checks.values():
            if check is not current:
                check.cancel()
        if self._told:
            self._of.hold(self, self._told, self._release)
            self._release = None

    def _watch(self) -> None:
        _cancel(self._timer)
        self._timer = None
        if not self.phase.is_final:
            limit_s = OVERDUE[Side.RECEIVER, self.phase].limit_s(self._of.timeouts)
            self._timer = Alarm(limit_s, self._overdue)

    def _overdue(self) -> None:
        who = "prefill at " + ", ".join(str(at) for at, _ in self._telling)
        self._forget_all()  # silence may mean another process there
        self._fail(Event.TIMED_OUT, OVERDUE[Side.RECEIVER, self.phase].sentence(self._of.timeouts, who))

    def _leave(self) -> None:
        """Here `release` is still ours only after success, or when nobody was told of the pages."""
        self._of.leave(self)
        if self._release is not None:
            self._release(self.pages)


def _registration(
    session: str, reply: Endpoint, pools: RankPools, tp_rank: int, tp_size: int, wants_sums: bool
) -> RegisterBuffers:
    kv = pools.kv
    return RegisterBuffers(
        reply=reply,
        session=session,
        kv_pointers=kv.pointers,
        aux_pointers=pools.aux.pointers,
        tp_rank=tp_rank,
        tp_size=tp_size,
        kv_item_len=kv.item_lens[0] if kv.item_lens else 0,
        kv_item_lens=kv.item_lens,
        kv_layer_ids=pools.layout.layer_ids,
        dcp_size=pools.layout.tokens.size,
        dcp_rank=pools.layout.tokens.rank,
        state_pointers=tuple(state.pointers for state in pools.states),
        state_item_lens=tuple(state.item_lens for state in pools.states),
        state_layer_ids=pools.state_layer_ids,
        state_dims=pools.state_dims,
        wants_sums=wants_sums,
    )


def _cancel(timer: asyncio.TimerHandle | Alarm | None) -> None:
    if timer is not None:
        timer.cancel()
