"""
An instance as its records tell it, and how that differs from what was known: after a restart, and after another
registry over the same journal has written.

One way from records to a view, so that two registries that have read the same records know the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from pdctl.core.instances import Incarnation, InstanceView, Loss
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Ending, Life, Record


class Difference(NamedTuple):
    """A change to be: the arguments of a Change without its number."""

    kind: ChangeKind
    life: Life
    before: Life | None = None
    why: str | None = None
    ending: Ending | None = None


def restored(
    name: str, records: Sequence[Record], now: float, *, known: InstanceView | None = None, suspect: bool = True
) -> InstanceView:
    """The view of these records, one at least. Lives that are `known` go on as they are; leases of others begin now.

    suspect   whether those others are SUSPECT until they speak
    """
    held = {} if known is None else {life.epoch: life for life in known.lives}
    lost = (
        {} if known is None else {loss.life.epoch: loss for each in known.incarnations for loss in each.lost.values()}
    )
    by_number: dict[int, list[Record]] = {}
    for record in records:
        by_number.setdefault(record.incarnation, []).append(record)
    served, *forming = [
        _incarnation(number, by_number[number], held, lost, now, suspect=suspect) for number in sorted(by_number)
    ]
    epoch = max(record.epoch for record in records)
    if known is not None:
        return InstanceView(name, served, forming[-1] if forming else None, epoch, known.revision, known.empty_since)
    return InstanceView(name, served, forming[-1] if forming else None, epoch)


def _incarnation(
    number: int,
    records: Sequence[Record],
    held: Mapping[int, Life],
    gone: Mapping[int, Loss],
    now: float,
    *,
    suspect: bool,
) -> Incarnation:
    shape, role = records[0].claim.shape, records[0].claim.role
    lost, alive, was_complete = list[Loss](), list[Life](), False
    unsaid = Ending(ChangeKind.LOST, max(record.epoch for record in records), of_complete=False)
    for record in records:
        life, ending = _life(record, held.get(record.epoch), now, suspect=suspect), record.ending or unsaid
        if record.lost is None:
            alive.append(life)
        else:
            known = gone.get(record.epoch)
            at = now if known is None else known.at
            lost.append(Loss(life, ending.kind, record.lost, at, ending.after))
            was_complete |= ending.of_complete
    return Incarnation(number, shape, role, was_complete=was_complete).losing(lost).seating(*alive)


def _life(record: Record, known: Life | None, now: float, *, suspect: bool) -> Life:
    life = Life.restored(record, now)
    if known is None:
        life.pulse.suspected &= suspect
        return life
    until = known.draining_until if known.grace_s == record.grace_s else life.draining_until
    return replace(life, since=known.since, pulse=known.pulse, draining_until=until)


def differences(
    before: InstanceView | None, after: InstanceView | None, words: Mapping[int, str]
) -> Iterator[Difference]:
    """What became of whom, in the order of their epochs; `words`: why, by epoch."""
    were, are = _alive(before), _alive(after)
    losses = (
        {}
        if after is None
        else {loss.life.epoch: (loss, each) for each in after.incarnations for loss in each.lost.values()}
    )
    followers = {(life.incarnation, life.seat): life for epoch, life in are.items() if epoch not in were}
    for epoch, life in sorted(were.items()):
        if epoch in are or (life.incarnation, life.seat) in followers:
            continue
        if epoch in losses:
            loss, of = losses[epoch]
            ending = None if loss.may_return else Ending(loss.kind, loss.after, of.was_complete)
            yield Difference(loss.kind, life, None, loss.why, ending)
        else:
            yield Difference(ChangeKind.SUPERSEDED if after else ChangeKind.FORGOTTEN, life, None, words.get(epoch))
    held = {(life.incarnation, life.seat): life for life in were.values()}
    known = (
        set() if before is None else {loss.life.epoch for each in before.incarnations for loss in each.lost.values()}
    )
    for epoch, life in sorted(are.items()):
        if epoch in were:
            yield from _amended(were[epoch], life, words.get(epoch))
        elif epoch in known:
            yield Difference(ChangeKind.FOUND, life)
        else:
            previous = held.get((life.incarnation, life.seat))
            yield Difference(ChangeKind.REPLACED if previous else ChangeKind.SEATED, life, previous)
    yield from _whole(before, after)


def _amended(was: Life, now: Life, why: str | None) -> Iterator[Difference]:
    if now.is_draining and not was.is_draining:
        yield Difference(ChangeKind.DRAINING, now, None, why)
    elif was.claim != now.claim or was.grace_s != now.grace_s:
        yield Difference(ChangeKind.AMENDED, now)


def _whole(before: InstanceView | None, after: InstanceView | None) -> Iterator[Difference]:
    """Whether with what is new another incarnation is served, or the served one is complete."""
    if after is None or not after.alive:
        return
    newest = max(after.alive.values(), key=lambda life: life.epoch)
    if before is not None and before.served.number != after.served.number:
        yield Difference(ChangeKind.RESHAPED, newest)
    if after.ready and not (before is not None and before.ready and before.served.number == after.served.number):
        yield Difference(ChangeKind.COMPLETED, newest)


def _alive(view: InstanceView | None) -> dict[int, Life]:
    return {} if view is None else {life.epoch: life for life in view.lives}
