"""
What a writer knows of the journal in etcd, and what etcd's keys hold: bytes in and out.

    a listing ─> a new copy; what it has that an older one had not is told
    events ─> a group, which holds when its head has come

Asks etcd nothing, and writes nothing: says which operations would. Bytes that we cannot have written are
JournalUnusable.
"""

from __future__ import annotations

import json
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from zlib import crc32

from pdctl.core.lives import Change, Record
from pdctl.errors import JournalUnusable
from pdctl.persistence.base import Kept, Learned, Note, Room, Word
from pdctl.persistence.etcd_place import EtcdPlace
from pdctl.persistence.etcd_wire import Delete, KeyValue, Listing, Op, Put
from pdctl.persistence.rows import Row, Unsound, decoded, encoded

_PLAIN_NBYTES: Final = 32 << 10

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Head:
    """The last group. `number`: the writer's own count of its groups; `count`: of all that there ever were."""

    writer: str = ""
    number: int = 0
    count: int = 0
    last_epoch: int = 0
    revision: int = 0
    words: tuple[Word, ...] = ()

    def next(self, writer: str, number: int, changes: Sequence[Change] = ()) -> Head:
        """Of the group that follows."""
        last_epoch = max([self.last_epoch, *(change.life.epoch for change in changes)])
        revision = max([self.revision, *(change.revision for change in changes)])
        return Head(writer, number, self.count + 1, last_epoch, revision, tuple(map(_word, changes)))

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
class Group:
    """What the watch has brought of a group whose head has not come yet."""

    instances: dict[str, bytes | None] = field(default_factory=dict)
    notes: list[tuple[int, Note]] = field(default_factory=list)


class Copy:
    """`head` and `rooms` as they were listed or have come; `written`: the head's bytes, None where there is none."""

    def __init__(self, place: EtcdPlace) -> None:
        self.head = Head()
        self.written: bytes | None = None
        self.rooms: list[Room] = []
        self._place = place
        self._rows: dict[str, dict[int, Row]] = {}
        self._names: dict[int, str] = {}  # by epoch, of what is in `_rows`
        self._notes: dict[tuple[str, str], tuple[int, bytes]] = {}
        self._group = Group()

    # What etcd says

    @classmethod
    def listed(cls, place: EtcdPlace, listing: Listing) -> Copy:
        copy = cls(place)
        notes: list[tuple[int, Note]] = []
        for found in listing.keys:
            name, value = place.name(found.key), found.value or b""
            if name == "head":
                copy.head, copy.written = copy.head_in(found), value
            elif name.startswith("instances/"):
                copy._put(name.removeprefix("instances/"), copy._sound(_unpacked, value))
            elif name.startswith("notes/"):
                notes.append(copy._sound(_note, name, value))
            elif name.startswith("rooms/"):
                copy.rooms += rooms_in(value)
        for at, (book, key, kept) in sorted(notes, key=lambda note: note[0]):
            copy._notes[book, key] = at, kept or b""
        return copy

    def take(self, name: str, value: bytes | None) -> None:
        """Part of a group."""
        if name.startswith("instances/"):
            self._group.instances[name.removeprefix("instances/")] = value
        elif name.startswith("notes/"):
            self._group.notes.append(self._sound(_note, name, value))

    def take_head(self, event: KeyValue) -> Group:
        """A group is whole: this one."""
        group, self._group = self._group, Group()
        self.head, self.written = self.head_in(event), event.value
        for name, value in group.instances.items():
            self._put(name, {} if value is None else self._sound(_unpacked, value))
        for at, (book, key, noted) in group.notes:
            self._notes.pop((book, key), None)
            if noted is not None:
                self._notes[book, key] = at, noted
        return group

    def head_in(self, found: KeyValue) -> Head:
        return self._sound(Head.from_bytes, found.value)

    def _put(self, name: str, rows: dict[int, Row]) -> None:
        """All rows of an instance; none where it is gone."""
        for epoch in self._rows.pop(name, {}):
            self._names.pop(epoch, None)
        if rows:
            self._rows[name] = rows
            self._names.update(dict.fromkeys(rows, name))

    # What it means

    def kept(self) -> Kept:
        rows = [row for of_one in self._rows.values() for row in of_one.values()]
        notes = sorted((at, *key, value) for key, (at, value) in self._notes.items())
        records = sorted(self._decoded(rows), key=lambda record: record.epoch)
        kept_notes = tuple((book, key, value) for _, book, key, value in notes)
        return Kept(tuple(records), tuple(self.rooms), self.head.last_epoch, self.head.revision, kept_notes)

    def learned(self, group: Group) -> Learned:
        """What the group that has just come tells."""
        records = {name: self._records(name) for name in group.instances}
        return Learned(records, self.head.words, (), [note for _, note in group.notes], self.head.last_epoch)

    def since(self, before: Copy) -> Learned:
        """What differs from an older copy, and all rooms."""
        names = [name for name in {**before._rows, **self._rows} if before._rows.get(name) != self._rows.get(name)]
        notes: list[Note] = [
            (*key, value) for key, (at, value) in self._notes.items() if before._notes.get(key, (0, b""))[0] != at
        ]
        notes += [(*key, None) for key in before._notes if key not in self._notes]
        return Learned({name: self._records(name) for name in names}, (), self.rooms, notes, self.head.last_epoch)

    def leased(self) -> dict[int, Record]:
        """Whoever lives by a lease, by epoch."""
        records = (record for name in self._rows for record in self._records(name))
        return {record.epoch: record for record in records if lives_by_lease(record)}

    def living(self, epoch: int) -> Record | None:
        """Who lives by a lease with that epoch."""
        name = self._names.get(epoch)
        if name is None:
            return None
        (record,) = self._decoded([self._rows[name][epoch]])
        return record if lives_by_lease(record) else None

    def _records(self, name: str) -> list[Record]:
        return self._decoded(self._rows.get(name, {}).values())

    def _decoded(self, rows: Iterable[Row]) -> list[Record]:
        return self._sound(decoded, list(rows), self._place)

    def _sound(self, read: Callable[..., T], *said: Any) -> T:
        """What `read` makes of it. Raises JournalUnusable."""
        try:
            return read(*said)
        except Unsound as error:
            raise JournalUnusable(f"journal {self._place} has been written by others than pdctl: {error}") from error

    # What would be written

    def touched(self, changes: Sequence[Change]) -> dict[str, dict[int, Row]]:
        """Each instance's rows as they are after `changes`."""
        touched: dict[str, dict[int, Row]] = {}
        for change in changes:
            rows = touched.setdefault(change.instance, dict(self._rows.get(change.instance, {})))
            if change.before is not None:
                rows.pop(change.before.epoch, None)
            if change.is_dropped:
                rows.pop(change.life.epoch, None)
            else:
                rows[change.life.epoch] = encoded(change.record)
        return touched

    def instance_op(self, name: str, rows: Mapping[int, Row]) -> Op:
        key = self._place.key(f"instances/{name}")
        return Put(key, _packed(rows.values())) if rows else Delete(key)

    def note_op(self, note: Note, at: int) -> Op:
        """`at`: its place in the order of all notes, which etcd does not tell within one transaction."""
        book, key, value = note
        place = self._place.key(f"notes/{book}/{urlsafe_b64encode(key.encode()).decode()}")
        return Delete(place) if value is None else Put(place, f"{crc32(value)} {at} ".encode() + value)

    def ops_to_restore(self, listing: Listing) -> list[Op]:
        """What makes of what is listed what is known here."""
        ops: list[Op] = [Delete(each.key) for each in listing.keys if self._is_stranger(each.key)]
        ops += [self.instance_op(name, rows) for name, rows in self._rows.items()]
        return ops + [self.note_op((book, key, value), at) for (book, key), (at, value) in self._notes.items()]

    def _is_stranger(self, key: str) -> bool:
        """Whether it holds rows of an instance, or a note, that is not known here."""
        name = self._place.name(key)
        if name.startswith("instances/"):
            return name.removeprefix("instances/") not in self._rows
        return name.startswith("notes/") and self._sound(_note, name, None)[1][:2] not in self._notes


def rooms_in(value: bytes) -> list[Room]:
    return [(room, dp_rank) for room, dp_rank in json.loads(value)]


def rooms_to_bytes(rooms: Sequence[Room]) -> bytes:
    return json.dumps(rooms, separators=(",", ":")).encode()


def lives_by_lease(record: Record) -> bool:
    return record.claim.ttl_s is not None and record.lost is None


def _word(change: Change) -> Word:
    return Word(
        change.kind.value, change.life.epoch, None if change.before is None else change.before.epoch, change.why
    )


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
