"""
The journal in etcd: `--journal etcd://HOST:PORT[,HOST:PORT...][?prefix=NAME]`, for several registries that are one.

    append ─> one transaction on condition that the head is the one that this writer knows ─> the watch brings it back
    others' ─> the watch ─> `hear`, in the order in which they hold

    PREFIX/head               who wrote last, and what was done; last in its transaction, so that a group is whole
    PREFIX/instances/NAME     the rows of all that is kept of an instance, compressed where they are many
    PREFIX/pulses/EPOCH       that a rank's lease has been renewed, under that lease (etcd_leases)
    PREFIX/rooms/WRITER/N     a group of rooms, under a lease of their own
    PREFIX/notes/BOOK/KEY     a row of another wire's book
    PREFIX/replicas/WRITER    where that writer serves, under a lease (etcd_presence)

The head orders all groups of all writers: whoever decided on an older one is told so (Behind), and nothing is written.
What is known here has come by listing and watch, own groups as well, so that there is one way in. A call that got no
answer may have been done: `append` refuses, and what was done after all is heard like another's.

Once a second a majority is asked for the head. That tells how old the copy may be, and finds a watch that has gone
silent. Everything is listed anew after any trouble, and what differs is told.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from secrets import token_hex
from typing import Any, Final, NoReturn

import structlog

from pdctl.core.lives import Change, Record
from pdctl.counts.registry import JournalMetrics
from pdctl.errors import Behind, JournalUnavailable, JournalUnusable, Unreachable
from pdctl.persistence.base import Kept, Learned, Note, Room
from pdctl.persistence.etcd_copy import Copy, Head, lives_by_lease, rooms_in, rooms_to_bytes
from pdctl.persistence.etcd_leases import AGAIN, Pulses
from pdctl.persistence.etcd_place import EtcdPlace, EtcdSettings
from pdctl.persistence.etcd_presence import Presence
from pdctl.persistence.etcd_wire import (
    Compacted,
    Etcd,
    KeyValue,
    Listing,
    Op,
    Put,
    open_etcd,
)
from pdctl.retry import deciding, retrying

GROUP_LIMIT: Final = 100
"""Instances that one transaction may touch: etcd takes 128 operations (--max-txn-ops), and the head is one."""

START_S: Final = 30.0
BEAT_S: Final = 1.0
SILENT_S: Final = 3.0
"""A watch that is behind the head for so long is silent; and so long without an answer is trouble."""

ROOM_LEASE_S: Final = 60.0

log = structlog.get_logger(__name__)


@asynccontextmanager
async def open_etcd_journal(
    url: str, settings: EtcdSettings, *, rooms_kept_s: float, metrics: JournalMetrics | None = None
) -> AsyncIterator[EtcdJournal]:
    """The journal at `url`, known whole. Raises ConfigError, and JournalUnusable without etcd for START_S."""
    place = EtcdPlace.parse(url)
    async with open_etcd(place.endpoints, settings) as etcd:
        journal = EtcdJournal(etcd, place, rooms_kept_s=rooms_kept_s, metrics=metrics)
        try:
            await journal.start()
            yield journal
        finally:
            await journal.aclose()


class EtcdJournal:
    """One writer of several. `start` before anything else."""

    group_limit = GROUP_LIMIT

    def __init__(
        self,
        etcd: Etcd,
        place: EtcdPlace,
        *,
        rooms_kept_s: float,
        clock: Callable[[], float] = time.monotonic,
        metrics: JournalMetrics | None = None,
    ) -> None:
        self.writer = token_hex(8)
        self._etcd = etcd
        self._place = place
        self._pulses = Pulses(etcd, place, clock, lambda epoch: self._copy.living(epoch))
        self._presence = Presence(etcd, place, self.writer)
        self._rooms_kept_s = rooms_kept_s
        self._clock = clock
        self._counts = metrics
        self._copy = Copy(place)
        self._number = 0
        self._in_flight: int | None = None
        self._n_foreign = 0  # groups that were told, and listings
        self._n_noted: Counter[str] = Counter()  # the same of notes, by book
        self._came = 0  # the own group that has come back last
        self._since = 0
        self._moved = asyncio.Condition()
        self._turn = asyncio.Lock()
        self._hear: Callable[[Learned], None] | None = None
        self._known = asyncio.Event()
        self._fresh_at = -float("inf")
        self._behind_since: float | None = None
        self._room_lease: tuple[float, int] | None = None
        self._n_room_groups = 0
        self._closing = False
        self._cause: str | None = None
        self._tasks: list[asyncio.Task[NoReturn]] = []

    async def start(self) -> None:
        """Learn everything. Raises JournalUnusable."""
        self._tasks = [
            asyncio.create_task(self._follow(), name="etcd watch"),
            asyncio.create_task(self._pulses.run(), name="etcd leases"),
            asyncio.create_task(self._presence.run(), name="etcd presence"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._loop_ended)
        waiting = asyncio.create_task(self._known.wait())
        done, _ = await asyncio.wait({waiting, *self._tasks}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if waiting in done:
            if self._counts is not None:
                self._counts.follow(lambda: self.trouble is not None, lambda: self.age_s)
            return
        ended = self._tasks[0]
        await self.aclose()
        if ended in done and not ended.cancelled() and (error := ended.exception()) is not None:
            raise error
        raise JournalUnusable(f"journal {self._place} cannot be read for {START_S:g} s: {self._cause or 'no answer'}")

    def subscribe(self, hear: Callable[[Learned], None], pulse: Callable[[Record, float | None], None]) -> None:
        """As the port says."""
        self._hear = hear
        self._pulses.subscribe(pulse)
        for epoch, record in self._copy.leased().items():
            pulse(record, None if epoch in self._pulses else record.claim.ttl_s)

    def announce(self, url: str) -> None:
        """As the port says."""
        self._presence.announce(url)

    @property
    def others(self) -> Mapping[str, str]:
        """As the port says."""
        return self._presence.others

    def heard(self, epoch: int) -> None:
        """As the port says."""
        self._pulses.heard(epoch)

    def is_held(self, epoch: int) -> bool:
        """As the port says."""
        return epoch in self._pulses or self.age_s > SILENT_S

    @property
    def age_s(self) -> float:
        """How old what is known here may be, at most."""
        return self._clock() - self._fresh_at

    @property
    def trouble(self) -> str | None:
        """Why no rows are taken now; None while they are."""
        if self.age_s <= SILENT_S:
            return None
        return f"{self._place}: {self._cause or 'no majority has answered'}, for {self.age_s:.0f} s"

    async def append(self, changes: Sequence[Change], rooms: Sequence[Room] = ()) -> None:
        """As the port says; at most `group_limit` instances. Raises Behind, JournalUnavailable."""
        if not changes and not rooms:
            return
        decided_on = self._n_foreign
        async with self._turn:
            self._refuse_in_trouble()
            if rooms:
                await self._put_rooms(rooms)
            if changes:
                await self._put_changes(changes, decided_on)

    async def note(self, notes: Sequence[Note]) -> None:
        """As the port says. Raises Behind where others have written in the same books since it was called."""
        if not notes:
            return
        last = {(book, key): value for book, key, value in notes}
        order = list(dict.fromkeys(reversed([(book, key) for book, key, _ in notes])))[::-1]
        rows = [(book, key, last[book, key]) for book, key in order]
        books = {book for book, _, _ in rows}
        decided_on = self._noted(books)
        async with self._turn:
            for first in range(0, len(rows), GROUP_LIMIT):
                note = partial(self._note_group, rows[first : first + GROUP_LIMIT], books, decided_on)
                await deciding(note, still=lambda: self._noted(books) == decided_on)

    def _noted(self, books: Iterable[str]) -> int:
        """How much others have been heard to write in these books."""
        return sum(self._n_noted[book] for book in books)

    async def _note_group(self, notes: Sequence[Note], books: Iterable[str], decided_on: int) -> None:
        self._refuse_in_trouble()
        if self._noted(books) != decided_on:
            raise self._behind()
        head = self._next_head()
        ops = [self._copy.note_op(note, head.count * GROUP_LIMIT + n) for n, note in enumerate(notes)]
        await self._commit_group(ops, head)

    async def load(self) -> Kept:
        """What was kept when it was last heard of."""
        return self._copy.kept()

    async def aclose(self) -> None:
        """Let go of the watch."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --- writing

    async def _put_changes(self, changes: Sequence[Change], decided_on: int) -> None:
        """`decided_on`: how many groups of others were known when the changes were decided."""
        kept = {change.life.epoch: change.record for change in changes if not change.is_dropped}
        try:
            await self._pulses.begin([record for record in kept.values() if lives_by_lease(record)])
        except Unreachable as error:
            raise self._unavailable(str(error)) from error
        if self._n_foreign != decided_on:  # while this waited for its turn, or for its leases
            raise self._behind()
        touched = self._copy.touched(changes)
        if len(touched) > GROUP_LIMIT:
            raise ValueError(f"{len(touched)} instances in one group: {GROUP_LIMIT} at most")
        ops = [self._copy.instance_op(name, rows) for name, rows in touched.items()]
        await self._commit_group(ops, self._next_head(changes))

    def _next_head(self, changes: Sequence[Change] = ()) -> Head:
        self._number += 1
        return self._copy.head.next(self.writer, self._number, changes)

    async def _commit_group(self, ops: Sequence[Op], head: Head) -> None:
        """On condition that nobody has written since; returns when the watch has brought it back."""
        began, self._in_flight = self._clock(), head.number
        try:
            await self._committed([*ops, Put(self._place.key("head"), head.to_bytes())], head)
        except JournalUnavailable as error:
            if self._counts is not None and not isinstance(error, Behind):
                self._counts.failed()
            raise
        finally:
            self._in_flight = None
        if self._counts is not None:
            self._counts.committed(self._clock() - began)

    def _behind(self) -> Behind:
        if self._counts is not None:
            self._counts.behind()
        return Behind()

    async def _committed(self, ops: Sequence[Op], head: Head) -> None:
        known = self._copy.written
        try:
            is_done = await self._etcd.commit(ops, expected={self._place.key("head"): known})
        except Unreachable as error:
            if not await self._wait(lambda: self._came == head.number, BEAT_S):
                raise self._unavailable(str(error)) from error
            return
        if not is_done:
            await self._wait(lambda: self._copy.written != known, SILENT_S)
            raise self._behind()
        if not await self._wait(lambda: self._came == head.number, SILENT_S):
            raise self._unavailable("the watch has not brought back what was written")

    async def _wait(self, until: Callable[[], bool], within_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s), self._moved:
                await self._moved.wait_for(until)
        return until()

    async def _put_rooms(self, rooms: Sequence[Room]) -> None:
        """A key for the group; they are read here and nowhere else by who holds them in a book of its own already."""
        try:
            lease = await self._lease_for_rooms()
            self._n_room_groups += 1
            key = self._place.key(f"rooms/{self.writer}/{self._n_room_groups}")
            await self._etcd.commit([Put(key, rooms_to_bytes(rooms), lease)])
        except Unreachable as error:
            if self._counts is not None:
                self._counts.failed()
            raise self._unavailable(str(error)) from error

    async def _lease_for_rooms(self) -> int:
        """One for all that come within ROOM_LEASE_S, so that a room costs no lease of its own."""
        now = self._clock()
        if self._room_lease is None or now - self._room_lease[0] >= ROOM_LEASE_S:
            self._room_lease = now, await self._etcd.grant(round(self._rooms_kept_s + ROOM_LEASE_S))
        return self._room_lease[1]

    # --- reading

    async def _follow(self) -> NoReturn:
        """List, watch, and do it again after any trouble; until cancelled."""
        while True:
            await retrying(AGAIN, self._listed, on_failure=lambda failure: self._note_trouble(str(failure.error)))
            with suppress(Unreachable, Compacted):
                try:
                    await self._watch()
                except* (Unreachable, Compacted) as group:
                    self._note_trouble(str(_first(group)))
            if self._closing:  # a group whose task fails at that moment has kept the cancellation to itself
                raise asyncio.CancelledError

    async def _listed(self) -> None:
        began = self._clock()
        listing = await self._etcd.everything(f"{self._place.prefix}/")
        if await self._put_back(listing):
            listing = await self._etcd.everything(f"{self._place.prefix}/")
        self._take_listing(listing)
        self._fresh_at, self._behind_since = began, None
        if self._cause is not None:
            log.info("etcd answers again", journal=str(self._place))
            self._cause = None
        self._known.set()
        await self._tell_moved()

    async def _watch(self) -> None:
        async with self._etcd.watch(f"{self._place.prefix}/", self._since) as watch, asyncio.TaskGroup() as both:
            both.create_task(self._beat())
            while True:
                for event in await watch.news():
                    self._take_event(event)
                await self._tell_moved()

    async def _beat(self) -> NoReturn:
        """Ask a majority how far it is; raises Unreachable where the watch has not followed."""
        while True:
            asked, known = self._clock(), self._copy.head.count
            found = await self._etcd.get(self._place.key("head"))
            count = 0 if found is None else self._copy.head_in(found).count
            if count < known:  # and not below what has come since it was asked
                raise Unreachable("etcd has lost rows: everything is read anew")
            if count <= self._copy.head.count:
                self._fresh_at, self._behind_since = asked, None
            else:
                self._behind_since = self._behind_since or asked
                if asked - self._behind_since > SILENT_S:
                    raise Unreachable("etcd's watch has gone silent: everything is read anew")
            await asyncio.sleep(BEAT_S)

    async def _put_back(self, listing: Listing) -> bool:
        """Whether etcd had lost groups that are known here, and has them again: a wiped disk, an old backup.

        Whoever knows the most groups has the last word, whichever of several writers comes first.
        """
        copy, key = self._copy, self._place.key("head")
        found = next((found for found in listing.keys if found.key == key), None)
        head = Head() if found is None else copy.head_in(found)
        if head.count >= copy.head.count:
            return False
        known = None if found is None else found.value
        lost = copy.head.count - head.count
        log.error("ETCD HAS LOST ROWS: they are put back as they are known here", journal=str(self._place), groups=lost)
        ops = copy.ops_to_restore(listing)
        for first in range(0, len(ops), GROUP_LIMIT):
            await self._etcd.commit(ops[first : first + GROUP_LIMIT], expected={key: known})
        await self._etcd.commit([Put(key, self._next_head().to_bytes())], expected={key: known})
        return True

    def _take_listing(self, listing: Listing) -> None:
        """What differs from what was known is told."""
        before, self._copy = self._copy, Copy.listed(self._place, listing)
        self._since = listing.revision + 1
        if self._copy.head.writer == self.writer:
            self._came = self._copy.head.number
        if self._known.is_set():  # else `load` has it
            self._learn(self._copy.since(before))
        pulses, present = (
            [found for found in listing.keys if found.key.startswith(self._place.key(kind))]
            for kind in ("pulses/", "replicas/")
        )
        self._pulses.take_listing(pulses, self._copy.leased())
        self._presence.take_listing(present)

    def _take_event(self, event: KeyValue) -> None:
        name = self._place.name(event.key)
        if name == "head":
            self._take_head(event)
        elif name.startswith("pulses/"):
            self._pulses.take_event(event)
        elif name.startswith("replicas/"):
            self._presence.take_event(event)
        elif not name.startswith("rooms/"):
            self._copy.take(name, event.value)
        elif event.value is not None and not name.startswith(f"rooms/{self.writer}/"):
            self._tell(Learned(rooms=rooms_in(event.value)))

    def _take_head(self, event: KeyValue) -> None:
        """A group is whole."""
        if event.value is None:
            raise Unreachable("etcd's head is gone: somebody has emptied it")
        group, head = self._copy.take_head(event), self._copy.head
        if head.writer == self.writer:
            self._came = head.number
        if head.writer != self.writer or head.number != self._in_flight:  # an own one that was given up has come
            self._learn(self._copy.learned(group))

    def _learn(self, learned: Learned) -> None:
        """Others have written, or may have."""
        self._n_foreign += 1
        self._n_noted.update(book for book, _, _ in learned.notes)
        self._tell(learned)

    def _tell(self, learned: Learned) -> None:
        if self._hear is not None:
            self._hear(learned)

    async def _tell_moved(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    # --- trouble

    def _loop_ended(self, loop: asyncio.Task[NoReturn]) -> None:
        """Unless it was told to: rows that this version does not read, or a defect. What is known grows old now."""
        if not self._closing:
            error = None if loop.cancelled() else loop.exception()
            why = _first(error) if isinstance(error, BaseExceptionGroup) else error
            self._cause = f"its {loop.get_name()} has ended ({why}): restart this registry"
            log.error("a loop of the journal has ended", journal=str(self._place), cause=self._cause)

    def _note_trouble(self, cause: str) -> None:
        if self._cause is None:
            log.warning("etcd does not answer", journal=str(self._place), cause=cause)
        self._cause = cause

    def _refuse_in_trouble(self) -> None:
        if self._closing:
            raise JournalUnavailable("the journal is closing: ask again", cause="closing")
        if (trouble := self.trouble) is not None:
            raise self._unavailable(trouble)

    def _unavailable(self, cause: str) -> JournalUnavailable:
        return JournalUnavailable(f"the journal takes no rows ({cause}): ask again", cause=cause)


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    return _first(group.exceptions[0]) if isinstance(group.exceptions[0], BaseExceptionGroup) else group.exceptions[0]
