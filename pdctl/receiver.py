"""
Drives one room's arrival: pages of this decode rank, named to prefill ranks that write into them.

The mirror image of sender.py. One object a room, whose state lives and dies with it (arriving.py); what outlives rooms
is which prefill ranks know our memory (contacts.py), and the pages that somebody may still write.

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
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import structlog

from pdctl.arriving import ArrivingRoom, Release
from pdctl.contacts import Contacts
from pdctl.core.address import Endpoint
from pdctl.core.layout import RankPools
from pdctl.core.pairing import Paired
from pdctl.core.plan import Ints
from pdctl.core.trace import Trace, trace_of
from pdctl.core.transfer import Phase, Quarantined, RoomTimeouts, Side, Word
from pdctl.core.wire import (
    Abort,
    AbortAck,
    AuxData,
    Metadata,
    RegisterBuffers,
    Send,
    Status,
    Unknown,
    parse_to_decode,
)
from pdctl.engine.checksums import Checksums
from pdctl.errands import Errands
from pdctl.errors import BadFrames, CallerError, Unreachable
from pdctl.metrics import Metrics
from pdctl.pace import Pace
from pdctl.telling import Telling

log = structlog.get_logger(__name__)

IsGone = Callable[[Endpoint], Awaitable[bool]]

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
        if silent:  # what they say yet of the room's last use would be taken for this one: a stock status has no use
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

    def tell_end(self, room: ArrivingRoom, untold: Sequence[Endpoint]) -> None:
        """Let those who will hear of no pages not wait for them. Once: nothing here waits for their word."""
        for at in untold:
            abort = Abort(room.room, self.reply, next(self._generations), room.reason, room.use)
            self.errands.spawn(f"abort to {at}", self._tell(at, abort))

    # --- quarantine

    def _ask(self, held: _Held) -> None:
        for generation, at in held.asked.items():
            abort = Abort(held.room, self.reply, generation, held.reason or None, held.use)
            self.errands.spawn(f"abort to {at}", self._tell(at, abort))
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

    async def _tell(self, at: Endpoint, abort: Abort) -> None:
        try:
            await self._send(at, abort.to_frames())
            return
        except Unreachable as error:
            log.warning("prefill rank not told of an abort", room=abort.room, to=str(at), why=str(error))
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


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
