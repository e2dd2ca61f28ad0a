"""Readiness is set equality, a life has an epoch, and what is refused changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Change, Claim, Owner
from pdctl.core.registry import Registry
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import Refused

NAME = "default"
TP2 = Shape(attn_tp_size=2, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
TP1 = replace(TP2, attn_tp_size=1)


def claim(
    tp: int = 0,
    shape: Shape = TP2,
    host: str = "10.0.0.1",
    port: int = 0,
    http: int | None = None,
    *,
    ttl_s: float | None = None,
    instance: str = NAME,
) -> Claim:
    announcement = Announcement(Seat(0, 0, tp, 0), shape, Endpoint(host, port or 40000 + tp), http)
    return Claim(instance, announcement, Owner(host), ttl_s=ttl_s)


def registry(*claims: Claim) -> Registry:
    fresh = Registry()
    for each in claims:
        fresh.claim(each, now=0.0)
    return fresh


def kinds(changes: list[Change]) -> list[ChangeKind]:
    return [change.kind for change in changes]


def ready(held: Registry) -> bool:
    view = held.view(NAME)
    return view is not None and view.ready


def epoch(held: Registry, tp: int = 0) -> int:
    view = held.view(NAME)
    assert view is not None
    return view.alive[Seat(0, 0, tp, 0)].epoch


def picture(held: Registry) -> object:
    return [(view.name, view.shape, dict(view.alive), view.last_epoch) for view in held]


def test_a_retried_put_does_not_fill_a_second_seat() -> None:
    held = registry(claim(0))
    assert held.claim(claim(0), now=1.0).changes == []
    assert not ready(held)


def test_an_instance_is_ready_when_its_last_seat_is_taken() -> None:
    held = registry(claim(1))
    assert kinds(held.claim(claim(0), now=1.0).changes) == [ChangeKind.SEATED, ChangeKind.COMPLETED]
    assert ready(held)


def test_the_missing_seats_are_named_in_order() -> None:
    view = registry(claim(2, replace(TP2, attn_tp_size=4))).view(NAME)
    assert view is not None
    assert [str(seat) for seat in view.missing] == ["dp0/cp0/tp0/pp0", "dp0/cp0/tp1/pp0", "dp0/cp0/tp3/pp0"]


def test_the_same_address_again_is_the_same_life() -> None:
    held = registry(claim(0), claim(1))
    before = picture(held)
    assert held.claim(claim(0), now=99.0).changes == []
    assert picture(held) == before


@pytest.mark.parametrize("moved", [claim(0, port=50000), claim(0, host="10.0.0.2")], ids=["other port", "other host"])
def test_a_new_address_is_a_new_life_with_a_higher_epoch(moved: Claim) -> None:
    held = registry(claim(0), claim(1))
    (change,) = held.claim(moved, now=1.0).changes
    assert change.kind is ChangeKind.REPLACED
    assert change.before is not None
    assert change.before.address == Endpoint("10.0.0.1", 40000)
    assert epoch(held, 0) > epoch(held, 1) == 2
    assert held.find(NAME, Seat(0, 0, 0, 0)) == moved.address
    assert ready(held)


def test_another_http_port_amends_the_life_that_says_it() -> None:
    held = registry(claim(0, http=1))
    (change,) = held.claim(claim(0, http=2), now=1.0).changes
    assert (change.kind, change.life.epoch) == (ChangeKind.AMENDED, 1)
    view = held.view(NAME)
    assert view is not None
    assert view.http_port == 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["lowest first", "lowest last"])
def test_the_http_port_does_not_depend_on_who_came_first(order: tuple[int, int]) -> None:
    view = registry(*(claim(tp, http=30000 + tp) for tp in order)).view(NAME)
    assert view is not None
    assert view.http_port == 30000


CONTRADICTIONS = [
    ("attn_tp_size", 4),
    ("attn_cp_size", 2),
    ("dp_size", 2),
    ("pp_size", 2),
    ("page_size", 64),
    ("kv_cache_dtype", "fp8_e4m3"),
    ("kv_layout", "flashmla"),
    ("dsv41_spec_layout", {"num_draft_tokens": 5}),
    ("follow_bootstrap_room", False),
    ("enable_dsa_cache_layer_split", True),
    ("enable_kv_cache_sharding", True),
    ("decode_allocation_policy", "prefill_complete"),
]


def test_every_field_of_the_shape_is_compared() -> None:
    assert {name for name, _ in CONTRADICTIONS} == set(Shape.__dataclass_fields__)


@pytest.mark.parametrize(("name", "value"), CONTRADICTIONS)
def test_a_rank_that_contradicts_its_instance_is_refused_with_both_values(name: str, value: object) -> None:
    held = registry(claim(0))
    before = picture(held)
    with pytest.raises(Refused) as refusal:
        held.claim(claim(1, replace(TP2, **{name: value})), now=1.0)  # type: ignore[arg-type]
    assert (refusal.value.held, refusal.value.offered) == (getattr(TP2, name), value)
    assert f"but this rank offers {value!r}" in str(refusal.value)
    assert "start every rank with the same" in str(refusal.value)
    assert picture(held) == before


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"dsv41_spec_layout": {"a": 1}}, "DeepSeek-V4.1 DSpark PD layout differs across prefill ranks"),
        ({"decode_allocation_policy": "prefill_complete", "page_size": 64}, "Inconsistent prefill allocation policies"),
    ],
    ids=["layout", "policy"],
)
def test_where_stock_has_a_sentence_ours_begins_with_it(changed: dict[str, object], sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        registry(claim(0)).claim(claim(1, replace(TP2, **changed)), now=1.0)  # type: ignore[arg-type]
    assert str(refusal.value).startswith(sentence)


def test_of_two_layouts_only_the_keys_that_differ_are_told() -> None:
    one, other = ({"same": list(range(1000)), "a": number} for number in (1, 2))
    with pytest.raises(Refused, match=r"is {'a': 1} for this prefill but this rank offers {'a': 2}") as refusal:
        registry(claim(0, replace(TP2, dsv41_spec_layout=one))).claim(
            claim(1, replace(TP2, dsv41_spec_layout=other)), now=1.0
        )
    assert len(str(refusal.value)) < 400


RESTARTED = [ChangeKind.SEATED, ChangeKind.SUPERSEDED, ChangeKind.RESHAPED, ChangeKind.COMPLETED]


def test_a_single_rank_prefill_restarted_with_other_settings_takes_its_seat_again() -> None:
    held = registry(claim(0, TP1))
    assert kinds(held.claim(claim(0, replace(TP1, page_size=64), port=50000), now=1.0).changes) == RESTARTED
    view = held.view(NAME)
    assert view is not None
    assert (view.shape.page_size, epoch(held)) == (64, 2)


def test_an_instance_restarted_as_two_is_served_in_its_old_shape_until_both_came() -> None:
    held = registry(claim(0, TP1))
    assert kinds(held.claim(claim(0, TP2, port=50000), now=1.0).changes) == [ChangeKind.SEATED]
    view = held.view(NAME)
    assert view is not None
    assert (view.ready, view.shape) == (True, TP1)
    assert kinds(held.claim(claim(1), now=2.0).changes) == RESTARTED
    view = held.view(NAME)
    assert view is not None
    assert (view.ready, view.shape, view.forming) == (True, TP2, None)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([claim(0, TP1)], claim(0, replace(TP1, page_size=64))),
        ([claim(0)], claim(1, replace(TP2, page_size=64), port=50000)),
    ],
    ids=["same life", "a free seat of an instance that forms"],
)
def test_a_contradiction_that_is_no_restart_is_refused(first: list[Claim], second: Claim) -> None:
    held = registry(*first)
    before = picture(held)
    with pytest.raises(Refused):
        held.claim(second, now=1.0)
    assert picture(held) == before


def test_instances_do_not_mix() -> None:
    held = registry(claim(0))
    held.claim(claim(1, replace(TP2, page_size=64), instance="other"), now=1.0)
    assert [len(view.alive) for view in held] == [1, 1]
    assert held.find("other", Seat(0, 0, 0, 0)) is None
    assert held.find("nobody", Seat(0, 0, 0, 0)) is None
    assert held.view("nobody") is None
