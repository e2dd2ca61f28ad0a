"""Registries over one journal know the same: whoever decides, and whoever only learns what was decided."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.core.address import Endpoint
from pdctl.core.instances import InstanceView
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Change, Claim, Owner, Record
from pdctl.core.registry import Registry
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import PdctlError

NAMES = st.sampled_from(["a", "b"])
SEATS = st.integers(0, 2)
CLAIMS = st.tuples(
    st.just("claim"), NAMES, SEATS, st.integers(0, 3), st.sampled_from([2, 3]), st.sampled_from([None, 9])
)
OTHERS = st.tuples(st.sampled_from(["leave", "drain", "drained", "lost", "found"]), NAMES, SEATS)
TIME = st.tuples(st.just("time"), st.sampled_from([1.0, 10.0, 700.0]))
STEPS = st.lists(st.tuples(st.booleans(), CLAIMS | CLAIMS | OTHERS | TIME), max_size=40)


class Rows:
    """What a journal keeps of changes, by instance and epoch."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[int, Record]] = {}

    def take(self, changes: Sequence[Change]) -> dict[str, list[Record]]:
        """All that is kept now of each instance that was touched."""
        touched = {change.instance: self.kept.setdefault(change.instance, {}) for change in changes if change.is_kept}
        for change in changes:
            if not change.is_kept:
                continue
            rows = touched[change.instance]
            if change.before is not None:
                rows.pop(change.before.epoch, None)
            if change.is_dropped:
                rows.pop(change.life.epoch, None)
            else:
                rows[change.life.epoch] = change.record
        return {name: list(rows.values()) for name, rows in touched.items()}


def claim(name: str, tp: int, port: int, size: int, ttl_s: float | None) -> Claim:
    seat, shape = Seat(0, 0, min(tp, size - 1), 0), Shape(size, 1, 1, 1, 16, None)
    where = Endpoint("10.0.0.1", 4000 + 10 * tp + port)
    return Claim(name, Announcement(seat, shape, where), Owner("10.0.0.1"), ttl_s=ttl_s)


def decide(registry: Registry, step: tuple, now: float) -> list[Change]:
    match step:
        case ("claim", name, tp, port, size, ttl_s):
            return registry.claim(claim(name, tp, port, size, ttl_s), now).changes
        case (what, name, tp):
            return decide_of(registry, what, name, Seat(0, 0, tp, 0), now)
    return registry.tick(now)


def decide_of(registry: Registry, what: str, name: str, seat: Seat, now: float) -> list[Change]:
    if what == "leave":
        return registry.leave(name, seat, None, None, now)
    if what == "drain":
        return registry.drain(name, seat, 5.0, now)
    view = registry.view(name)
    if view is None:
        return []
    if what == "drained":
        return registry.drained(name, {life.epoch for life in view.lives}, now)
    lives = [*view.lives, *(life for each in view.incarnations for life in each.returnable)]
    found = [life for life in lives if life.seat == seat]
    return registry.witnessed(name, seat, found[0].epoch, what == "found", "no answer", now) if found else []


def known(view: InstanceView | None) -> object:
    if view is None:
        return None
    return [
        (
            each.number,
            each.shape,
            {seat: (life.claim, life.epoch, life.grace_s) for seat, life in each.alive.items()},
            {seat: (loss.life.epoch, loss.kind, loss.why) for seat, loss in each.lost.items()},
            each.was_complete,
            each.is_complete,
        )
        for each in view.incarnations
    ]


@given(STEPS)
@settings(max_examples=300, deadline=None)
def test_who_only_learns_knows_what_who_decided_knows(steps: list[tuple[bool, tuple]]) -> None:
    registries, rows, now = (Registry(), Registry()), Rows(), 0.0
    for which, step in steps:
        decides, learns = registries[which], registries[not which]
        if step[0] == "time":
            now += step[1]
        try:
            changes = decide(decides, step, now)
        except PdctlError:
            continue
        told = learns.learn(rows.take(changes), {}, decides.last_epoch, now)
        assert {name: known(learns.view(name)) for name in "ab"} == {name: known(decides.view(name)) for name in "ab"}
        assert learns.last_epoch == decides.last_epoch
        assert seats(told) == seats(changes)


def seats(changes: Sequence[Change]) -> object:
    """Who has come, who has gone, what became whole: in the end, since a group may have had somebody come and go."""
    found = {change.life.epoch for change in changes if change.kind is ChangeKind.FOUND}
    came = {change.life.epoch for change in changes if change.kind in (ChangeKind.SEATED, ChangeKind.REPLACED)}
    gone = {change.life.epoch for change in changes if change.kind is ChangeKind.LOST or change.is_end}
    gone |= {change.before.epoch for change in changes if change.before is not None}
    whole = {change.instance for change in changes if change.kind is ChangeKind.COMPLETED}
    return came - gone, found, whole
