"""
The sending side of a prefill rank: pages of it into the pages that decode ranks have named.

The mirror image of receiver.py. One object a room, whose state lives and dies with it (sending.py); what outlives rooms
is who has registered which memory. Nothing is retried: a room that fails ends with its first cause, here and at every
decode rank.

    async with Sender(engine, link.send, pools, rank, gate, timeouts, clock, metrics) as sender:
        ... link.serve(sender.handle) runs beside ...
        async with sender.open(room, release=give_pages_back) as r:
            await r.peers_ready()
            await r.send(pages)          # as often as there are chunks
            await r.finish(aux_row)

A source page is free for reuse when `release` has been called with it: on leaving the block, or, where the engine could
not bring its blocks to rest in time, when it has. Until then it shows in `sender.quarantine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import structlog

from pdctl.core.allowance import SenderLimits
from pdctl.core.early import EarlyBook
from pdctl.core.entries import layer_of
from pdctl.core.gate import Gate
from pdctl.core.layout import RankPools
from pdctl.core.trace import Trace, trace_of
from pdctl.core.transfer import Quarantined, RoomTimeouts, Side, Word
from pdctl.core.wire import (
    Abort,
    Bootstrap,
    Matched,
    Metadata,
    RegisterBuffers,
    Send,
    Unknown,
    parse_to_prefill,
)
from pdctl.engine.base import Engine
from pdctl.engine.checksums import Checksums
from pdctl.errands import Errands
from pdctl.errors import CallerError
from pdctl.lanes import Lanes
from pdctl.lastwords import LastWords
from pdctl.metrics import Metrics
from pdctl.pace import Pace
from pdctl.partners import Partners
from pdctl.sending import Release, SendingRoom
from pdctl.telling import Telling
from pdctl.writing import Writer

log = structlog.get_logger(__name__)


class Sender:
    """A prefill rank's sending side. Open with `async with`; give `handle` every message of the control link."""

    def __init__(
        self,
        engine: Engine,
        send: Send,
        pools: RankPools,
        rank: int,
        gate: Gate,
        timeouts: RoomTimeouts,
        clock: Callable[[], float],
        metrics: Metrics,
        limits: SenderLimits | None = None,
        telling: Telling | None = None,
    ) -> None:
        self.engine, self.pools, self.gate, self.timeouts = engine, pools, gate, timeouts
        if timeouts.checksum.is_on:
            pools.check_summed_here()
        self.layers = frozenset(layer_of(pools.layout, len(pools.kv)).tolist())
        self.clock, self.metrics, self.telling = clock, metrics.rooms, telling or Telling()
        self.limits = limits or SenderLimits()
        self.lanes, self.pace = Lanes(self.limits.max_nbytes_per_peer), Pace()
        self.writer = Writer(
            engine,
            gate,
            self.lanes,
            self.pace,
            clock,
            self.metrics.sent,
            turn_nbytes=self.limits.turn_nbytes,
            waiting_s=timeouts.waiting_s,
            transfer_s=timeouts.transfer_s,
        )
        self.checksums = Checksums()
        bounds = (self.limits.max_peers, self.limits.max_rooms_per_peer)
        self.partners = Partners(pools, gate, timeouts.checksum, engine.forget, *bounds)
        self._rooms: dict[int, SendingRoom] = {}
        self._unsettled: set[SendingRoom] = set()
        self._early = EarlyBook(self.limits.early, timeouts.bootstrap_s, _never_opened)
        self.words = LastWords(send, rank, timeouts, self.metrics.lost)
        self.settling = Errands(limit=None)  # as many as rooms were left unsettled, and none may be dropped

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._unsettled:
            log.warning("closing while the engine still reads pages", rooms=len(self._unsettled))
        await self.settling.aclose(flush_s=0)
        await self.words.aclose()
        self.checksums.close()

    @property
    def rooms(self) -> tuple[int, ...]:
        """Open now."""
        return tuple(self._rooms)

    @property
    def open_rooms(self) -> Mapping[int, SendingRoom]:
        return self._rooms

    @property
    def early(self) -> tuple[int, ...]:
        """Rooms that decode ranks have named and this engine has not opened."""
        return tuple(self._early.rooms(self.clock()))

    @property
    def sessions(self) -> tuple[str, ...]:
        """Decode sessions whose memory is known."""
        return self.partners.sessions

    @property
    def quarantine(self) -> tuple[Quarantined, ...]:
        """Pages of finished rooms that the engine may still read."""
        return tuple(room.quarantined() for room in self._unsettled)

    def open(
        self, room: int, required: int | None = None, release: Release | None = None, *, trace: Trace = None
    ) -> SendingRoom:
        """`required`: decode ranks to hear of; by default what their metadata says, as with the `trace`."""
        return SendingRoom(self, room, required, release, trace_of(trace))

    def handle(self, frames: Sequence[bytes]) -> None:
        """One message of a decode rank. Raises BadFrames for one that cannot be read; changes nothing then."""
        match parse_to_prefill(frames):
            case RegisterBuffers() as said:
                self._registered(said)
            case Metadata() as named:
                self._named(named)
            case Abort() as abort:
                self._aborted(abort)
            case Matched() as matched:
                if (room := self._rooms.get(matched.room)) is not None:
                    room.matched(matched)
            case Bootstrap() | Unknown() as other:
                log.debug("message not used", message=type(other).__name__)

    def _registered(self, said: RegisterBuffers) -> None:
        if said.again:
            if self.partners.has(said):
                return
            if not self.partners.knows(said.session):
                self.metrics.lost(Word.REGISTRATION)
        if self.partners.registered(said):
            for room in list(self._rooms.values()):
                room.peer_replaced(said.session)
        self.engine.forget(said.session)
        self.gate.registered(said.session, (*said.kv_pointers, *said.aux_pointers))
        log.info("decode rank registered", session=said.session, entries=len(said.kv_pointers), reply=str(said.reply))

    def _named(self, named: Metadata) -> None:
        if self.words.again(named):
            return
        self.words.hush(named.room, named.reply)
        room = self._rooms.get(named.room)
        if room is not None and not room.phase.is_final:
            is_known = room.named(named)
        elif self.words.too_late(named):
            self._early.drop(named)
            return
        else:  # also the next use of a room id, which may come while the last is being left
            is_known = self._early.put(named, self.clock())
        if named.again and not is_known:
            self.metrics.lost(Word.PAGES)

    def _aborted(self, abort: Abort) -> None:
        is_news = False
        if abort.reply is not None:
            self.words.hush(abort.room, abort.reply)
            is_news = not self.words.has_ended(abort.room, abort.reply, abort.use)
            self.words.over(abort.room, abort.reply, abort.use)
        room = self._rooms.get(abort.room) or next((r for r in self._unsettled if r.room == abort.room), None)
        if room is not None:
            room.aborted(abort)
            return
        self._early.abort(abort, self.clock(), is_news=is_news)
        if abort.reply is not None and abort.generation is not None:
            self.words.acknowledge(abort.room, abort.reply, abort.generation)  # nothing of it is in flight

    # --- for the rooms

    def enter(self, room: SendingRoom) -> tuple[list[Metadata], str | None]:
        """Take the room in; what was said about it before, and why it is over already if it is."""
        if room.room in self._rooms:
            raise CallerError(f"room {room.room} is open already: give each request a room of its own")
        self._rooms[room.room] = room
        self.words.opened(room.room)
        self.metrics.opened(Side.SENDER)
        return self._early.take(room.room, self.clock())

    def leave(self, room: SendingRoom) -> None:
        del self._rooms[room.room]
        self.partners.leave(room.sessions)
        self.metrics.ended(Side.SENDER, room.phase, self.clock() - room.opened_at)

    def unsettled(self, room: SendingRoom, n_pages: int) -> None:
        self._unsettled.add(room)
        self.metrics.quarantined(Side.SENDER, n_pages)

    def settled(self, room: SendingRoom, n_pages: int) -> None:
        self._unsettled.remove(room)
        self.metrics.quarantined(Side.SENDER, -n_pages)


def _never_opened(room: int) -> None:
    log.warning("room was never opened", room=room)
