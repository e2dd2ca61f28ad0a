"""Every cell of the lease table: what each event does to a life in each state, and to who holds its seat by then."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Change, Claim, Owner, Record, Standing
from pdctl.core.registry import REMEMBER_S, Registry
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import Occupied, PdctlError, Refused, Superseded, UnknownLease

TTL_S, GRACE_S = 10.0, 100.0
NAME, SEAT = "a", Seat(0, 0, 0, 0)
TP3 = Shape(attn_tp_size=3, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype=None)
TP1 = replace(TP3, attn_tp_size=1)
HOME, ELSEWHERE = "10.0.0.1", "10.0.0.2"


def claim(
    tp: int = 0, *, shape: Shape = TP3, host: str = HOME, port: int = 40000, ttl_s: float | None = TTL_S
) -> Claim:
    return Claim(NAME, Announcement(Seat(0, 0, tp, 0), shape, Endpoint(host, port)), Owner(host), ttl_s=ttl_s)


@dataclass
class Case:
    """A registry, the time, and the life that the case is about: its claim, its epoch, and when it spoke last."""

    registry: Registry
    mine: Claim
    epoch: int
    now: float = 1.0
    spoke_at: float = 0.0


def holding(ttl_s: float | None) -> Case:
    """A life in seat 0; a neighbour keeps the instance from being empty, a free seat keeps it from being complete."""
    registry = Registry()
    registry.claim(claim(1, port=40001, ttl_s=None), now=0.0)
    mine = claim(ttl_s=ttl_s)
    return Case(registry, mine, registry.claim(mine, now=0.0).life.epoch)


def absent() -> Case:
    registry = Registry()
    registry.claim(claim(1, port=40001, ttl_s=None), now=0.0)
    return Case(registry, claim(), epoch=99)


def suspect() -> Case:
    case = holding(TTL_S)
    case.now = TTL_S / 2
    case.registry.tick(case.now)
    return case


def draining() -> Case:
    case = holding(TTL_S)
    case.registry.drain(NAME, SEAT, GRACE_S, case.now)
    return case


def drained() -> Case:
    case = draining()
    case.registry.renew(NAME, SEAT, case.epoch, case.mine.owner, case.now, rooms=0)
    return case


def expired() -> Case:
    case = holding(TTL_S)
    case.now = TTL_S
    case.registry.tick(case.now)
    return case


def left() -> Case:
    case = holding(TTL_S)
    case.registry.leave(NAME, SEAT, case.epoch, case.mine.owner, case.now)
    return case


def replaced() -> Case:
    case = holding(TTL_S)
    case.registry.claim(claim(port=50000), case.now)
    return case


def superseded() -> Case:
    """Seat 0 is the whole of the next incarnation, which the neighbour's host has begun; the neighbour made way."""
    case = holding(TTL_S)
    case.registry.leave(NAME, Seat(0, 0, 1, 0), None, None, case.now)
    case.registry.claim(claim(shape=TP1, port=50000), case.now)
    return case


def witnessed() -> Case:
    case = holding(None)
    case.registry.witnessed(NAME, SEAT, case.epoch, alive=True, why=None, now=case.now)
    return case


def lost() -> Case:
    case = holding(None)
    case.registry.witnessed(NAME, SEAT, case.epoch, alive=False, why="refuses connections", now=case.now)
    return case


def restored() -> Case:
    case = holding(TTL_S)
    again = Registry()
    records = [life.record() for view in case.registry for life in view.lives]
    again.restore(records, case.registry.last_epoch, case.registry.revision, now=1000.0)
    return Case(again, case.mine, case.epoch, now=1001.0, spoke_at=1000.0)


def renew(case: Case, rooms: int | None = None) -> list[Change]:
    return case.registry.renew(NAME, SEAT, case.epoch, case.mine.owner, case.now, rooms).changes


def verdict(case: Case, alive: bool) -> list[Change]:
    return case.registry.witnessed(NAME, SEAT, case.epoch, alive, "refuses connections", case.now)


STATES: dict[str, Callable[[], Case]] = {
    "absent": absent,
    "alive": lambda: holding(TTL_S),
    "suspect": suspect,
    "restored": restored,
    "draining": draining,
    "drained": drained,
    "expired": expired,
    "left": left,
    "replaced": replaced,
    "superseded": superseded,
    "stock": lambda: holding(None),
    "witnessed": witnessed,
    "lost": lost,
}

EVENTS: dict[str, Callable[[Case], list[Change]]] = {
    "same claim": lambda case: case.registry.claim(case.mine, case.now).changes,
    "other port": lambda case: case.registry.claim(claim(port=50000), case.now).changes,
    "other host": lambda case: case.registry.claim(claim(host=ELSEWHERE), case.now).changes,
    "renewal": renew,
    "no rooms left": lambda case: renew(case, rooms=0),
    "goodbye": lambda case: case.registry.leave(NAME, SEAT, case.epoch, case.mine.owner, case.now),
    "drain": lambda case: case.registry.drain(NAME, SEAT, GRACE_S, case.now),
    "witness: dead": lambda case: verdict(case, alive=False),
    "witness: alive": lambda case: verdict(case, alive=True),
    "half the lease": lambda case: case.registry.tick(max(case.now, case.spoke_at + TTL_S / 2)),
    "the whole lease": lambda case: case.registry.tick(case.spoke_at + TTL_S),
    "the grace": lambda case: case.registry.tick(case.now + GRACE_S),
}

K = ChangeKind
Expected = tuple[ChangeKind, ...] | type[PdctlError]
FREE: dict[str, Expected] = {"same claim": (K.SEATED,), "other port": (K.SEATED,), "other host": (K.SEATED,)}
NOT_HELD: dict[str, Expected] = dict.fromkeys(("renewal", "no rooms left", "goodbye"), UnknownLease)
REPLACED: dict[str, Expected] = dict.fromkeys(("renewal", "no rooms left", "goodbye"), Superseded)
NOTHING_IS_DUE: dict[str, Expected] = dict.fromkeys(("half the lease", "the whole lease", "the grace"), ())
NO_NEWS: dict[str, Expected] = {"witness: dead": (), "witness: alive": ()}
GONE: dict[str, Expected] = {**FREE, **NOT_HELD, **NOTHING_IS_DUE, **NO_NEWS, "drain": UnknownLease}
HELD: dict[str, Expected] = {
    **NO_NEWS,
    "same claim": (),
    "other port": (K.REPLACED,),
    "other host": Occupied,
    "renewal": (),
    "no rooms left": (),
    "goodbye": (K.LEFT,),
    "drain": (K.DRAINING,),
    "half the lease": (K.SUSPECTED,),
    "the whole lease": (K.EXPIRED,),
    "the grace": (K.EXPIRED,),
}
SILENT: dict[str, Expected] = {
    **HELD,
    **dict.fromkeys(("same claim", "renewal", "no rooms left"), (K.RECOVERED,)),
    "half the lease": (),
}
ANOTHER_HOLDS: dict[str, Expected] = {  # a life that began at 1, from the same host
    **HELD,
    **REPLACED,
    "half the lease": (),
    "the whole lease": (K.SUSPECTED,),
}
STOCK: dict[str, Expected] = {**HELD, **NOTHING_IS_DUE, "witness: dead": (K.LOST,), "other host": (K.REPLACED,)}

TABLE: dict[str, dict[str, Expected]] = {
    "absent": GONE,
    "alive": HELD,
    "suspect": SILENT,
    "restored": SILENT,
    "draining": {**HELD, "no rooms left": (K.DRAINED,), "the grace": (K.DRAINED,)},
    "drained": {**GONE, **REPLACED},
    "expired": GONE,
    "left": GONE,
    "replaced": {**ANOTHER_HOLDS, "same claim": (K.REPLACED,), "other port": ()},
    # the other port is the address of the life that holds the seat now, in another shape: a life keeps its shape
    "superseded": {**ANOTHER_HOLDS, "same claim": (K.SEATED,), "other port": Refused},
    "stock": STOCK,
    "witnessed": {**STOCK, "other host": Occupied},
    "lost": {
        **GONE,
        "same claim": (K.FOUND,),
        "other port": (K.REPLACED,),
        "other host": (K.REPLACED,),
        "witness: alive": (K.FOUND,),
    },
}
CELLS = [(state, event) for state in STATES for event in EVENTS]


def test_the_table_has_every_cell() -> None:
    assert {state: set(row) for state, row in TABLE.items()} == {state: set(EVENTS) for state in STATES}


def picture(registry: Registry) -> object:
    return [(view, [(life, life.pulse.suspected) for life in view.lives]) for view in registry]


@pytest.mark.parametrize(("state", "event"), CELLS, ids=[f"{state}: {event}" for state, event in CELLS])
def test_the_cell(state: str, event: str) -> None:
    case, expected = STATES[state](), TABLE[state][event]
    before = picture(case.registry)
    if isinstance(expected, tuple):
        changes = EVENTS[event](case)
        assert tuple(change.kind for change in changes) == expected
        assert [change.revision for change in changes] == sorted({change.revision for change in changes})
    else:
        with pytest.raises(expected):
            EVENTS[event](case)
    if not isinstance(expected, tuple) or not expected:
        assert picture(case.registry) == before


@pytest.mark.parametrize(
    ("state", "standing"),
    [
        ("alive", Standing.ALIVE),
        ("suspect", Standing.SUSPECT),
        ("restored", Standing.SUSPECT),
        ("draining", Standing.DRAINING),
        ("stock", Standing.ALIVE),
    ],
)
def test_a_life_stands_as_its_state_says(state: str, standing: Standing) -> None:
    case = STATES[state]()
    view = case.registry.view(NAME)
    assert view is not None
    assert view.alive[SEAT].standing(case.now) is standing


def test_a_missed_renewal_shows_before_anybody_has_looked() -> None:
    """Standing is derived: between two ticks nobody is taken for better than he is."""
    case = holding(TTL_S)
    view = case.registry.view(NAME)
    assert view is not None
    assert view.alive[SEAT].standing(TTL_S / 2 - 0.01) is Standing.ALIVE
    assert view.alive[SEAT].standing(TTL_S / 2) is Standing.SUSPECT


def test_a_renewal_gives_the_whole_lease_again() -> None:
    case = holding(TTL_S)
    for _ in range(5):
        case.now += TTL_S - 1.0
        renew(case)
        case.registry.tick(case.now)
    assert case.registry.tick(case.now + TTL_S - 0.1)[0].kind is K.SUSPECTED
    assert [change.kind for change in case.registry.tick(case.now + TTL_S)] == [K.EXPIRED]


def test_who_is_refused_hears_of_both_hosts() -> None:
    case = holding(TTL_S)
    with pytest.raises(Occupied, match=r"is held by 10\.0\.0\.1, which lives, and was claimed from 10\.0\.0\.2") as no:
        case.registry.claim(claim(host=ELSEWHERE), case.now)
    assert (no.value.holder, no.value.claimant) == (HOME, ELSEWHERE)


def test_who_was_replaced_hears_of_both_epochs() -> None:
    case = replaced()
    with pytest.raises(Superseded, match=r"is held by epoch 3, got 2: this process was replaced; exit") as no:
        renew(case)
    assert (no.value.held, no.value.got) == (3, 2)


def test_a_registry_that_heard_nobody_gives_every_lease_again() -> None:
    """A registry that was stopped for an hour must not end the leases of those who spoke to it in vain."""
    case = holding(TTL_S)
    case.registry.forgive(3600.0)
    assert [change.kind for change in case.registry.tick(3600.0)] == []
    assert [change.kind for change in case.registry.tick(3600.0 + TTL_S)] == [K.EXPIRED]


def test_a_restored_life_that_has_spoken_is_suspected_after_half_a_lease_like_any_other() -> None:
    """It was to be looked at when its whole lease is over; now that is too late."""
    case = restored()
    renew(case)
    assert [change.kind for change in case.registry.tick(case.now + TTL_S / 2)] == [K.SUSPECTED]


def test_a_draft_that_is_dropped_leaves_a_suspect_one() -> None:
    """A SUSPECT life amends itself, and the journal refuses: nobody was told that it has recovered."""
    case = suspect()
    draft = case.registry.draft()
    kinds = [change.kind for change in draft.claim(replace(case.mine, labels={"zone": "b"}), case.now).changes]
    assert kinds == [K.RECOVERED, K.AMENDED]
    before, revision = case.registry.view(NAME), draft.revision
    case.registry.skip(draft)
    assert case.registry.view(NAME) == before
    assert case.registry.revision == revision  # its numbers are not given again
    assert [change.kind for change in renew(case)] == [K.RECOVERED]


def again(registry: Registry, changes: list[Change]) -> Registry:
    """As a journal that was told of `changes` brings it back."""
    kept: dict[int, Record] = {}
    for change in changes:
        if change.before is not None:
            kept.pop(change.before.epoch, None)
        if change.is_dropped:
            kept.pop(change.life.epoch, None)
        elif change.is_kept:
            kept[change.life.epoch] = change.record
    restarted = Registry()
    records = [Record.from_row(json.loads(json.dumps(kept[epoch].to_row()))) for epoch in sorted(kept)]
    restarted.restore(records, registry.last_epoch, registry.revision, now=0.0)
    return restarted


def health(registry: Registry) -> str | None:
    view = registry.view(NAME)
    assert view is not None
    return view.health(1.0)


@pytest.mark.parametrize("how", ["expired", "left", "drained"])
def test_a_registry_that_was_restarted_knows_who_was_dead_until_somebody_comes(how: str) -> None:
    """Decodes ask for it: a 200 for a prefill that is gone holds their requests until they time out."""
    registry = Registry()
    changes = [each for tp in range(3) for each in registry.claim(claim(tp, port=40000 + tp), now=0.0).changes]
    if how == "expired":
        for tp in (1, 2):
            registry.renew(NAME, Seat(0, 0, tp, 0), tp + 1, None, now=9.0)
        changes += registry.tick(TTL_S)
    elif how == "left":
        changes += registry.leave(NAME, SEAT, 1, None, now=1.0)
    else:
        changes += registry.drain(NAME, SEAT, GRACE_S, now=1.0)
        changes += registry.renew(NAME, SEAT, 1, None, now=1.0, rooms=0).changes
    restarted = again(registry, changes)
    assert health(registry) is not None
    told = health(restarted)
    assert told is not None
    assert told.partition(",")[0] == health(registry).partition(",")[0]  # type: ignore[union-attr]
    if how == "drained":
        with pytest.raises(Superseded, match="was drained"):
            restarted.renew(NAME, SEAT, 1, None, now=1.0)
    restarted.renew(NAME, Seat(0, 0, 1, 0), 2, None, now=1.0)
    assert health(restarted) is not None, "that the others live was known before"
    changes += registry.claim(claim(port=50000), now=11.0).changes
    assert (health(registry), health(again(registry, changes))) == (None, None)


def test_an_instance_that_comes_back_one_by_one_is_starting_after_a_restart_too() -> None:
    registry = Registry()
    changes = [each for tp in range(3) for each in registry.claim(claim(tp, port=40000 + tp), now=0.0).changes]
    changes += registry.tick(TTL_S / 2) + registry.tick(TTL_S)
    assert health(again(registry, changes)) is not None
    changes += registry.claim(claim(2, port=50002), now=TTL_S).changes
    restarted = again(registry, changes)
    assert (health(registry), health(restarted)) == (None, None)
    assert [change.kind for change in restarted.tick(600.0) if change.kind is K.FORGOTTEN] == []


def test_a_journal_lets_go_of_the_dead_when_their_instance_is_forgotten() -> None:
    registry = Registry()
    changes = registry.claim(claim(), now=0.0).changes
    for now in (TTL_S / 2, TTL_S, TTL_S + REMEMBER_S):
        changes += registry.tick(now)
    assert [change.kind for change in changes] == [K.SEATED, K.SUSPECTED, K.EXPIRED, K.FORGOTTEN]
    assert len(again(registry, changes)) == 0
