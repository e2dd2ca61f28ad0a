"""Readiness is set equality, a life has an epoch, and what is refused changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdctl.core.address import Endpoint
from pdctl.core.registry import Change, ChangeKind, Registry
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import Refused

NAME = "default"
TP2 = Shape(attn_tp_size=2, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
TP1 = replace(TP2, attn_tp_size=1)


def claim(
    tp: int = 0, shape: Shape = TP2, host: str = "10.0.0.1", port: int = 0, http: int | None = None
) -> Announcement:
    return Announcement(Seat(0, 0, tp, 0), shape, Endpoint(host, port or 40000 + tp), http)


def registry(*claims: Announcement) -> Registry:
    fresh = Registry()
    for each in claims:
        fresh.register(NAME, each, now=0.0)
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
    assert held.register(NAME, claim(0), now=1.0) == []
    assert not ready(held)


def test_an_instance_is_ready_when_its_last_seat_is_taken() -> None:
    held = registry(claim(1))
    assert kinds(held.register(NAME, claim(0), now=1.0)) == [ChangeKind.SEATED, ChangeKind.COMPLETED]
    assert ready(held)


def test_the_missing_seats_are_named_in_order() -> None:
    view = registry(claim(2, replace(TP2, attn_tp_size=4))).view(NAME)
    assert view is not None
    assert [str(seat) for seat in view.missing] == ["dp0/cp0/tp0/pp0", "dp0/cp0/tp1/pp0", "dp0/cp0/tp3/pp0"]


def test_the_same_address_again_is_the_same_life() -> None:
    held = registry(claim(0), claim(1))
    before = picture(held)
    assert held.register(NAME, claim(0), now=99.0) == []
    assert picture(held) == before


@pytest.mark.parametrize("moved", [claim(0, port=50000), claim(0, host="10.0.0.2")], ids=["other port", "other host"])
def test_a_new_address_is_a_new_life_with_a_higher_epoch(moved: Announcement) -> None:
    held = registry(claim(0), claim(1))
    (change,) = held.register(NAME, moved, now=1.0)
    assert (change.kind, change.before) == (ChangeKind.REPLACED, Endpoint("10.0.0.1", 40000))
    assert epoch(held, 0) > epoch(held, 1) == 2
    assert held.find(NAME, Seat(0, 0, 0, 0)) == moved.address
    assert ready(held)


def test_another_http_port_amends_the_life_that_says_it() -> None:
    held = registry(claim(0, http=1))
    (change,) = held.register(NAME, claim(0, http=2), now=1.0)
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
        held.register(NAME, claim(1, replace(TP2, **{name: value})), now=1.0)  # type: ignore[arg-type]
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
        registry(claim(0)).register(NAME, claim(1, replace(TP2, **changed)), now=1.0)  # type: ignore[arg-type]
    assert str(refusal.value).startswith(sentence)


def test_of_two_layouts_only_the_keys_that_differ_are_told() -> None:
    one, other = ({"same": list(range(1000)), "a": number} for number in (1, 2))
    with pytest.raises(Refused, match=r"is {'a': 1} for this prefill but this rank offers {'a': 2}") as refusal:
        registry(claim(0, replace(TP2, dsv41_spec_layout=one))).register(
            NAME, claim(1, replace(TP2, dsv41_spec_layout=other)), now=1.0
        )
    assert len(str(refusal.value)) < 400


def test_a_single_rank_prefill_restarted_with_other_settings_takes_its_seat_again() -> None:
    held = registry(claim(0, TP1))
    changes = held.register(NAME, claim(0, replace(TP1, page_size=64), port=50000), now=1.0)
    assert kinds(changes) == [ChangeKind.RESHAPED, ChangeKind.COMPLETED]
    view = held.view(NAME)
    assert view is not None
    assert (view.shape.page_size, epoch(held)) == (64, 2)


def test_a_single_rank_prefill_restarted_as_two_is_incomplete_until_both_came() -> None:
    held = registry(claim(0, TP1))
    assert kinds(held.register(NAME, claim(0, TP2, port=50000), now=1.0)) == [ChangeKind.RESHAPED]
    assert not ready(held)
    held.register(NAME, claim(1), now=2.0)
    assert ready(held)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([claim(0, TP1)], claim(0, replace(TP1, page_size=64))),
        ([claim(0, TP1)], claim(0, replace(TP1, page_size=64), host="10.0.0.2", port=50000)),
        ([claim(0), claim(1)], claim(0, replace(TP2, page_size=64), port=50000)),
        ([claim(0)], claim(1, replace(TP2, page_size=64), port=50000)),
    ],
    ids=["same life", "other host", "other seats are held", "another seat"],
)
def test_any_other_contradiction_is_no_restart(first: list[Announcement], second: Announcement) -> None:
    held = registry(*first)
    before = picture(held)
    with pytest.raises(Refused):
        held.register(NAME, second, now=1.0)
    assert picture(held) == before


def test_instances_do_not_mix() -> None:
    held = registry(claim(0))
    held.register("other", claim(1, replace(TP2, page_size=64)), now=1.0)
    assert [len(view.alive) for view in held] == [1, 1]
    assert held.find("other", Seat(0, 0, 0, 0)) is None
    assert held.find("nobody", Seat(0, 0, 0, 0)) is None
    assert held.view("nobody") is None


class RegistryMachine(RuleBasedStateMachine):
    """Any order of claims, against a model that keeps the claims it believes in and derives everything anew."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry()
        self.journal: list[Change] = []
        self.model: dict[Seat, Announcement] = {}
        self.epochs: dict[Seat, int] = {}
        self.highest = 0

    @rule(
        tp=st.integers(0, 3),
        size=st.integers(1, 4),
        pp=st.integers(1, 2),
        page=st.sampled_from([16, 64]),
        host=st.sampled_from(["a", "b"]),
        port=st.integers(1, 3),
    )
    def put(self, tp: int, size: int, pp: int, page: int, host: str, port: int) -> None:
        shape = Shape(size, 1, 1, pp, page, None)
        mine = Announcement(Seat(0, 0, tp % size, tp % pp), shape, Endpoint(host, port))
        held, believed = self.model.get(mine.seat), self.model.copy()
        known = {each.shape for each in believed.values()}
        alone = set(believed) == {mine.seat}
        restart = held is not None and alone and held.address.host == host and held.address.port != port
        if known and shape not in known and not restart:
            with pytest.raises(Refused):
                self.registry.register(NAME, mine, now=0.0)
            return
        changes = self.registry.register(NAME, mine, now=0.0)
        self.journal += changes
        if shape not in known:
            self.model.clear()
            self.epochs.clear()
        self.model[mine.seat] = mine
        self.expect(mine, held, changes)

    def expect(self, mine: Announcement, held: Announcement | None, changes: list[Change]) -> None:
        if held == mine:
            assert changes == []
            return
        life = changes[0].life
        assert life.epoch > self.highest
        self.highest = self.epochs[mine.seat] = life.epoch
        assert changes[0].before == (held.address if held else None)

    @invariant()
    def the_view_is_what_the_model_believes(self) -> None:
        view = self.registry.view(NAME)
        if view is None:
            assert not self.model
            return
        assert {seat: life.announcement for seat, life in view.alive.items()} == self.model
        assert {seat: life.epoch for seat, life in view.alive.items()} == self.epochs
        assert {each.shape for each in self.model.values()} == {view.shape}
        assert view.ready == (set(self.model) == view.shape.seats())
        assert set(view.missing) == view.shape.seats() - set(self.model)

    @invariant()
    def its_changes_rebuild_it(self) -> None:
        again = Registry()
        for change in self.journal:
            again.restore(change, now=0.0)
        assert picture(again) == picture(self.registry)


RegistryMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestRegistryMachine = RegistryMachine.TestCase
