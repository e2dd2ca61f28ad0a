"""
Who serves, in which seats, and may others use them yet.

No sockets, no clock, no logging, no locks: commands come in, what they changed comes out as values. Time arrives as
`now` (seconds, monotonic, any zero); it must not go back.

    seat:      ABSENT --claim--> ALIVE --claim from another address--> ALIVE, a new life with a higher epoch
               ALIVE --goodbye, end of lease, witness, drain--> ABSENT
    instance:  ready <=> the seats alive are exactly those of its shape

`core.lives` has what one life is, `core.instances` what is known of an instance, `core.claims` who may claim what. A
command that raises has changed nothing. Commands that must not show before they are safe elsewhere are given to a
`draft`, which is adopted afterwards, or dropped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from pdctl.core.address import Endpoint
from pdctl.core.calendar import Calendar
from pdctl.core.capacity import RegistryLimits
from pdctl.core.claims import check_may_change, check_may_end, not_held, place
from pdctl.core.instances import Incarnation, InstanceView, Loss
from pdctl.core.kinds import ChangeKind
from pdctl.core.listening import SHARE
from pdctl.core.lives import SUSPECT_AFTER, Change, Claim, Ending, Life, Owner, Record
from pdctl.core.overlay import Overlay
from pdctl.core.restored import differences, restored
from pdctl.core.route import Seat
from pdctl.errors import LimitReached, UnknownLease

REMEMBER_S = 600.0
"""For how long an instance is remembered that nobody is left of, so that it can be said why."""


class Outcome(NamedTuple):
    """A command's life, as it is now, and what the command changed."""

    life: Life
    changes: list[Change]


Entry = tuple[str, Seat, int]
"""Instance, seat, epoch: a life, and in the agenda once."""


class Registry:
    """All instances by name. One owner, in one event loop."""

    def __init__(self, limits: RegistryLimits | None = None) -> None:
        self.limits = limits or RegistryLimits()
        self.revision = 0
        self.last_epoch = 0
        self._views: MutableMapping[str, InstanceView] = {}
        self._agenda: Calendar[Entry] = Calendar()
        self._emptied: deque[tuple[float, str]] = deque()  # (when to look again, instance), soonest first
        self._n_remembered = 0
        self.shortest_ttl_s = math.inf  # no lease is shorter; one that was may be over
        self._made: list[Change] | None = None  # a draft's changes
        self.is_held: Callable[[int], bool] = _not_elsewhere
        """Whether another registry has heard the life with this epoch, within its lease, as far as is known."""

    def __iter__(self) -> Iterator[InstanceView]:
        return iter(self._views.values())

    def __len__(self) -> int:
        return len(self._views)

    def view(self, instance: str) -> InstanceView | None:
        return self._views.get(instance)

    def find(self, instance: str, seat: Seat) -> Endpoint | None:
        """Where the rank in `seat` listens, ready or not."""
        view = self._views.get(instance)
        life = view.alive.get(seat) if view else None
        return life.address if life else None

    def number(self) -> int:
        """The next revision, for a change of another book, which readers are told of in one order with these."""
        self.revision += 1
        return self.revision

    @property
    def next_deadline(self) -> float:
        """When `tick` will have something to do, or a little earlier; inf for never."""
        return min(self._agenda.next_at, self._emptied[0][0] if self._emptied else math.inf)

    @property
    def full(self) -> list[str]:
        """The limits that are reached."""
        limits = self.limits
        held = {"max_instances": len(self._views), "max_ranks": self._n_remembered}
        return [
            f"{n} {name.removeprefix('max_')} are held, the limit ({name})"
            for name, n in held.items()
            if n >= getattr(limits, name)
        ]

    # Commands

    def claim(self, claim: Claim, now: float) -> Outcome:
        """Take a rank's claim. No changes: all of it was known. Raises Refused, Occupied, LimitReached, TooLarge."""
        self.limits.check(claim)
        view = self._views.get(claim.instance)
        if view is None:
            self._check_place("max_instances", len(self._views))
            first = Incarnation(self.last_epoch + 1, claim.shape, claim.role)
            view, incarnation = InstanceView(claim.instance, first), first
        else:
            incarnation = place(view, claim, now) or Incarnation(self.last_epoch + 1, claim.shape, claim.role)
        held = incarnation.alive.get(claim.seat)
        if held is not None and held.address == claim.address:
            return self._again(view, incarnation, held, claim, now)
        return self._seat(view, incarnation, claim, now)

    def repeats(self, claim: Claim) -> Life | None:
        """The life that has said this already, word for word: to claim it again is to renew it."""
        view = self._views.get(claim.instance)
        for incarnation in view.incarnations if view else ():
            life = incarnation.alive.get(claim.seat)
            if life is None or life.claim.announcement.address.port != claim.announcement.address.port:
                continue  # a rank that was started again: to compare all of it takes ten times as long
            if life.claim == claim:
                return life
        return None

    def hear(self, instance: str, seat: Seat, epoch: int, owner: Owner | None, now: float) -> Life:
        """`renew`, where it changes nothing but the pulse: of a life that is not SUSPECT. Raises as `renew`."""
        _, life = self._holder(instance, seat, epoch, owner)
        if not life.pulse.suspected:
            life.pulse.spoke_at = now
        return life

    def renew(
        self, instance: str, seat: Seat, epoch: int, owner: Owner | None, now: float, rooms: int | None = None
    ) -> Outcome:
        """The life goes on. `rooms`: how many it has under way; one that drains is gone when it says 0.

        Raises UnknownLease, Superseded, Occupied.
        """
        view, life = self._holder(instance, seat, epoch, owner)
        if rooms == 0 and life.is_draining:
            return Outcome(life, self._end(view, [Loss(life, ChangeKind.DRAINED, "was drained", now)], now))
        return Outcome(life, self._heard(view, life, now))

    def leave(self, instance: str, seat: Seat, epoch: int | None, owner: Owner | None, now: float) -> list[Change]:
        """A goodbye; `epoch` None: whoever holds the seat. Raises as `renew`."""
        view, life = self._holder(instance, seat, epoch, None)
        check_may_end(life, owner)
        by_another = owner is not None and not owner.may_change(life.owner)
        why = f"was deregistered by {owner}" if by_another else "said goodbye"
        return self._end(view, [Loss(life, ChangeKind.LEFT, why, now)], now)

    def drain(
        self, instance: str, seat: Seat | None, grace_s: float, now: float, owner: Owner | None = None
    ) -> list[Change]:
        """Nothing new for the rank in `seat`, or for all of the instance; gone after `grace_s` at the latest.

        `owner`: who asks; None: one of us. Raises UnknownLease where nobody is, and Occupied.
        """
        view = self._views.get(instance)
        lives = [life for life in (view.lives if view else ()) if seat is None or life.seat == seat]
        if view is None or not lives:
            what = f"instance {instance}" if seat is None else f"seat {seat} of {instance}"
            raise UnknownLease(f"nobody is registered as {what}: nothing is there to drain")
        for life in lives:
            if owner is not None and not owner.may_drain(life.owner):
                check_may_end(life, owner)
        changes = []
        for life in lives:
            draining = life.draining(grace_s, now)
            view = self._put(view, self._of(view, life).seating(draining), draining)
            why = None if owner is None else f"{owner} asked for it"
            changes.append(self._change(ChangeKind.DRAINING, draining, why=why))
        self._write(view)
        return changes

    def drained(self, instance: str, epochs: Collection[int], now: float) -> list[Change]:
        """These of those that drain have nothing under way any more, whatever is left of the grace."""
        view = self._views.get(instance)
        over = [life for life in (view.lives if view else ()) if life.epoch in epochs and life.is_draining]
        losses = [Loss(life, ChangeKind.DRAINED, "was drained: its engine has nothing under way", now) for life in over]
        return self._end(view, losses, now) if view is not None and losses else []

    # What is seen rather than asked for

    def witnessed(
        self, instance: str, seat: Seat, epoch: int, alive: bool, why: str | None, now: float
    ) -> list[Change]:
        """A witness's verdict. Of a life with a lease, or one that is over, it is no news: nothing changes."""
        view = self._views.get(instance)
        if view is None:
            return []
        life, loss = view.holder(seat, epoch), view.loss(seat, epoch)
        if life is not None and life.ttl_s is None:
            life.pulse.witnessed = alive
            return [] if alive else self._end(view, [Loss(life, ChangeKind.LOST, why or "does not answer", now)], now)
        if loss is not None and loss.may_return and alive:
            return self._found(view, loss.life, now)
        return []

    def tick(self, now: float, budget: int = 1000) -> list[Change]:
        """What time alone has changed, `budget` lives at most: look at `next_deadline` for whether there are more."""
        changes: list[Change] = []
        over: dict[str, list[Loss]] = {}
        for entry in self._agenda.due(now, budget):
            name, seat, epoch = entry
            view = self._views.get(name)
            life = view.holder(seat, epoch) if view else None
            if life is None:
                continue
            held = life.ttl_s is not None and self.is_held(epoch)
            if held:
                life.pulse.spoke_at = max(now, life.pulse.spoke_at)
            if (loss := _over(life, now)) is not None:
                over.setdefault(name, []).append(loss)
            else:
                if life.next_event <= now:
                    life.pulse.suspected = True
                    changes.append(self._noted(name, self._change(ChangeKind.SUSPECTED, life)))
                self._agenda.put(entry, self._look_at(life) if held else life.next_event)
        for name, losses in over.items():
            changes += self._end(self._views[name], losses, now)
        return changes + self._forget(now)

    def forgive(self, now: float, missed_s: float = math.inf) -> bool:
        """Nobody was listening for `missed_s` until now: leases that this has put in danger begin anew, since who spoke
        meanwhile was not heard. Whether there were any.
        """
        up_to_s = missed_s * SHARE
        if up_to_s < self.shortest_ttl_s:
            return False
        leased = [life for view in self._views.values() for life in view.lives if life.ttl_s is not None]
        self.shortest_ttl_s = min((life.claim.ttl_s or math.inf for life in leased), default=math.inf)
        in_danger = [life for life in leased if life.claim.ttl_s is not None and life.claim.ttl_s <= up_to_s]
        for life in in_danger:
            life.pulse.spoke_at = now
        return bool(in_danger)

    # Restarts

    def restore(self, records: Iterable[Record], last_epoch: int, revision: int, now: float) -> None:
        """Take back what a journal kept, as it stands: it was judged when it was made. Into an empty registry."""
        by_name: dict[str, list[Record]] = {}
        for record in records:
            by_name.setdefault(record.claim.instance, []).append(record)
            last_epoch = max(last_epoch, record.epoch)
        self.last_epoch, self.revision = last_epoch, revision
        for name, kept in by_name.items():
            view = replace(restored(name, kept, now), revision=revision)
            self._write(view, now)
            for life in view.lives:
                self._schedule(life)

    # Other registries over the same journal

    def learn(
        self, records: Mapping[str, Sequence[Record]], words: Mapping[int, str], last_epoch: int, now: float
    ) -> list[Change]:
        """Take over what another registry has decided: all that is kept of each instance, and what it says of it.

        `records`: of each instance that it touched; nothing for one that is forgotten. `words`: why, by epoch. What
        this registry held of the same lives stays: when they spoke.
        """
        self.last_epoch = max(self.last_epoch, last_epoch)
        changes: list[Change] = []
        for name, kept in records.items():
            before = self._views.get(name)
            after = restored(name, kept, now, known=before, suspect=False) if kept else None
            changes += [self._change(*difference) for difference in differences(before, after, words)]
            if after is None:
                if before is not None:
                    self._n_remembered -= before.n_remembered
                    del self._views[name]
                continue
            self._write(after, now)
            for life in after.lives:
                self._schedule(life)
        return changes

    def heard_elsewhere(self, instance: str, seat: Seat, epoch: int, now: float) -> list[Change]:
        """Another registry has heard the life; of one that is over it is no news."""
        view = self._views.get(instance)
        life = view.holder(seat, epoch) if view else None
        return [] if view is None or life is None else self._heard(view, life, now)

    def silent(self, instance: str, seat: Seat, epoch: int, over_at: float) -> list[Change]:
        """No registry has heard the life for its whole lease, as far as is known: it is over at `over_at`, unless it
        speaks.
        """
        view = self._views.get(instance)
        life = view.holder(seat, epoch) if view else None
        if life is None or life.ttl_s is None:
            return []
        life.pulse.spoke_at = min(life.pulse.spoke_at, over_at - life.ttl_s)
        self._agenda.put_sooner(_entry(life), over_at)
        if life.pulse.suspected:
            return []
        life.pulse.suspected = True
        return [self._noted(instance, self._change(ChangeKind.SUSPECTED, life))]

    # Drafts

    def draft(self) -> Registry:
        """A registry that begins as this one is and may be changed apart from it, until it is adopted or dropped.

        Meanwhile this one must not be changed. Only pulses are shared: who spoke has spoken.
        """
        draft = Registry(self.limits)
        draft.is_held = self.is_held
        draft.revision, draft.last_epoch = self.revision, self.last_epoch
        draft._views = Overlay(self._views)
        draft._n_remembered = self._n_remembered
        draft._made = []
        return draft

    def adopt(self, draft: Registry) -> None:
        assert isinstance(draft._views, Overlay) and draft._made is not None  # noqa: S101, PT018
        self.revision, self.last_epoch = draft.revision, draft.last_epoch
        self._views.update(draft._views.own)
        self._n_remembered = draft._n_remembered
        self.shortest_ttl_s = min(self.shortest_ttl_s, draft.shortest_ttl_s)
        self._agenda.take(draft._agenda)
        self._emptied.extend(draft._emptied)
        for change in draft._made:
            self._let_go(change)

    def skip(self, draft: Registry) -> None:
        """Drop a draft: what it has numbered is numbered never again, since a journal may have kept it after all."""
        self.revision, self.last_epoch = draft.revision, draft.last_epoch
        for change in draft._made or ():
            if change.kind is ChangeKind.RECOVERED:  # nobody is told, so that it has to happen again
                change.life.pulse.suspected = True

    # How it is done

    def _again(self, view: InstanceView, of: Incarnation, held: Life, claim: Claim, now: float) -> Outcome:
        changes = self._heard(view, held, now)
        if held.claim == claim:
            return Outcome(held, changes)
        life = replace(held, claim=claim)
        view = self._put(self._views[view.name], of.seating(life), life)
        changes.append(self._change(ChangeKind.AMENDED, life))
        self._write(view)
        return Outcome(life, changes)

    def _seat(self, view: InstanceView, incarnation: Incarnation, claim: Claim, now: float) -> Outcome:
        held, loss = incarnation.alive.get(claim.seat), incarnation.lost.get(claim.seat)
        if loss is not None and loss.may_return and loss.life.address == claim.address:
            changes = self._found(view, loss.life, now)
            again = self._again(
                self._views[view.name], self._of(self._views[view.name], loss.life), loss.life, claim, now
            )
            return Outcome(again.life, changes + again.changes)
        if held is None and loss is None:
            self._check_place("max_ranks", self._n_remembered)
        self.last_epoch += 1
        before = held or (loss.life if loss else None)
        is_replaced = held is not None or (loss is not None and loss.may_return)
        life = Life.begin(claim, self.last_epoch, incarnation.number, now)
        changes = [self._change(ChangeKind.REPLACED if is_replaced else ChangeKind.SEATED, life, before)]
        stale = view.forming
        if stale is not None and incarnation.number not in (stale.number, view.served.number):
            changes += [self._change(ChangeKind.SUPERSEDED, gone) for gone in stale.kept]
        grown = incarnation.seating(life)
        view = self._put(view, grown, life)
        return Outcome(life, changes + self._settle(view, life, was_ready=incarnation.is_complete, now=now))

    def _settle(self, view: InstanceView, life: Life, *, was_ready: bool, now: float) -> list[Change]:
        """Write a view whose incarnations have grown or shrunk: serve the forming one when its turn has come."""
        changes: list[Change] = []
        served, forming = view.served, view.forming
        if forming is not None and not forming.alive and not any(forming.returnable):
            view = replace(view, forming=None)
            changes += [self._change(ChangeKind.SUPERSEDED, gone) for gone in forming.kept]
        elif forming is not None and forming.alive and (forming.is_complete or not served.alive):
            view = replace(view, served=forming, forming=None)
            changes += [self._change(ChangeKind.SUPERSEDED, gone) for gone in served.kept]
            changes.append(self._change(ChangeKind.RESHAPED, life))
            was_ready = False
        if view.ready and not was_ready and life.incarnation == view.served.number:
            changes.append(self._change(ChangeKind.COMPLETED, life))
        self._write(view, now)
        return changes

    def _end(self, view: InstanceView, losses: list[Loss], now: float) -> list[Change]:
        """Lives are over; at once for all of them, so that thousands cost one view."""
        changes, after = [], self.last_epoch
        for incarnation in view.incarnations:
            mine = [replace(loss, after=after) for loss in losses if loss.life.incarnation == incarnation.number]
            for loss in mine:
                ending = Ending(loss.kind, after, incarnation.was_complete)
                changes.append(self._change(loss.kind, loss.life, why=loss.why, ending=ending))
            if mine:
                view = view.having(incarnation.losing(mine))
        first = next(view.lives, losses[0].life)
        return changes + self._settle(view, first, was_ready=view.ready, now=now)

    def _found(self, view: InstanceView, life: Life, now: float) -> list[Change]:
        life.pulse.spoke_at = now
        life.pulse.witnessed = True
        incarnation = self._of(view, life)
        view = self._put(view, incarnation.seating(life), life)
        found = self._change(ChangeKind.FOUND, life)
        return [found, *self._settle(view, life, was_ready=incarnation.is_complete, now=now)]

    def _heard(self, view: InstanceView, life: Life, now: float) -> list[Change]:
        life.pulse.spoke_at = now
        if not life.pulse.suspected:
            return []
        life.pulse.suspected = False
        self._agenda.put_sooner(_entry(life), life.next_event)  # than the end of a lease given anew
        return [self._noted(view.name, self._change(ChangeKind.RECOVERED, life))]

    def _holder(self, instance: str, seat: Seat, epoch: int | None, owner: Owner | None) -> tuple[InstanceView, Life]:
        """Who holds the seat with that epoch. Raises UnknownLease, Superseded, Occupied."""
        view = self._views.get(instance)
        if view is None:
            raise UnknownLease(f"instance {instance} is not known here: register again")
        held = view.alive.get(seat)
        life = held if epoch is None else view.holder(seat, epoch)
        if life is None:
            raise not_held(view, seat, epoch)
        check_may_change(life, owner)
        return view, life

    def _of(self, view: InstanceView, life: Life) -> Incarnation:
        return next(each for each in view.incarnations if each.number == life.incarnation)

    def _put(self, view: InstanceView, incarnation: Incarnation, life: Life) -> InstanceView:
        self._schedule(life)
        return view.having(incarnation, life.epoch)

    def _schedule(self, life: Life) -> None:
        ttl_s = life.claim.ttl_s
        if ttl_s is not None and ttl_s < self.shortest_ttl_s:
            self.shortest_ttl_s = ttl_s
        self._agenda.put_sooner(_entry(life), self._look_at(life))  # one that speaks is looked at at its old hour

    def _look_at(self, life: Life) -> float:
        """When to look at it; where another registry may hear it, before it could be taken for SUSPECT."""
        if life.claim.ttl_s is None or self.is_held is _not_elsewhere:
            return life.next_event
        return min(life.next_event, life.pulse.spoke_at + life.claim.ttl_s * SUSPECT_AFTER / 2)

    def _change(
        self,
        kind: ChangeKind,
        life: Life,
        before: Life | None = None,
        why: str | None = None,
        ending: Ending | None = None,
    ) -> Change:
        self.revision += 1
        change = Change(kind, life, self.revision, before, why, ending)
        if self._made is not None:
            self._made.append(change)
        self._let_go(change)
        return change

    def _let_go(self, change: Change) -> None:
        if change.is_end or change.kind is ChangeKind.LOST:
            self._agenda.strike(_entry(change.life))
        if change.before is not None:
            self._agenda.strike(_entry(change.before))

    def _noted(self, name: str, change: Change) -> Change:
        """A change that shows in no seat still makes another view."""
        self._views[name] = replace(self._views[name], revision=change.revision)
        return change

    def _write(self, view: InstanceView, now: float = 0.0) -> None:
        before = self._views.get(view.name)
        self._n_remembered += view.n_remembered - (before.n_remembered if before else 0)
        since = None
        if view.is_empty:
            since = now if view.empty_since is None else view.empty_since
            if view.empty_since is None:
                self._emptied.append((now + REMEMBER_S, view.name))
        self._views[view.name] = view.written(self.revision, since)

    def _check_place(self, name: str, n_held: int) -> None:
        limit = getattr(self.limits, name)
        if n_held >= limit:
            what = name.removeprefix("max_")
            raise LimitReached(f"{limit} {what} are held, the limit ({name}): try again later, or raise the limit")

    def _forget(self, now: float) -> list[Change]:
        """Let go of instances that nobody is left of: in time, or the oldest at once where a limit is reached."""
        changes: list[Change] = []
        looked_at = 0
        while self._emptied and looked_at < 100 and (self._emptied[0][0] <= now or self.full):
            looked_at += 1
            at, name = self._emptied.popleft()
            view = self._views.get(name)
            if view is None or view.empty_since is None or at < view.empty_since + REMEMBER_S:
                continue  # somebody has come meanwhile; if they have left again, that has an entry of its own
            if next(view.under_witness, None) is not None and not self.full:
                self._emptied.append((now + REMEMBER_S, name))
            else:
                forgotten = [life for incarnation in view.incarnations for life in incarnation.kept]
                changes += [self._change(ChangeKind.FORGOTTEN, life) for life in forgotten]
                self._n_remembered -= view.n_remembered
                del self._views[name]
        return changes


def _entry(life: Life) -> Entry:
    return life.claim.instance, life.seat, life.epoch


def _over(life: Life, now: float) -> Loss | None:
    if life.draining_until is not None and life.draining_until <= now:
        return Loss(life, ChangeKind.DRAINED, "was drained", now)
    if life.due is not None and life.due <= now:
        return Loss(life, ChangeKind.EXPIRED, f"was silent for its whole lease of {life.ttl_s:g} s", now)
    return None


def _not_elsewhere(epoch: int) -> bool:  # noqa: ARG001
    return False
