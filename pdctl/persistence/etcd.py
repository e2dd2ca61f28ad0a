"""
The journal in etcd: `--journal etcd://HOST:PORT[,HOST:PORT...][?prefix=NAME]`, for several registries that are one.

    append ─> one transaction on condition that the head is the one that this writer knows ─> the watch brings it back
    others' ─> the watch ─> `hear`, in the order in which they hold

    PREFIX/head               who wrote last, and what was done; last in its transaction, so that a group is whole
    PREFIX/instances/NAME     the rows of all that is kept of an instance, compressed where they are many
    PREFIX/pulses/EPOCH       that a rank's lease has been renewed, under that lease (etcd_leases)
    PREFIX/rooms/WRITER/N     a group of rooms, under a lease of their own
    PREFIX/notes/BOOK/KEY     a row of another wire's book

The head orders all groups of all writers: whoever decided on an older one is told so (Behind), and nothing is written.
What is known here has come by listing and watch, own groups as well, so that there is one way in. A call that got no
answer may have been done: `append` refuses, and what was done after all is heard like another's.

Once a second a majority is asked for the head. That tells how old the copy may be, and finds a watch that has gone
silent. Everything is listed anew after any trouble, and what differs is told.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from secrets import token_hex
from typing import Any, Final, NoReturn, TypeVar
from zlib import crc32

import structlog

from pdctl.core.lives import Change, Record
from pdctl.counts.registry import JournalMetrics
from pdctl.errors import Behind, JournalUnavailable, JournalUnusable, Unreachable
from pdctl.persistence.base import Kept, Learned, Note, Room, Word
from pdctl.persistence.etcd_leases import AGAIN, Pulses
from pdctl.persistence.etcd_place import EtcdPlace, EtcdSettings
from pdctl.persistence.etcd_wire import (
    Compacted,
    Delete,
    Etcd,
    KeyValue,
    Listing,
    Op,
    Put,
    open_etcd,
)
from pdctl.persistence.rows import Row, Unsound, decoded, encoded
from pdctl.retry import deciding, retrying

GROUP_LIMIT: Final = 100
"""Instances that one transaction may touch: etcd takes 128 operations (--max-txn-ops), and the head is one."""

START_S: Final = 30.0
BEAT_S: Final = 1.0
SILENT_S: Final = 3.0
"""A watch that is behind the head for so long is silent; and so long without an answer is trouble."""

ROOM_LEASE_S: Final = 60.0
_PLAIN_NBYTES: Final = 32 << 10

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """The last group. `number`: the writer's own count of its groups; `count`: of all that there ever were."""

    writer: str
    number: int
    count: int
    last_epoch: int
    revision: int
    words: tuple[Word, ...] = ()

    def to_bytes(self) -> bytes:
        words = [[word.kind, word.epoch, word.before, word.why] for word in self.words]
        said = {"writer": self.writer, "n": self.number, "count": self.count, "epoch": self.last_epoch}
        said["revision"] = self.revision
        return json.dumps({**said, "words": words}, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, value: bytes) -> Head:
        """Raises Unsound."""
        try:
            said = json.loads(value)
            words = tuple(Word(*word) for word in said["words"])
            return cls(said["writer"], said["n"], said["count"], said["epoch"], said["revision"], words)
        except (ValueError, KeyError, TypeError) as error:
            raise Unsound(f"the head is not one that we wrote ({error})") from error


@dataclass(slots=True)
class _Copy:
    """What this writer knows. `written`: the head as etcd has it, None where there is none."""

    head: Head = field(default_factory=lambda: Head("", 0, 0, 0, 0))
    written: bytes | None = None
    rows: dict[str, dict[int, Row]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # by epoch, of what is in `rows`
    notes: dict[tuple[str, str], tuple[int, bytes]] = field(default_factory=dict)

    def put(self, name: str, rows: dict[int, Row]) -> None:
        """All rows of an instance; none where it is gone."""
        for epoch in self.rows.pop(name, {}):
            self.names.pop(epoch, None)
        if rows:
            self.rows[name] = rows
            self.names.update(dict.fromkeys(rows, name))


@dataclass(slots=True)
class _Group:
    """What the watch has brought of a group whose head has not come yet."""

    instances: dict[str, bytes | None] = field(default_factory=dict)
    notes: list[tuple[int, Note]] = field(default_factory=list)


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
        self._pulses = Pulses(etcd, place, clock, self._living)
        self._rooms_kept_s = rooms_kept_s
        self._clock = clock
        self._counts = metrics
        self._copy = _Copy()
        self._group = _Group()
        self._rooms: list[Room] = []
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
        for epoch, record in self._leased().items():
            pulse(record, None if epoch in self._pulses else record.claim.ttl_s)

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
        head = self._next_head(())
        ops = [self._note_op(note, head.count * GROUP_LIMIT + n) for n, note in enumerate(notes)]
        await self._commit_group(ops, head)

    async def load(self) -> Kept:
        """What was kept when it was last heard of."""
        copy = self._copy
        rows = [row for of_one in copy.rows.values() for row in of_one.values()]
        notes = sorted((at, *key, value) for key, (at, value) in copy.notes.items())
        records = sorted(self._decoded(rows), key=lambda record: record.epoch)
        kept_notes = tuple((book, key, value) for _, book, key, value in notes)
        return Kept(tuple(records), tuple(self._rooms), copy.head.last_epoch, copy.head.revision, kept_notes)

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
            await self._pulses.begin([record for record in kept.values() if _lives_by_lease(record)])
        except Unreachable as error:
            raise self._unavailable(str(error)) from error
        if self._n_foreign != decided_on:  # while this waited for its turn, or for its leases
            raise self._behind()
        touched = self._touched(changes)
        if len(touched) > GROUP_LIMIT:
            raise ValueError(f"{len(touched)} instances in one group: {GROUP_LIMIT} at most")
        await self._commit_group(
            [self._instance_op(name, rows) for name, rows in touched.items()], self._next_head(changes)
        )

    def _touched(self, changes: Sequence[Change]) -> dict[str, dict[int, Row]]:
        """Each instance's rows as they are after `changes`."""
        touched: dict[str, dict[int, Row]] = {}
        for change in changes:
            rows = touched.setdefault(change.instance, dict(self._copy.rows.get(change.instance, {})))
            if change.before is not None:
                rows.pop(change.before.epoch, None)
            if change.is_dropped:
                rows.pop(change.life.epoch, None)
            else:
                rows[change.life.epoch] = encoded(change.record)
        return touched

    def _next_head(self, changes: Sequence[Change]) -> Head:
        self._number += 1
        last_epoch = max([self._copy.head.last_epoch, *(change.life.epoch for change in changes)])
        revision = max([self._copy.head.revision, *(change.revision for change in changes)])
        return Head(
            self.writer, self._number, self._copy.head.count + 1, last_epoch, revision, tuple(map(_word, changes))
        )

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
            value = json.dumps(rooms, separators=(",", ":")).encode()
            await self._etcd.commit([Put(self._place.key(f"rooms/{self.writer}/{self._n_room_groups}"), value, lease)])
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

    def _instance_op(self, name: str, rows: Mapping[int, Row]) -> Op:
        key = self._place.key(f"instances/{name}")
        return Put(key, _packed(rows.values())) if rows else Delete(key)

    def _note_op(self, note: Note, at: int) -> Op:
        """`at`: its place in the order of all notes, which etcd does not tell within one transaction."""
        book, key, value = note
        place = self._place.key(f"notes/{book}/{urlsafe_b64encode(key.encode()).decode()}")
        return Delete(place) if value is None else Put(place, f"{crc32(value)} {at} ".encode() + value)

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
            count = 0 if found is None else self._head(found).count
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
        head = Head("", 0, 0, 0, 0) if found is None else self._head(found)
        if head.count >= copy.head.count:
            return False
        known = None if found is None else found.value
        lost = copy.head.count - head.count
        log.error("ETCD HAS LOST ROWS: they are put back as they are known here", journal=str(self._place), groups=lost)
        strangers = [Delete(each.key) for each in listing.keys if self._is_stranger(each.key)]
        ops = [*strangers, *(self._instance_op(name, rows) for name, rows in copy.rows.items())]
        ops += [self._note_op((book, key, value), at) for (book, key), (at, value) in copy.notes.items()]
        for first in range(0, len(ops), GROUP_LIMIT):
            await self._etcd.commit(ops[first : first + GROUP_LIMIT], expected={key: known})
        self._number += 1
        again = Head(self.writer, self._number, copy.head.count + 1, copy.head.last_epoch, copy.head.revision)
        await self._etcd.commit([Put(key, again.to_bytes())], expected={key: known})
        return True

    def _is_stranger(self, key: str) -> bool:
        """Whether it holds rows of an instance, or a note, that is not known here."""
        name = self._place.name(key)
        if name.startswith("instances/"):
            return name.removeprefix("instances/") not in self._copy.rows
        return name.startswith("notes/") and self._sound(_note, name, None)[1][:2] not in self._copy.notes

    def _take_listing(self, listing: Listing) -> None:
        """What differs from what was known is told."""
        before, self._copy, self._group = self._copy, _Copy(), _Group()
        self._since = listing.revision + 1
        rooms: list[Room] = []
        notes: list[tuple[int, Note]] = []
        for found in listing.keys:
            name = self._place.name(found.key)
            value = found.value or b""
            if name == "head":
                self._copy.head, self._copy.written = self._head(found), value
            elif name.startswith("instances/"):
                self._copy.put(name.removeprefix("instances/"), self._sound(_unpacked, value))
            elif name.startswith("notes/"):
                notes.append(self._sound(_note, name, value))
            elif name.startswith("rooms/"):
                rooms += map(tuple, json.loads(value))
        for at, (book, key, kept) in sorted(notes, key=lambda note: note[0]):
            self._copy.notes[book, key] = at, kept or b""
        self._rooms = rooms
        if self._copy.head.writer == self.writer:
            self._came = self._copy.head.number
        if self._known.is_set():  # else `load` has it
            self._tell_differences(before, rooms)
        pulses = [found for found in listing.keys if found.key.startswith(self._place.key("pulses/"))]
        self._pulses.take_listing(pulses, self._leased())

    def _tell_differences(self, before: _Copy, rooms: Sequence[Room]) -> None:
        self._n_foreign += 1
        now = self._copy
        names = [name for name in {**before.rows, **now.rows} if before.rows.get(name) != now.rows.get(name)]
        notes: list[Note] = [
            (*key, value) for key, (at, value) in now.notes.items() if before.notes.get(key, (0, b""))[0] != at
        ]
        notes += [(*key, None) for key in before.notes if key not in now.notes]
        self._n_noted.update(book for book, _, _ in notes)
        self._tell(Learned({name: self._records(name) for name in names}, (), rooms, notes, now.head.last_epoch))

    def _take_event(self, event: KeyValue) -> None:
        name = self._place.name(event.key)
        if name == "head":
            self._take_head(event)
        elif name.startswith("instances/"):
            self._group.instances[name.removeprefix("instances/")] = event.value
        elif name.startswith("pulses/"):
            self._pulses.take_event(event)
        elif name.startswith("notes/"):
            self._group.notes.append(self._sound(_note, name, event.value))
        elif name.startswith("rooms/") and event.value is not None and not name.startswith(f"rooms/{self.writer}/"):
            self._tell(Learned(rooms=[tuple(room) for room in json.loads(event.value)]))

    def _take_head(self, event: KeyValue) -> None:
        """A group is whole."""
        group, self._group = self._group, _Group()
        if event.value is None:
            raise Unreachable("etcd's head is gone: somebody has emptied it")
        head, copy = self._head(event), self._copy
        copy.head, copy.written = head, event.value
        for name, value in group.instances.items():
            copy.put(name, {} if value is None else self._sound(_unpacked, value))
        for at, (book, key, noted) in group.notes:
            copy.notes.pop((book, key), None)
            if noted is not None:
                copy.notes[book, key] = at, noted
        if head.writer == self.writer:
            self._came = head.number
        if head.writer != self.writer or head.number != self._in_flight:  # an own one that was given up has come
            self._n_foreign += 1
            self._n_noted.update(note[0] for _, note in group.notes)
            records = {name: self._records(name) for name in group.instances}
            self._tell(Learned(records, head.words, (), [note for _, note in group.notes], head.last_epoch))

    def _leased(self) -> dict[int, Record]:
        """Whoever lives by a lease, by epoch."""
        records = (record for name in self._copy.rows for record in self._records(name))
        return {record.epoch: record for record in records if _lives_by_lease(record)}

    def _living(self, epoch: int) -> Record | None:
        name = self._copy.names.get(epoch)
        if name is None:
            return None
        (record,) = self._decoded([self._copy.rows[name][epoch]])
        return record if _lives_by_lease(record) else None

    def _head(self, found: KeyValue) -> Head:
        return self._sound(Head.from_bytes, found.value)

    def _records(self, name: str) -> list[Record]:
        return self._decoded(self._copy.rows.get(name, {}).values())

    def _decoded(self, rows: Iterable[Row]) -> list[Record]:
        return self._sound(decoded, list(rows), self._place)

    def _sound(self, read: Callable[..., T], *said: Any) -> T:
        """What `read` makes of it. Raises JournalUnusable."""
        try:
            return read(*said)
        except Unsound as error:
            raise JournalUnusable(f"journal {self._place} has been written by others than pdctl: {error}") from error

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


def _word(change: Change) -> Word:
    return Word(
        change.kind.value, change.life.epoch, None if change.before is None else change.before.epoch, change.why
    )


def _lives_by_lease(record: Record) -> bool:
    return record.claim.ttl_s is not None and record.lost is None


def _packed(rows: Iterable[Row]) -> bytes:
    """Rows of one instance differ in few places: a thousand of them are a few KB when compressed."""
    text = "\n".join(f"{epoch} {checksum} {text}" for epoch, checksum, text in rows).encode()
    return text if len(text) < _PLAIN_NBYTES else zlib.compress(text, 1)


def _unpacked(value: bytes) -> dict[int, Row]:
    """Raises Unsound."""
    try:
        text = value if value[:1].isdigit() else zlib.decompress(value)
        rows = [line.split(" ", 2) for line in text.decode().split("\n")]
        return {int(epoch): (int(epoch), int(checksum), text) for epoch, checksum, text in rows}
    except (ValueError, zlib.error) as error:
        raise Unsound(f"an instance's rows cannot be read ({error})") from error


def _note(name: str, value: bytes | None) -> tuple[int, Note]:
    """Its place in the order of all, 0 for one that is gone. Raises Unsound."""
    _, book, key = name.split("/", 2)
    try:
        text = urlsafe_b64decode(key).decode()
        if value is None:
            return 0, (book, text, None)
        checksum, at, kept = value.split(b" ", 2)
        if crc32(kept) != int(checksum):
            raise Unsound(f"the note {text!r} of {book} does not fit its checksum")
        return int(at), (book, text, kept)
    except ValueError as error:
        raise Unsound(f"the note {name} cannot be read ({error})") from error


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    return _first(group.exceptions[0]) if isinstance(group.exceptions[0], BaseExceptionGroup) else group.exceptions[0]
