"""
One room at the decode side: its phases, what prefill ranks say of it, what has arrived, and how it ends.

Its state lives and dies with it; what its rank shares with others, its receiver gives it. Never asks what another room
does, and frees no page: those of a room that failed it hands over with who has been told of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import structlog

from pdctl.contacts import Contacts
from pdctl.core.address import Endpoint
from pdctl.core.comparing import Checked, Checksum
from pdctl.core.course import Course, Ended
from pdctl.core.layout import RankPools
from pdctl.core.plan import Ints
from pdctl.core.sums import AUX, KV, STATE, Sums, spoken
from pdctl.core.transfer import OVERDUE, RECEIVER, Event, Phase, RoomTimeouts, Side, step
from pdctl.core.wire import NOT_REGISTERED, Matched, Metadata, Status
from pdctl.counts.rooms import RoomMetrics
from pdctl.engine.checksums import Checksums
from pdctl.errands import Errands
from pdctl.errors import ChecksumsMissing, LayoutMismatch, RoomFailed, Unreachable
from pdctl.lag import Alarm
from pdctl.pace import Pace
from pdctl.telling import Telling

log = structlog.get_logger(__name__)

Release = Callable[[Ints], None]

# Times remind_s between two reminders: a room of minutes need not wait as long again for its last word.
_MOST_REMIND = 4


class Rank(Protocol):
    """What the rooms of one decode rank share."""

    session: str
    pools: RankPools
    contacts: Contacts
    checksums: Checksums
    pace: Pace
    errands: Errands
    telling: Telling
    metrics: RoomMetrics
    timeouts: RoomTimeouts
    clock: Callable[[], float]

    def enter(self, room: ArrivingRoom) -> None:
        """Raises CallerError where its number is not over, and then takes nothing in."""

    def leave(self, room: ArrivingRoom) -> None: ...

    def nbytes_of(self, n_pages: int) -> int: ...

    async def tell_pages(self, prefill: Endpoint, named: Metadata) -> None:
        """Raises Unreachable, and then `prefill` does not know of the pages."""

    async def look_for(self, prefill: Endpoint) -> None:
        """Nothing can be said to it: is it there at all?"""

    def hold(self, room: ArrivingRoom, told: Sequence[Endpoint], release: Release | None) -> None:
        """Keep the room's pages until every one of `told` has confirmed that it writes no more."""

    def tell_end(self, room: ArrivingRoom, untold: Sequence[Endpoint]) -> None:
        """Let those who will hear of no pages not wait for them."""


class ArrivingRoom:
    """One room at the decode side. Every failure comes out of its methods as RoomFailed with the first cause."""

    def __init__(
        self,
        receiver: Rank,
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
        self.is_permanent = False
        self.course, self.opened_at = course, course.began
        self._of = receiver
        self._telling = telling
        self._responses = responses
        self._ranks = ranks
        self._release = release
        self._told: list[Endpoint] = []
        self._out_of_reach: set[Endpoint] = set()
        self._answers: set[int] = set()
        self._checks: dict[int, asyncio.Task[None]] = {}
        self._spoken = np.zeros(len(named.pages), bool)
        self._ended = asyncio.Event()
        self._timer: Alarm | None = None
        self._reminder: asyncio.TimerHandle | None = None
        self._reminded_s = 0.0
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
            self._out_of_reach.add(prefill)
            self._fail(Event.PEER_FAILED, f"prefill rank at {prefill} is gone: {why}")

    def _prefill_failed(self, status: Status) -> None:
        reason = status.reason or "it gave no reason, see its log for this room"
        if reason.startswith(NOT_REGISTERED):
            self._forget_all()
        self._fail(Event.PEER_FAILED, f"prefill rank {status.rank} says: {reason}", is_permanent=status.is_permanent)

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
                is_permanent=True,
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
            self._out_of_reach.add(at)
            self._fail(Event.PEER_UNREACHABLE, str(error))
        except ChecksumsMissing as error:
            self._fail(Event.PEER_FAILED, str(error), is_permanent=True)
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
        self._remind_in(min(2 * wait_s, _MOST_REMIND * self._of.timeouts.remind_s))

    def _hurry(self, prefill: Endpoint) -> None:
        """It has our pages and not our memory. Once a room, so that two who misunderstand each other keep the peace."""
        if not self._is_hurried:
            self._is_hurried = True
            self._of.contacts.not_known_at(prefill)
            self._of.errands.spawn(f"room {self.room} once more", self._say_again())

    async def _say_again(self) -> None:
        """Nobody has answered: the prefill may still compute, or may never have heard of the room."""
        reminded_s, waited_s = self._reminded_s, self._of.clock() - self.opened_at
        for at, named in self._telling:
            try:
                if await self._of.contacts.remind(at, waited_s, reminded_s) and not self.phase.is_final:
                    self._reminded_s = waited_s
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
            raise RoomFailed(self.room, self.reason or "for no known reason", is_permanent=self.is_permanent)

    def _fail(self, event: Event, reason: str, *, is_permanent: bool = False) -> None:
        """The first cause wins: a finished room stays as it is."""
        if self.phase.is_final:
            return
        self.reason, self.is_permanent = reason, is_permanent
        self._step(event)
        current = asyncio.current_task() if self._checks else None
        for check in self._checks.values():
            if check is not current:
                check.cancel()
        passed_over = self._out_of_reach.union(self._told)
        self._of.tell_end(self, [at for at, _ in self._telling if at not in passed_over])
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


def _cancel(timer: asyncio.TimerHandle | Alarm | None) -> None:
    if timer is not None:
        timer.cancel()
