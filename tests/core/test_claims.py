"""Restarts with other settings, whom a seat may be taken from, what is remembered of the dead, and how much is held."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.capacity import RegistryLimits
from pdctl.core.claims import STALLED_AFTER_S
from pdctl.core.instances import InstanceView
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import ERA, Claim, Life, Owner, Record
from pdctl.core.registry import REMEMBER_S, Registry
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import BadField, LimitReached, Occupied, Refused, Superseded, TooLarge, UnknownLease

NAME = "a"
TP4 = Shape(attn_tp_size=4, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
TP2 = replace(TP4, attn_tp_size=2)
TP1 = replace(TP4, attn_tp_size=1)
HOME, ELSEWHERE = "10.0.0.1", "10.0.0.2"
K = ChangeKind


def claim(
    tp: int,
    shape: Shape,
    *,
    host: str = HOME,
    port: int = 0,
    principal: str | None = None,
    instance: str = NAME,
    dp: int = 0,
    **more: Any,
) -> Claim:
    announcement = Announcement(Seat(dp, 0, tp, 0), shape, Endpoint(host, port or 40000 + 100 * shape.n_seats + tp))
    return Claim(instance, announcement, Owner(host, principal), **more)


def complete(shape: Shape, **more: Any) -> Registry:
    registry = Registry()
    for tp in range(shape.attn_tp_size):
        registry.claim(claim(tp, shape, **more), now=0.0)
    return registry


def seen(registry: Registry, instance: str = NAME) -> InstanceView:
    view = registry.view(instance)
    assert view is not None
    return view


def lose(registry: Registry, *tps: int, now: float = 1.0) -> None:
    for tp in tps:
        seat = Seat(0, 0, tp, 0)
        registry.witnessed(NAME, seat, seen(registry).alive[seat].epoch, alive=False, why="is silent", now=now)


@pytest.mark.parametrize("ttl_s", [None, 10.0], ids=["stock", "leased"])
def test_a_prefill_restarted_with_half_the_ranks_is_served_when_its_own_seats_are_full(ttl_s: float | None) -> None:
    registry = complete(TP4, ttl_s=ttl_s)
    assert [change.kind for change in registry.claim(claim(1, TP2, ttl_s=ttl_s), now=1.0).changes] == [K.SEATED]
    assert (seen(registry).shape, seen(registry).ready) == (TP4, True)
    changes = registry.claim(claim(0, TP2, ttl_s=ttl_s), now=2.0).changes
    assert [change.kind for change in changes] == [K.SEATED, *[K.SUPERSEDED] * 4, K.RESHAPED, K.COMPLETED]
    assert (seen(registry).shape, seen(registry).ready, len(seen(registry).alive)) == (TP2, True, 2)
    assert {life.announcement.shape for life in seen(registry).lives} == {TP2}


def test_a_rank_of_the_old_incarnation_is_told_that_it_was_replaced() -> None:
    registry = complete(TP4, ttl_s=10.0)
    for tp in (0, 1):
        registry.claim(claim(tp, TP2, ttl_s=10.0), now=1.0)
    for tp in range(4):
        with pytest.raises(Superseded, match="this process was replaced; exit"):
            registry.renew(NAME, Seat(0, 0, tp, 0), tp + 1, Owner(HOME), now=2.0)


def test_a_rank_of_a_registry_that_has_forgotten_it_is_to_register_again_and_not_to_exit() -> None:
    registry = Registry()
    registry.restore((), last_epoch=7 * ERA, revision=0, now=0.0)  # as one that starts with nothing
    for tp in (1, 2):
        assert registry.claim(claim(tp, TP4, ttl_s=10.0), now=0.0).life.epoch > 7 * ERA
    for epoch in (1, 6 * ERA + 1, 9 * ERA):
        for tp in (0, 1):
            with pytest.raises(UnknownLease, match="register again"):
                registry.renew(NAME, Seat(0, 0, tp, 0), epoch, Owner(HOME), now=1.0)
    registry.claim(claim(1, TP4, port=50000, ttl_s=10.0), now=1.0)
    with pytest.raises(Superseded):
        registry.renew(NAME, Seat(0, 0, 1, 0), 7 * ERA + 1, Owner(HOME), now=1.0)


def test_the_forming_incarnation_is_shown_at_once_when_nobody_is_left_of_the_old() -> None:
    registry = complete(TP4)
    registry.claim(claim(0, TP2), now=1.0)
    lose(registry, 0, 1, 2)
    assert seen(registry).shape == TP4
    lose(registry, 3)
    assert (seen(registry).shape, seen(registry).forming, seen(registry).ready) == (TP2, None, False)
    assert seen(registry).health(now=9.0) is None


def test_an_incarnation_that_everybody_has_left_again_leaves_the_served_one_alone() -> None:
    registry = complete(TP4)
    life = registry.claim(claim(0, TP2), now=1.0).life
    registry.leave(NAME, life.seat, life.epoch, Owner(HOME), now=2.0)
    assert (seen(registry).shape, seen(registry).ready, seen(registry).forming) == (TP4, True, None)


def test_a_third_shape_takes_the_place_of_the_one_that_forms() -> None:
    registry = complete(TP4)
    first = registry.claim(claim(0, TP2), now=1.0).life
    page = replace(TP2, page_size=64)
    changes = registry.claim(claim(0, page, port=50000), now=2.0).changes
    assert [(change.kind, change.life.epoch) for change in changes] == [(K.SEATED, 6), (K.SUPERSEDED, first.epoch)]
    registry.claim(claim(1, page, port=50001), now=3.0)
    assert (seen(registry).shape, seen(registry).ready) == (page, True)


def test_a_rank_with_wrong_flags_does_not_spoil_the_restart_it_belongs_to() -> None:
    registry = complete(TP4)
    registry.claim(claim(0, TP2), now=1.0)
    with pytest.raises(Refused, match="page_size is 16 for this prefill but this rank offers 64"):
        registry.claim(claim(1, replace(TP2, page_size=64)), now=2.0)
    registry.claim(claim(1, TP2), now=3.0)
    assert (seen(registry).shape, seen(registry).ready) == (TP2, True)


def test_a_half_started_instance_that_was_given_up_does_not_lock_out_the_next() -> None:
    """Rank 3 of 4 came and no other: a restart with 2 ranks never claims its seat, so that time has to tell."""
    registry = Registry()
    registry.claim(claim(3, TP4), now=0.0)
    with pytest.raises(Refused):
        registry.claim(claim(0, TP2), now=STALLED_AFTER_S - 1.0)
    for tp in (0, 1):
        registry.claim(claim(tp, TP2), now=STALLED_AFTER_S)
    assert (seen(registry).shape, seen(registry).ready) == (TP2, True)


@pytest.mark.parametrize("later", [0, 1, 2, 3])
def test_a_claim_of_a_held_address_in_another_shape_is_refused(later: int) -> None:
    registry = complete(TP4)
    with pytest.raises(Refused):
        registry.claim(claim(0, TP2, port=40400 + later), now=1000.0)


def test_roles_do_not_mix_in_one_instance() -> None:
    registry = Registry()
    registry.claim(claim(0, TP4), now=0.0)
    with pytest.raises(Refused, match="role is 'prefill' for this prefill but this rank offers 'decode'"):
        registry.claim(claim(1, TP4, role="decode"), now=1.0)


def test_a_name_changes_its_role_when_nobody_is_left_of_the_old_one_or_it_drains() -> None:
    """A decode under its prefill's name, on one host, would else be taken for the prefill's restart."""
    registry = complete(TP2)
    taken = [claim(tp, TP2, port=50000 + tp, role="decode") for tp in (0, 1)]
    with pytest.raises(Occupied, match=r"serves as prefill from 10\.0\.0\.1, and 10\.0\.0\.1 wants it as decode"):
        registry.claim(taken[0], now=1.0)
    registry.drain("a", None, grace_s=300.0, now=2.0)
    for each in taken:
        registry.claim(each, now=3.0)
    assert (seen(registry).role, seen(registry).ready) == ("decode", True)
    for seat in list(seen(registry).alive):
        registry.leave("a", seat, None, None, now=4.0)
    registry.claim(claim(0, TP2), now=5.0)
    assert seen(registry).role == "prefill"


MAY_END: dict[str, tuple[str | None, Owner, bool, bool]] = {
    # the row's token, who asks -> may drain it?, may deregister it?
    "own token": ("ci", Owner(ELSEWHERE, "ci"), True, True),
    "another token": ("ci", Owner(HOME, "other"), False, False),
    "an admin": ("ci", Owner(ELSEWHERE, "ops", admin=True), True, True),
    "stock, own host, some token": (None, Owner(HOME, "other"), True, True),
    "stock, another host, some token": (None, Owner(ELSEWHERE, "other"), False, False),
    "stock, an admin": (None, Owner(ELSEWHERE, "ops", admin=True), True, True),
    "no tokens here, own host": (None, Owner(HOME), True, True),
    "no tokens here, another host": (None, Owner(ELSEWHERE), True, False),
}


@pytest.mark.parametrize(("principal", "asks", "may_drain", "may_leave"), MAY_END.values(), ids=MAY_END)
@pytest.mark.parametrize("seat", [Seat(0, 0, 1, 0), None], ids=["rank", "instance"])
def test_who_may_end_what(
    seat: Seat | None, principal: str | None, asks: Owner, may_drain: bool, may_leave: bool
) -> None:
    registry = complete(TP2, principal=principal, ttl_s=60.0)
    before = registry.revision
    if may_drain:
        changes = registry.drain("a", seat, 60.0, 1.0, asks)
        assert {change.why for change in changes} == {f"{asks} asked for it"}
        assert len(changes) == (1 if seat else 2)
    else:
        with pytest.raises(Occupied, match="with a token of the admin role"):
            registry.drain("a", seat, 60.0, 1.0, asks)
        assert (registry.revision, seen(registry).draining) == (before, False)
    if may_leave:
        (change, *_) = registry.leave("a", Seat(0, 0, 0, 0), None, asks, 2.0)
        assert change.why == ("said goodbye" if not asks.admin else f"was deregistered by {asks}")
    else:
        with pytest.raises(Occupied, match="with a token of the admin role"):
            registry.leave("a", Seat(0, 0, 0, 0), None, asks, 2.0)
        assert len(seen(registry).alive) == 2


def test_an_instance_of_several_owners_is_drained_whole_or_not_at_all() -> None:
    registry = Registry()
    for tp, name in ((0, "mine"), (1, "theirs")):
        registry.claim(claim(tp, TP2, principal=name), now=0.0)
    with pytest.raises(Occupied, match="seat dp0/cp0/tp1/pp0 of a was registered by theirs at"):
        registry.drain("a", None, 60.0, 1.0, Owner(HOME, "mine"))
    assert not any(life.is_draining for life in seen(registry).alive.values())


def test_an_admin_keeps_nobodys_lease_alive() -> None:
    """Nor takes a seat: who ends a rank does not have to be able to be one."""
    registry = complete(TP2, principal="ci", ttl_s=60.0)
    admin = Owner(HOME, "ops", admin=True)
    epoch = seen(registry).alive[Seat(0, 0, 0, 0)].epoch
    with pytest.raises(Occupied):
        registry.renew("a", Seat(0, 0, 0, 0), epoch, admin, 1.0)
    with pytest.raises(Occupied):
        registry.claim(replace(claim(0, TP2, port=50000), owner=admin), now=1.0)


OWNERS = {
    # (holder's ttl, holder's witness, holder's principal), (claimant's host, principal) -> taken?
    "stock, own host": ((None, False, None), (HOME, None), True),
    "stock, other host": ((None, False, None), (ELSEWHERE, None), True),
    "witnessed, own host": ((None, True, None), (HOME, None), True),
    "witnessed, other host": ((None, True, None), (ELSEWHERE, None), False),
    "leased, own host": ((10.0, False, None), (HOME, None), True),
    "leased, other host": ((10.0, False, None), (ELSEWHERE, None), False),
    "token, same token": ((10.0, False, "ci"), (HOME, "ci"), True),
    "token, none": ((10.0, False, "ci"), (HOME, None), False),
    "token, another": ((10.0, False, "ci"), (HOME, "other"), False),
    "token, same, other host": ((10.0, False, "ci"), (ELSEWHERE, "ci"), False),
    "stock token, none": ((None, False, "ci"), (HOME, None), False),
    "stock token, same, other host": ((None, False, "ci"), (ELSEWHERE, "ci"), True),
}


@pytest.mark.parametrize("shape", [TP4, TP2], ids=["same shape", "restart"])
@pytest.mark.parametrize(("holder", "claimant", "taken"), OWNERS.values(), ids=OWNERS)
def test_whom_a_seat_may_be_taken_from(
    holder: tuple[float | None, bool, str | None], claimant: tuple[str, str | None], taken: bool, shape: Shape
) -> None:
    ttl_s, witnessed, principal = holder
    registry = complete(TP4, ttl_s=ttl_s, principal=principal)
    for life in list(seen(registry).lives) if witnessed else ():
        registry.witnessed(NAME, life.seat, life.epoch, alive=True, why=None, now=1.0)
    mine = claim(0, shape, host=claimant[0], principal=claimant[1], port=50000)
    if taken:
        assert registry.claim(mine, now=2.0).life.epoch == 5
    else:
        with pytest.raises(Occupied):
            registry.claim(mine, now=2.0)


def test_a_foreign_host_cannot_join_a_restart_while_the_old_ranks_live() -> None:
    registry = complete(TP4, ttl_s=10.0)
    registry.claim(claim(0, TP2, ttl_s=10.0), now=1.0)
    with pytest.raises(Occupied):
        registry.claim(claim(1, TP2, host=ELSEWHERE), now=2.0)


@pytest.mark.parametrize(
    ("lost", "dead"),
    [([], False), ([(0, 0)], False), ([(0, 0), (0, 1)], False), ([(0, 0), (1, 1)], True)],
    ids=["none", "one rank", "one group", "a rank of each group"],
)
def test_an_instance_is_dead_when_no_dp_group_is_whole(lost: list[tuple[int, int]], dead: bool) -> None:
    shape = replace(TP2, dp_size=2)
    registry = Registry()
    for dp, tp in ((0, 0), (0, 1), (1, 0), (1, 1)):
        registry.claim(claim(tp, shape, dp=dp), now=0.0)
    for dp, tp in lost:
        seat = Seat(dp, 0, tp, 0)
        registry.witnessed(NAME, seat, seen(registry).alive[seat].epoch, alive=False, why="is silent", now=1.0)
    assert (seen(registry).health(now=2.0) is not None) == dead


def test_an_instance_that_starts_again_is_not_dead_any_more() -> None:
    registry = complete(TP2)
    lose(registry, 0, 1)
    assert "at 10.0.0.1:40200 is silent, 8 s ago" in (seen(registry).health(now=9.0) or "")
    registry.claim(claim(0, TP2, port=50000), now=10.0)
    assert seen(registry).health(now=10.0) is None


def test_a_rank_lost_while_its_instance_starts_is_not_its_death() -> None:
    registry = Registry()
    registry.claim(claim(0, TP4, ttl_s=10.0), now=0.0)
    registry.claim(claim(1, TP4), now=0.0)
    registry.tick(10.0)
    assert seen(registry).health(now=10.0) is None


def test_an_instance_that_nobody_is_left_of_is_forgotten_in_time() -> None:
    registry = complete(TP2, ttl_s=10.0)
    registry.tick(10.0)
    assert seen(registry).health(now=10.0) is not None
    assert registry.tick(10.0 + REMEMBER_S - 1.0) == []
    assert seen(registry)
    registry.tick(10.0 + REMEMBER_S)
    assert (registry.view(NAME), len(registry)) == (None, 0)
    with pytest.raises(UnknownLease, match="register again"):
        registry.renew(NAME, Seat(0, 0, 0, 0), 1, Owner(HOME), now=700.0)
    assert registry.claim(claim(0, TP2), now=701.0).life.epoch == 3  # no number is given twice


def test_ranks_that_a_witness_may_find_again_are_not_forgotten() -> None:
    registry = complete(TP2)
    lose(registry, 0, 1)
    for days in range(1, 10):
        registry.tick(86_400.0 * days)
    changes = registry.witnessed(NAME, Seat(0, 0, 1, 0), 2, alive=True, why=None, now=1e6)
    assert [change.kind for change in changes] == [K.FOUND]
    assert registry.witnessed(NAME, Seat(0, 0, 0, 0), 1, alive=True, why=None, now=1e6)[-1].kind is K.COMPLETED


def test_instances_beyond_the_limit_are_refused_until_an_empty_one_makes_place() -> None:
    registry = Registry(RegistryLimits(max_instances=2))
    for name in ("a", "b"):
        registry.claim(claim(0, TP1, instance=name), now=0.0)
    with pytest.raises(LimitReached, match=r"2 instances are held, the limit \(max_instances\)"):
        registry.claim(claim(0, TP1, instance="c"), now=1.0)
    assert registry.claim(claim(0, TP1, instance="b", port=50000), now=1.0).life.epoch == 3
    registry.leave("a", Seat(0, 0, 0, 0), None, None, now=2.0)
    registry.tick(2.0)
    assert registry.claim(claim(0, TP1, instance="c"), now=3.0).life.epoch == 4
    assert [view.name for view in registry] == ["b", "c"]


def test_ranks_beyond_the_limit_are_refused_and_restarts_go_on() -> None:
    registry = Registry(RegistryLimits(max_ranks=2))
    for tp in (0, 1):
        registry.claim(claim(tp, TP4), now=0.0)
    with pytest.raises(LimitReached, match=r"2 ranks are held, the limit \(max_ranks\)"):
        registry.claim(claim(2, TP4), now=1.0)
    assert registry.claim(claim(1, TP4, port=50000), now=1.0).changes[0].kind is K.REPLACED
    assert registry.full == ["2 ranks are held, the limit (max_ranks)"]


@pytest.mark.parametrize(
    ("more", "limit"),
    [
        ({"labels": {str(n): "" for n in range(33)}}, "max_labels"),
        ({"metadata": {"text": "x" * 20_000}}, "max_metadata_nbytes"),
        ({"labels": {"text": "x" * 20_000}}, "max_metadata_nbytes"),
    ],
    ids=["labels", "metadata", "long labels"],
)
def test_what_a_rank_says_of_itself_is_bounded(more: dict[str, Any], limit: str) -> None:
    registry = Registry()
    with pytest.raises(TooLarge, match=limit):
        registry.claim(claim(0, TP1, **more), now=0.0)
    assert len(registry) == 0


@pytest.mark.parametrize(
    ("more", "field"),
    [
        *(({"ttl_s": ttl_s}, "ttl_s") for ttl_s in (0.0, -1.0, 1e9, float("nan"), float("inf"))),
        *(({"instance": name}, "instance") for name in ("", "x" * 254, "a\nb")),
        ({"role": ""}, "role"),
    ],
)
def test_a_claim_that_nobody_can_mean_names_its_field(more: dict[str, Any], field: str) -> None:
    with pytest.raises(BadField) as refusal:
        claim(0, TP1, **more)
    assert refusal.value.field == field


RECORDS = {
    "stock": Record(claim(0, TP4), epoch=7, incarnation=3),
    "leased": Record(claim(0, TP4, ttl_s=5.0, labels={"zone": "a"}, metadata={"n": [1, None]}), 7, 3),
    "token": Record(claim(0, TP4, principal="ci", role="decode"), 7, 3),
    "draining": Record(claim(0, TP4), 7, 3, grace_s=30.0),
    "lost": Record(claim(0, TP4), 7, 3, lost="is silent"),
    "no page size": Record(claim(0, replace(TP4, page_size=None)), 7, 3),
    "IPv6": Record(claim(0, TP4, host="fd00::7"), 7, 3),
    "layout": Record(claim(0, replace(TP4, dsv41_spec_layout={"a": [1]}, kv_layout="x"), instance="ä"), 7, 3),
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_comes_back_from_its_row(record: Record) -> None:
    assert Record.from_row(json.loads(json.dumps(record.to_row()))) == record


def test_a_row_holds_no_time() -> None:
    life = Life.begin(claim(0, TP4, ttl_s=10.0), epoch=1, incarnation=1, now=123456.0).draining(5.0, now=123457.0)
    assert "12345" not in json.dumps(life.record().to_row())


def test_a_restart_in_the_middle_of_a_restart_keeps_both_incarnations_apart() -> None:
    registry = complete(TP4)
    registry.claim(claim(0, TP2), now=1.0)
    lives = list(seen(registry).lives)
    again = Registry()
    again.restore([life.record() for life in lives], registry.last_epoch, registry.revision, now=0.0)
    assert (seen(again).shape, seen(again).ready) == (TP4, True)
    again.claim(claim(1, TP2), now=1.0)
    assert (seen(again).shape, seen(again).ready) == (TP2, True)


def test_a_million_comings_and_goings_leave_nothing_scheduled() -> None:
    """Leases of a day, given up at once: what was to be looked at tomorrow must not pile up."""
    registry = Registry()
    registry.claim(claim(0, TP2), now=0.0)
    for n in range(10_000):
        life = registry.claim(claim(1, TP2, port=1024 + n, ttl_s=86_400.0), now=float(n)).life
        registry.leave(NAME, life.seat, life.epoch, None, now=float(n))
    assert len(registry._agenda) == 0
    assert registry._agenda.n_held < 200
    assert seen(registry).n_remembered == 2
