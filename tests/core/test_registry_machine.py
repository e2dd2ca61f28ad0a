"""
Any order of claims, renewals, goodbyes, drains, verdicts, waiting and restarts, against a model that keeps flat rows
and derives everything anew. Every command goes through a draft, which a journal takes or refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdctl.core.address import Endpoint
from pdctl.core.claims import STALLED_AFTER_S
from pdctl.core.instances import Incarnation
from pdctl.core.lives import Change, Claim, Life, Owner, Record, Standing
from pdctl.core.registry import REMEMBER_S, Registry
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import Occupied, PdctlError, Refused, Superseded, UnknownLease

NAME, TTL_S, GRACE_S = "a", 10.0, 30.0
Form = tuple[int, int]
"""What the model knows of a shape: ranks, page size."""


@dataclass(frozen=True)
class Row:
    """One life, as the model believes in it."""

    epoch: int
    incarnation: int
    form: Form
    tp: int
    host: str
    port: int
    ttl_s: float | None
    since: float
    spoke_at: float
    suspected: bool = False
    witnessed: bool = False
    until: float | None = None
    fate: str = "alive"  # or how it was lost
    lost_after: int = 0

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def vouched(self) -> bool:
        return self.ttl_s is not None or self.witnessed


class Model:
    """Rows, and which incarnations there are: the first is served, a second one is forming."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.forms: dict[int, Form] = {}
        self.completed: set[int] = set()
        self.last_epoch = 0
        self.empty_since: float | None = None

    def alive(self, incarnation: int | None = None) -> list[Row]:
        return [row for row in self.rows if row.fate == "alive" and incarnation in (None, row.incarnation)]

    def returnable(self, incarnation: int) -> list[Row]:
        return [row for row in self.rows if row.fate == "lost" and row.incarnation == incarnation]

    def at(self, incarnation: int, tp: int) -> Row | None:
        return next((row for row in self.rows if (row.incarnation, row.tp) == (incarnation, tp)), None)

    def complete(self, incarnation: int) -> bool:
        return len(self.alive(incarnation)) == self.forms[incarnation][0]

    def change(self, row: Row, **changes: object) -> Row:
        changed = replace(row, **changes)  # type: ignore[arg-type]
        self.rows[self.rows.index(row)] = changed
        return changed

    def drop(self, incarnation: int) -> None:
        self.rows = [row for row in self.rows if row.incarnation != incarnation]
        del self.forms[incarnation]

    def error(self, mine: Row, now: float) -> type[PdctlError] | None:
        """Why a claim is refused."""
        own = self.home(mine)
        if any(row.address == mine.address and row.incarnation != own for row in self.alive()):
            return Refused
        held = self.at(own, mine.tp) if own else None
        held = held if held and held.fate == "alive" else None
        if own is None and self.forms:
            newest = max(self.forms)
            grown = self.alive(newest)
            in_place = any(row.tp == mine.tp for row in grown)
            stalled = all(now - row.since >= STALLED_AFTER_S for row in grown)
            if not (self.complete(newest) or in_place or stalled):
                return Refused
        if held is not None:
            in_the_way = [held]
        elif own == min(self.forms, default=None) or any(row.host == mine.host for row in self.alive()):
            in_the_way = []
        else:
            in_the_way = self.alive()
        return Occupied if any(row.vouched and row.host != mine.host for row in in_the_way) else None

    def home(self, mine: Row) -> int | None:
        return next((number for number, form in self.forms.items() if form == mine.form), None)

    def claim(self, mine: Row, now: float) -> None:
        own = self.home(mine)
        if own is None:
            if len(self.forms) == 2:
                self.drop(max(self.forms))
            own = self.last_epoch + 1
            self.forms[own] = mine.form
        held = self.at(own, mine.tp)
        if held and held.address == mine.address and held.fate in ("alive", "lost"):
            witnessed = held.witnessed or held.fate == "lost"
            self.change(
                held, fate="alive", ttl_s=mine.ttl_s, spoke_at=now, suspected=False, witnessed=witnessed, host=mine.host
            )
        else:
            if held:
                self.rows.remove(held)
            self.last_epoch += 1
            self.rows.append(replace(mine, epoch=self.last_epoch, incarnation=own, since=now, spoke_at=now))
        self.settle(now)

    def lose(self, row: Row, fate: str) -> None:
        self.change(row, fate=fate, lost_after=self.last_epoch)

    def settle(self, now: float) -> None:
        self.completed |= {number for number in self.forms if self.complete(number)}
        if len(self.forms) == 2:
            served, forming = sorted(self.forms)
            if not self.alive(forming) and not self.returnable(forming):
                self.drop(forming)
            elif self.alive(forming) and (self.complete(forming) or not self.alive(served)):
                self.drop(served)
        if self.alive():
            self.empty_since = None
        elif self.empty_since is None:
            self.empty_since = now

    def pass_time(self, now: float) -> None:
        for row in self.alive():
            if row.until is not None and row.until <= now:
                self.lose(row, "drained")
            elif row.ttl_s is not None and row.spoke_at + row.ttl_s <= now:
                self.lose(row, "expired")
            elif row.ttl_s is not None and row.spoke_at + row.ttl_s / 2 <= now:
                self.change(row, suspected=True)
        self.settle(now)

    def restart(self, now: float) -> None:
        self.rows = [
            replace(
                row,
                since=now,
                spoke_at=now,
                suspected=row.ttl_s is not None,
                witnessed=False,
                until=None if row.until is None else now + GRACE_S,
            )
            for row in self.rows
        ]
        self.empty_since = now if self.rows and not self.alive() else None

    def in_(self, number: int) -> list[Row]:
        return [row for row in self.rows if row.incarnation == number]

    def is_dead(self) -> bool:
        """One DP group: one rank lost is all lost, once it was complete; unless somebody has come since."""
        served = min(self.forms)
        lost = [row for row in self.in_(served) if row.fate != "alive"]
        alive = self.alive(served)
        if not lost or any(row.epoch > max(each.lost_after for each in lost) for row in alive):
            return False
        return not alive or served in self.completed


class RegistryMachine(RuleBasedStateMachine):
    """`kept` is what a journal would hold: by epoch, as the port says."""

    def __init__(self) -> None:
        super().__init__()
        self.registry, self.model = Registry(), Model()
        self.now, self.revision, self.epoch = 100.0, 0, 0
        self.kept: dict[int, Record] = {}
        self.known: list[tuple[int, int]] = [(0, 99)]  # (tp, epoch) of every life there ever was

    @rule(
        form=st.sampled_from([(1, 16), (2, 16), (2, 64), (3, 16)]),
        tp=st.integers(0, 2),
        host=st.sampled_from(["a", "a", "b"]),
        port=st.integers(1, 4),
        ttl_s=st.sampled_from([None, TTL_S]),
        journal_refuses=st.sampled_from([False, False, False, True]),
    )
    def claim(self, form: Form, tp: int, host: str, port: int, ttl_s: float | None, *, journal_refuses: bool) -> None:
        tp %= form[0]
        mine = Row(0, 0, form, tp, host, port, ttl_s, self.now, self.now)
        announcement = Announcement(Seat(0, 0, tp, 0), Shape(form[0], 1, 1, 1, form[1], None), Endpoint(host, port))
        claim = Claim(NAME, announcement, Owner(host), ttl_s=ttl_s)
        self.command(
            lambda registry: registry.claim(claim, self.now).changes,
            self.model.error(mine, self.now),
            lambda: self.model.claim(mine, self.now),
            journal_refuses=journal_refuses,
        )
        for life in self.lives():
            if (life.seat.tp, life.epoch) not in self.known:
                self.known.append((life.seat.tp, life.epoch))

    @rule(which=st.integers(0, 50), rooms=st.sampled_from([None, 1, 0]))
    def renew(self, which: int, rooms: int | None) -> None:
        tp, epoch = self.life_of(which)
        row = self.row_of(tp, epoch)

        def renewed() -> None:
            assert row is not None
            if rooms == 0 and row.until is not None:
                self.model.lose(row, "drained")
                self.model.settle(self.now)
            else:
                self.model.change(row, spoke_at=self.now, suspected=False)

        self.command(
            lambda registry: registry.renew(NAME, Seat(0, 0, tp, 0), epoch, None, self.now, rooms).changes,
            self.stale(tp, epoch),
            renewed,
        )

    @rule(which=st.integers(0, 50), journal_refuses=st.booleans())
    def leave(self, which: int, *, journal_refuses: bool) -> None:
        tp, epoch = self.life_of(which)
        row = self.row_of(tp, epoch)

        def left() -> None:
            assert row is not None
            self.model.lose(row, "left")
            self.model.settle(self.now)

        self.command(
            lambda registry: registry.leave(NAME, Seat(0, 0, tp, 0), epoch, None, self.now),
            self.stale(tp, epoch),
            left,
            journal_refuses=journal_refuses,
        )

    @rule(tp=st.sampled_from([None, 0, 1]), journal_refuses=st.booleans())
    def drain(self, tp: int | None, *, journal_refuses: bool) -> None:
        rows = [row for row in self.model.alive() if tp in (None, row.tp)]
        self.command(
            lambda registry: registry.drain(NAME, None if tp is None else Seat(0, 0, tp, 0), GRACE_S, self.now),
            None if rows else UnknownLease,
            lambda: [self.model.change(row, until=self.now + GRACE_S) for row in rows],
            journal_refuses=journal_refuses,
        )

    @rule(which=st.integers(0, 50), alive=st.booleans())
    def verdict(self, which: int, *, alive: bool) -> None:
        tp, epoch = self.life_of(which)
        self.observed(self.registry.witnessed(NAME, Seat(0, 0, tp, 0), epoch, alive, "is silent", self.now))
        row = next((row for row in self.model.rows if (row.tp, row.epoch) == (tp, epoch)), None)
        if row is None or row.ttl_s is not None or row.fate not in ("alive", "lost"):
            return
        if row.fate == "alive":
            row = self.model.change(row, witnessed=alive)
            if not alive:
                self.model.lose(row, "lost")
        elif alive:
            self.model.change(row, fate="alive", witnessed=True, spoke_at=self.now)
        self.model.settle(self.now)

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 5.0, 6.0, 10.0, 31.0, 61.0, 700.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for _ in range(100):
            if self.registry.next_deadline > self.now:
                break
            self.observed(self.registry.tick(self.now))
        else:
            raise AssertionError("the registry never comes to rest")
        self.model.pass_time(self.now)
        if self.registry.view(NAME) is None and self.model.forms:
            self.forgotten()

    @rule()
    def restart(self) -> None:
        before = self.registry
        self.registry = Registry()
        records = [self.kept[epoch] for epoch in sorted(self.kept)]
        self.registry.restore(records, before.last_epoch, before.revision, self.now)
        self.model.restart(self.now)
        assert [view.name for view in self.registry if view.health(self.now)] == [
            view.name for view in before if view.health(self.now)
        ]

    def forgotten(self) -> None:
        since = self.model.empty_since
        assert since is not None
        assert self.now >= since + REMEMBER_S
        assert not any(self.model.returnable(number) for number in self.model.forms)
        self.model.rows, self.model.forms, self.model.empty_since = [], {}, None

    def command(
        self,
        ask: Callable[[Registry], list[Change]],
        error: type[PdctlError] | None,
        believe: Callable[[], object],
        *,
        journal_refuses: bool = False,
    ) -> None:
        draft = self.registry.draft()
        if error is not None:
            with pytest.raises(PdctlError) as refusal:
                ask(draft)
            assert type(refusal.value) is error
            return
        changes = ask(draft)
        if journal_refuses and any(change.is_kept for change in changes):
            spoken = {life.epoch for life in self.lives() if life.pulse.spoke_at == self.now}
            self.registry.skip(draft)
            self.model.last_epoch = self.registry.last_epoch  # no number is given twice
            for row in self.model.alive():  # who spoke has spoken, whatever came of it
                if row.epoch in spoken and row.spoke_at != self.now:
                    self.model.change(row, spoke_at=self.now)
            return
        self.registry.adopt(draft)
        self.observed(changes)
        believe()

    def observed(self, changes: list[Change]) -> None:
        for change in changes:
            assert change.revision > self.revision
            self.revision = change.revision
            self.epoch = max(self.epoch, change.life.epoch)
            if change.before is not None:
                self.kept.pop(change.before.epoch, None)
            if change.is_dropped:
                self.kept.pop(change.life.epoch, None)
            elif change.is_kept:
                self.kept[change.life.epoch] = change.record
        self.revision = max(self.revision, self.registry.revision)

    def life_of(self, which: int) -> tuple[int, int]:
        """One of the latest lives more often than one long gone."""
        return self.known[-1 - which % len(self.known)]

    def row_of(self, tp: int, epoch: int) -> Row | None:
        return next((row for row in self.model.alive() if (row.tp, row.epoch) == (tp, epoch)), None)

    def stale(self, tp: int, epoch: int) -> type[PdctlError] | None:
        if self.row_of(tp, epoch) is not None:
            return None
        if not self.model.forms:
            return UnknownLease
        served = min(self.model.forms)
        drained = any((row.tp, row.epoch, row.fate) == (tp, epoch, "drained") for row in self.model.rows)
        held = self.model.at(served, tp)
        replaced = held is not None and held.fate == "alive" and held.epoch > epoch
        return Superseded if drained or replaced or served > epoch else UnknownLease

    def lives(self) -> Iterator[Life]:
        view = self.registry.view(NAME)
        return iter(()) if view is None else view.lives

    @invariant()
    def what_is_known_is_what_the_model_believes(self) -> None:
        view = self.registry.view(NAME)
        if view is None:
            assert not self.model.forms
            return
        served, *forming = sorted(self.model.forms)
        assert view.served.number == served
        assert [each.number for each in view.incarnations[1:]] == forming
        for incarnation in view.incarnations:
            self.agrees(incarnation)
        assert view.ready == (set(view.alive) == view.shape.seats())
        assert set(view.missing) == view.shape.seats() - set(view.alive)
        assert (view.health(self.now) is not None) == self.model.is_dead()
        assert (view.empty_since is None) == (next(view.lives, None) is not None)

    def agrees(self, incarnation: Incarnation) -> None:
        rows = self.model.alive(incarnation.number)
        assert {(life.seat.tp, life.epoch) for life in incarnation.alive.values()} == {(r.tp, r.epoch) for r in rows}
        assert (incarnation.shape.attn_tp_size, incarnation.shape.page_size) == self.model.forms[incarnation.number]
        by_epoch = {life.epoch: life for life in incarnation.alive.values()}
        for row in rows:
            life = by_epoch[row.epoch]
            assert (life.address.host, life.address.port, life.ttl_s) == (row.host, row.port, row.ttl_s)
            assert life.draining_until == row.until
            assert life.is_vouched == row.vouched
            assert life.pulse.suspected == row.suspected
            if row.ttl_s is not None:
                assert life.due == row.spoke_at + row.ttl_s
            assert (life.standing(self.now) is Standing.DRAINING) == (row.until is not None)
        lost = {(loss.life.epoch, loss.kind.value) for loss in incarnation.lost.values()}
        assert lost == {(r.epoch, r.fate) for r in self.model.in_(incarnation.number) if r.fate != "alive"}

    @invariant()
    def a_journal_holds_exactly_who_is_remembered(self) -> None:
        view = self.registry.view(NAME)
        kept = {life.epoch for each in (view.incarnations if view else ()) for life in each.kept}
        assert set(self.kept) == kept
        assert self.registry.last_epoch >= self.epoch

    @invariant()
    def nothing_is_scheduled_for_who_is_gone(self) -> None:
        assert len(self.registry._agenda) <= sum(1 for _ in self.lives())


RegistryMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),  # to explain takes minutes
    report_multiple_bugs=False,
)
TestRegistryMachine = RegistryMachine.TestCase
