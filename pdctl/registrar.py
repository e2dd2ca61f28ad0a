"""
The one owner of the registry: decides a command, journals what it would change, and only then changes it.

    commands that wait ─> a draft of the registry ─> the journal ─> the draft is adopted, each caller answered
                                                         └─ refuses: the draft is dropped, nothing has happened

One group of commands at a time, in the order in which they came; who comes meanwhile is in the next, so that all of a
group share one write. Readers see what is journalled and nothing else. What is observed rather than asked for (a lease
has ended, a witness has spoken) is true whether a disk takes it or not: it holds at once and is written when it can be.

Nothing here needs a lock: between two groups everything happens without an await. Each Change is told once, by the
herald, when it holds. No wire is spoken here: the dialects translate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn, TypeVar

import structlog

from pdctl.core.access import check_advertised
from pdctl.core.address import Endpoint
from pdctl.core.instances import InstanceView
from pdctl.core.listening import SHARE, Attention, rest_s
from pdctl.core.lives import PREFILL, Change, Claim, Life, Owner, Record
from pdctl.core.registry import Registry
from pdctl.core.rooms import RoomBook
from pdctl.core.route import Seat
from pdctl.counts.registry import Found, Lookup
from pdctl.errors import Behind, LimitReached, NotReady
from pdctl.herald import Herald
from pdctl.metrics import Metrics
from pdctl.persistence.base import Journal, Kept, Learned, Note, Room, Shared
from pdctl.waiting import Command, Decide, Offered, Told, Waiting, decided, settle

SWEEP_EVERY_S = 0.5
SWEEP_BUDGET = 250  # rows; about half a ms, 2 at worst, before the loop serves somebody else
SWEEP_REST_S = 0.002
"""Between two slices: a fifth of the loop for 100,000 rooms a second. Those that are over are over for readers already;
without a rest every answer waited for a slice, and p99 of GET rose fivefold while a million rooms ended."""
TICK_BUDGET = 200  # lives; about 2 ms
STALLED_S = 1.0
"""A loop that was stopped for so long is worth a warning, whatever it endangers (core.listening)."""

MOST_BEHIND = 200
"""A group that has lost to other registries so often is refused."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Registrar:
    """Dialects call it; `sweep` and `listen` run beside the server."""

    def __init__(
        self,
        registry: Registry,
        rooms: RoomBook,
        journal: Journal,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        first_epoch: int = 0,
    ) -> None:
        """`first_epoch`: where to begin when the journal has kept nothing; in an era of its own (core.lives)."""
        self._registry = registry
        self._first_epoch = first_epoch
        self._attention = Attention()
        self._rooms = rooms
        self._journal = journal
        self._shared: Shared | None = journal if isinstance(journal, Shared) else None
        self._learned: list[Learned] = []
        self._n_behind = 0
        self._counts = metrics.registry
        self.herald = Herald(self._counts.changed, self._counts.refused)
        self._clock = clock
        self._note_hearers: list[Callable[[Sequence[Note]], None]] = []
        self._observations: list[Command] = []
        self._commands: list[Command] = []
        self._new_rooms: list[tuple[Room, Told]] = []
        self._unwritten: dict[int, Change] = {}  # by epoch; what was observed and is in no journal yet
        self._writing: asyncio.Task[None] | None = None
        self._counts.follow(lambda: registry, lambda: len(rooms))

    async def restore(self) -> Kept:
        """Take back what the journal kept, before the first request; what other books have in it is returned.

        Not rows and rooms: whoever held on to a million rooms would hold them twice, in 120 MB.
        """
        kept, now = await self._journal.load(), self._clock()
        self._registry.restore(kept.records, kept.last_epoch or self._first_epoch, kept.revision, now)
        try:
            for room, dp_rank in kept.rooms:
                self._rooms.put(room, dp_rank, now)
        except LimitReached as error:
            log.warning("rooms of the journal left out", kept=len(self._rooms), detail=str(error))
        if self._shared is not None:
            self._registry.is_held = self._shared.is_held
            self._shared.subscribe(self._learn, self._pulse)
        if kept.records or kept.rooms:
            seats = sum(len(view.alive) for view in self._registry)
            log.info("restored from the journal", seats=seats, rooms=len(self._rooms), revision=kept.revision)
        return replace(kept, records=(), rooms=())

    # Commands: journalled before they are answered

    async def register(self, claim: Claim) -> Life:
        """Return when the claim holds and is journalled.

        Raises BadField, Refused, Occupied, LimitReached, TooLarge, JournalUnavailable.
        """
        check_advertised(claim.address, claim.owner.host)
        known = self._registry.repeats(claim)
        if known is not None:
            return await self.renew(claim.instance, claim.seat, known.epoch, claim.owner)
        decide: Decide[Life] = lambda registry, now: registry.claim(claim, now)  # noqa: E731
        return await self._command(decide)

    def heard(self, claim: Claim) -> bool:
        """Whether its life has said this before, word for word, so that nothing is left to do: it has been heard.

        `register` in a word, for the many repetitions of those who cannot know that they are known.
        """
        known = self._registry.repeats(claim)
        if known is None or known.is_draining or known.pulse.suspected:
            return False
        self._registry.hear(claim.instance, claim.seat, known.epoch, claim.owner, self._clock())
        self._heard(known)
        return True

    def offer(self, claim: Claim, told: Told) -> None:
        """`register` without a task that waits: what it would raise later, `told` is called with.

        Raises BadField.
        """
        check_advertised(claim.address, claim.owner.host)
        known = self._registry.repeats(claim)
        if known is None:
            self._commands.append(Offered(lambda registry, now: registry.claim(claim, now), told))
            self._write_soon()
        elif self.heard(claim):
            told(None)
        else:
            place = claim.instance, claim.seat, known.epoch, claim.owner
            self._note(Offered(lambda registry, now: registry.renew(*place, now), told))

    async def renew(self, instance: str, seat: Seat, epoch: int, owner: Owner | None, rooms: int | None = None) -> Life:
        """The life goes on, whatever the disk does. `rooms` as in the registry.

        Raises UnknownLease, Superseded, Occupied; JournalUnavailable for the end of a drain only.
        """
        life = self._registry.hear(instance, seat, epoch, owner, self._clock())
        self._heard(life)
        is_drained = life.is_draining and rooms == 0
        if not is_drained and not life.pulse.suspected:
            return life
        decide: Decide[Life] = lambda registry, now: registry.renew(instance, seat, epoch, owner, now, rooms)  # noqa: E731
        return await (self._command(decide) if is_drained else self._observe(decide))

    async def leave(self, instance: str, seat: Seat, epoch: int | None = None, owner: Owner | None = None) -> None:
        """A goodbye. Raises UnknownLease, Superseded, Occupied, JournalUnavailable."""
        await self._command(lambda registry, now: (None, registry.leave(instance, seat, epoch, owner, now)))

    async def drain(self, instance: str, seat: Seat | None, grace_s: float, owner: Owner | None = None) -> None:
        """Nothing new for the rank, or the instance. Raises UnknownLease, Occupied, JournalUnavailable."""
        await self._command(lambda registry, now: (None, registry.drain(instance, seat, grace_s, now, owner)))

    async def drained(self, instance: str, epochs: Collection[int]) -> None:
        """These have nothing under way any more, so that their drain is over. Raises JournalUnavailable."""
        await self._command(lambda registry, now: (None, registry.drained(instance, epochs, now)))

    async def announce_room(self, room: int, dp_rank: int) -> None:
        """Raises LimitReached, JournalUnavailable."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.offer_room(room, dp_rank, partial(settle, done))
        await done

    def offer_room(self, room: int, dp_rank: int, told: Told) -> None:
        """`announce_room` without a task that waits. Raises LimitReached."""
        self._rooms.check_place(room, self._clock())
        self._new_rooms.append(((room, dp_rank), told))
        self._write_soon()

    # Other registries over the same journal

    def _learn(self, learned: Learned) -> None:
        """What another has decided, in its turn among what is decided here."""
        self._learned.append(learned)
        if self._writing is None:
            self._take_note()

    def _take_learned(self) -> None:
        learned, self._learned = self._learned, []
        for news in learned:
            records = {name: [self._as_observed(each) for each in kept] for name, kept in news.records.items()}
            words = {word.epoch: word.why for word in news.words if word.why is not None}
            changes = self._registry.learn(records, words, news.last_epoch, self._clock())
            self._take_rooms((room, _tell_nobody) for room in news.rooms)
            for hear in self._note_hearers:
                hear(news.notes)
            self.herald.tell(changes)

    def _as_observed(self, record: Record) -> Record:
        """What was seen here and is not written yet is as true as it was."""
        change = self._unwritten.get(record.epoch)
        return record if change is None or change.is_dropped else change.record

    def _pulse(self, record: Record, over_in_s: float | None) -> None:
        """Whether any registry has heard the life."""
        claim, now = record.claim, self._clock()
        if over_in_s is None:
            self.herald.tell(self._registry.heard_elsewhere(claim.instance, claim.seat, record.epoch, now))
        else:
            self.herald.tell(self._registry.silent(claim.instance, claim.seat, record.epoch, now + over_in_s))

    def _heard(self, life: Life) -> None:
        if self._shared is not None and life.ttl_s is not None:
            self._shared.heard(life.epoch)

    # Observations: they hold at once

    async def witnessed(self, instance: str, seat: Seat, epoch: int, alive: bool, why: str | None = None) -> None:
        """A witness's verdict on a stock rank's life; late news is no news."""
        await self._observe(lambda registry, now: (None, registry.witnessed(instance, seat, epoch, alive, why, now)))

    async def sweep(self) -> NoReturn:
        """End what time has ended, a slice at a time; until cancelled."""
        while True:
            settled = self._rooms.expire(self._clock(), SWEEP_BUDGET)
            if self._registry.next_deadline <= self._clock() or self._registry.full or self._unwritten:
                await self._observe(self._end)
            if settled == SWEEP_BUDGET:
                await asyncio.sleep(SWEEP_REST_S)
            else:
                await asyncio.sleep(min(SWEEP_EVERY_S, max(0.0, self._registry.next_deadline - self._clock())))

    async def listen(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> NoReturn:
        """Notice when nobody has been listened to, and begin the leases anew that it endangers; until cancelled."""
        while True:
            wait_s = rest_s(self._registry.shortest_ttl_s)
            self._attention.rests(self._clock(), wait_s)
            await sleep(wait_s)
            missed_s = self._attention.missed_s(self._clock())
            if self._registry.forgive(self._clock(), missed_s):  # pulses alone, so that no group need be waited for
                tell = log.warning if missed_s > STALLED_S else log.info
                tell(
                    "the loop was stalled: leases begin anew",
                    up_to_s=round(missed_s * SHARE, 1),
                    stalled_s=round(missed_s, 2),
                )

    def _end(self, registry: Registry, now: float) -> tuple[None, list[Change]]:
        """What is over; but first see to it that somebody was listening: the loop may have been stopped just now."""
        registry.forgive(now, self._attention.missed_s(now))
        return None, registry.tick(now, TICK_BUDGET)

    # Reading

    @property
    def revision(self) -> int:
        """Rises with every change of any instance: what was read at a revision is true as long as it stands."""
        return self._registry.revision

    @property
    def n_rooms(self) -> int:
        return len(self._rooms)

    def topology(self, instance: str) -> InstanceView:
        """The instance, complete. Raises NotReady."""
        view = self._ready(Lookup.TOPOLOGY, instance)
        self._counts.looked_up(Lookup.TOPOLOGY, Found.SERVED)
        return view

    def rank(self, instance: str, seat: Seat) -> Endpoint | None:
        """Where the rank listens, None for a seat that the instance does not have. Raises NotReady."""
        life = self._ready(Lookup.RANK, instance).alive.get(seat)
        self._counts.looked_up(Lookup.RANK, Found.SERVED if life else Found.UNKNOWN)
        return life.address if life else None

    def answered_again(self, what: Lookup) -> None:
        """A dialect has given an answer of this revision again, without asking."""
        self._counts.looked_up(what, Found.SERVED)

    def rooms(self, rooms: Sequence[int]) -> dict[int, int]:
        """DP rank by room; unknown ones are absent."""
        found = self._rooms.get(rooms, self._clock())
        self._counts.looked_up(Lookup.ROOM, Found.SERVED, len(found))
        self._counts.looked_up(Lookup.ROOM, Found.UNKNOWN, len(rooms) - len(found))
        return found

    def view(self, instance: str) -> InstanceView | None:
        """What is known of an instance, complete or not."""
        return self._registry.view(instance)

    def views(self) -> Iterable[InstanceView]:
        return self._registry

    def health(self, instance: str) -> str | None:
        """Why the instance is known to be dead; None while it lives, is starting, or was never heard of."""
        view = self._registry.view(instance)
        return None if view is None else view.health(self._clock())

    def now(self) -> float:
        return self._clock()

    @property
    def trouble(self) -> str | None:
        """Why the journal takes no rows; None while it does."""
        return self._journal.trouble

    def age_s(self, since: float) -> float:
        return self._clock() - since

    def unready(self) -> list[str]:
        """Why new registrations are refused at present."""
        trouble = self._journal.trouble
        return ([f"the journal takes no rows: {trouble}"] if trouble else []) + self._registry.full

    def subscribe_notes(self, hear: Callable[[Sequence[Note]], None]) -> None:
        """Call `hear` with what other registries have put into the other wires' books."""
        self._note_hearers.append(hear)

    @property
    def copy_age_s(self) -> float:
        """How old what is read here may be, at most; 0 for a registry that decides alone."""
        return 0.0 if self._shared is None else self._shared.age_s

    def number(self, tell: Callable[[int], None]) -> None:
        """Give a change of another book a revision, in its turn among those of the registry; nobody waits for it."""

        def decide(registry: Registry, now: float) -> tuple[None, list[Change]]:  # noqa: ARG001
            tell(registry.number())
            return None, []

        self._observations.append(Waiting(decide))
        if self._writing is None:
            self._take_note()

    # How it is done

    async def _command(self, decide: Decide[T]) -> T:
        waiting = Waiting(decide)
        self._commands.append(waiting)
        self._write_soon()
        return await waiting

    async def _observe(self, decide: Decide[T]) -> T:
        waiting = Waiting(decide)
        self._note(waiting)
        return await waiting

    def _note(self, waiting: Command) -> None:
        self._observations.append(waiting)
        if self._writing is None:
            self._take_note()
        if self._unwritten:
            self._write_soon()

    def _write_soon(self) -> None:
        if self._writing is None:
            self._writing = asyncio.create_task(self._write(), name="registry writer")

    async def _write(self) -> None:
        """Group after group, until nobody waits."""
        try:
            while True:
                self._take_note()
                await self._write_group()
                if not (self._commands or self._new_rooms or self._observations or self._learned):
                    return
        finally:
            self._writing = None

    def _take_note(self) -> None:
        """What was observed holds."""
        self._take_learned()
        observed, self._observations = self._observations, []
        for waiting in observed:
            changes = decided(waiting, self._registry, self._clock())
            waiting.tell()
            for change in changes:
                if change.is_kept:
                    self._unwritten.pop(change.life.epoch, None)
                    self._unwritten[change.life.epoch] = change
            self.herald.tell(changes)

    async def _write_group(self) -> None:
        """What was asked for holds, or nothing of it does."""
        limit = None if self._shared is None else self._shared.group_limit // 2
        commands, self._commands = self._commands[:limit], self._commands[limit or len(self._commands) :]
        rooms, self._new_rooms = self._new_rooms, []
        observed, draft = list(self._unwritten.values())[:limit], self._registry.draft()
        try:
            changes = [change for waiting in commands for change in decided(waiting, draft, self._clock())]
            kept = [change for change in (*observed, *changes) if change.is_kept]
            if kept or rooms:
                await self._journal.append(kept, [room for room, _ in rooms])
        except Behind as error:
            self._registry.skip(draft)
            self._decide_again(commands, rooms, error)
            return
        except BaseException as error:
            self._registry.skip(draft)
            for waiting in commands:  # the refused ones too: it may have been for what has not happened
                waiting.fail(error)
            for _, told in rooms:
                told(error)
            if not isinstance(error, Exception):  # a defect is told to all who wait, and the next group is tried
                raise
            return
        self._n_behind = 0
        for change in observed:  # nothing is observed while a group is under way
            del self._unwritten[change.life.epoch]
        self._registry.adopt(draft)
        self.herald.tell(changes)
        for waiting in commands:
            waiting.tell()
        self._take_rooms(rooms)

    def _decide_again(self, commands: Sequence[Command], rooms: Sequence[tuple[Room, Told]], error: Behind) -> None:
        """Another registry was faster, and what it has written is taken note of first."""
        self._n_behind += 1
        if self._n_behind <= MOST_BEHIND:
            self._commands[:0] = commands
            self._new_rooms[:0] = rooms
            return
        self._n_behind = 0
        for waiting in commands:
            waiting.fail(error)
        for _, told in rooms:
            told(error)

    def _take_rooms(self, rooms: Iterable[tuple[Room, Told]]) -> None:
        now = self._clock()
        for (room, dp_rank), told in rooms:
            try:
                self._rooms.put(room, dp_rank, now)
            except LimitReached as error:  # taken by another of the same group
                told(error)
            else:
                told(None)

    def _ready(self, what: Lookup, instance: str) -> InstanceView:
        view = self._registry.view(instance)
        if view is None or not view.ready:
            self._counts.looked_up(what, Found.NOT_READY)
            held = len(view.alive) if view else 0
            raise NotReady(f"Prefill server not fully registered yet ({held} workers registered).")
        if view.role != PREFILL:
            self._counts.looked_up(what, Found.NOT_READY)
            raise NotReady(f"instance {instance} serves as {view.role} and prefills nothing: ask for another")
        if view.draining:
            self._counts.looked_up(what, Found.NOT_READY)
            raise NotReady(f"instance {instance} is draining and takes no new pairs: ask for another")
        return view


def _tell_nobody(error: BaseException | None) -> None:
    """A room that another registry has taken, and that is too many here."""
