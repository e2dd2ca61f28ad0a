"""
All that one journal keeps, put into another: `pdctl journal copy FROM TO`, to move a registry to another store.

Lives keep their epochs, so that ranks go on renewing what they hold. Nobody may write meanwhile: a journal in a file is
locked by who serves from it, and the target has to be empty. What was written when it fails is in the target, which is
then not empty: clear it, and copy again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from pdctl.core.address import Endpoint
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Change, Claim, Life, Owner, Record
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import ConfigError
from pdctl.persistence.base import Journal, Kept, Notebook

AT_ONCE: Final = 50
"""Instances, rooms by the thousand, or notes that one group has."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Copied:
    """How much it was. `last_epoch`: the next life's is higher."""

    lives: int
    rooms: int
    notes: int
    last_epoch: int


class Copyable(Journal, Notebook, Protocol):
    """Both ports of one journal."""


async def copy(source: Copyable, target: Copyable) -> Copied:
    """Raises ConfigError where the target has something already, JournalUnavailable where it takes no rows."""
    there = await target.load()
    if there != Kept():
        raise ConfigError(
            f"the target has {len(there.records)} lives, {len(there.rooms)} rooms and {len(there.notes)} notes already "
            f"and has given out epochs up to {there.last_epoch}: give an empty one, another prefix or another path"
        )
    kept = await source.load()
    for group in _groups(kept.records):
        await target.append([_change(record, kept.revision) for record in group])
    for rooms in _slices(kept.rooms, AT_ONCE * 1000):
        await target.append([], rooms)
    for notes in _slices(kept.notes, AT_ONCE):
        await target.note(notes)
    if kept.last_epoch:
        await target.append([_gone(kept.last_epoch, kept.revision)])
    return Copied(len(kept.records), len(kept.rooms), len(kept.notes), kept.last_epoch)


def _groups(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Whole instances."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record.claim.instance, []).append(record)
    for names in _slices(list(by_name), AT_ONCE):
        yield [record for name in names for record in by_name[name]]


def _slices(rows: Sequence[T], n: int) -> Iterator[Sequence[T]]:
    return (rows[first : first + n] for first in range(0, len(rows), n))


def _change(record: Record, revision: int) -> Change:
    """One that makes a journal keep exactly this."""
    life = Life.restored(record, 0.0)
    if record.lost is None:
        return Change(ChangeKind.SEATED, life, revision)
    kind = ChangeKind.LOST if record.ending is None else record.ending.kind
    return Change(kind, life, revision, why=record.lost, ending=record.ending)


def _gone(epoch: int, revision: int) -> Change:
    """One that leaves nothing but its numbers: the last life may be long over."""
    shape = Shape(1, 1, 1, 1, 1, None)
    nobody = Claim("nobody", Announcement(Seat(0, 0, 0, 0), shape, Endpoint("127.0.0.1", 1)), Owner("127.0.0.1"))
    return Change(ChangeKind.LEFT, Life.begin(nobody, epoch, epoch, 0.0), revision)
