"""What ranks say and are told, in both directions; every field's limits."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.address import Endpoint
from pdctl.core.route import (
    MAX_SEATS,
    Announcement,
    Seat,
    Shape,
    rank_body,
    rank_from_body,
    shape_from_topology,
    topology_body,
)
from pdctl.errors import BadField

JSON = dict[str, Any]

STOCK_KEYS = {  # SGLANG_WIRE 1.2; one more and a stock decode never starts
    "attn_tp_size", "attn_cp_size", "dp_size", "pp_size", "page_size", "kv_cache_dtype", "follow_bootstrap_room",
    "enable_dsa_cache_layer_split", "decode_allocation_policy", "enable_kv_cache_sharding", "prefill_http_port",
    "target_tp_rank", "target_tp_ranks", "target_cp_ranks", "target_pp_ranks", "required_dst_info_num",
    "required_prefill_response_num",
}  # fmt: skip


def body(**changes: object) -> JSON:
    """A rank's claim; a change to `...` leaves the field out."""
    row: JSON = {
        "attn_tp_size": 2, "attn_tp_rank": 1, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dp_size": 1,
        "attn_dp_rank": 0, "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0,
        "rank_ip": "10.0.0.1", "rank_port": 40123, "page_size": 16, "kv_cache_dtype": "bfloat16",
    }  # fmt: skip
    return {name: value for name, value in (row | changes).items() if value is not ...}


GROUPS = ("attn_tp", "attn_cp", "attn_dp", "pp", "system_dp")
WRONG: dict[str, list[object]] = {
    **{f"{name}_rank": [-1, 2, "0", None, True] for name in GROUPS},
    **{f"{name}_size": [0, -1, "1", None, 1.5] for name in GROUPS},
    "rank_port": [0, -1, 70000, 2**200, "x", "", None, True, 1.5, math.inf, math.nan, [1], "9" * 5000],
    "prefill_http_port": [0, 70000, "x", True],
    "page_size": [0, -16, "x", None, True, 2.5, {}, 2**200],
    "rank_ip": ["", "0.0.0.0", "::", "*", None, 7, "a b", "[::1]", "10.0.0.1:80", "\ud800"],
    "kv_cache_dtype": [7, "", "x" * 257, "a\nb", ["bf16"], "\ud800"],
    "kv_layout": [7, "", {}],
    "dsv41_spec_layout": [[], "x", 7, {"a": math.nan}, {"a": math.inf}, {"a": ["\ud800"]}],
    "load_balance_method": [None, 7, ""],
    "decode_allocation_policy": [None, 7, ""],
    "enable_dsa_cache_layer_split": [None, 1, "false"],
    "enable_kv_cache_sharding": [None, 0, "true"],
}


def shapes() -> st.SearchStrategy[Shape]:
    sizes, words = st.integers(1, 4), st.text("abc_0", min_size=1)
    return st.builds(
        Shape,
        attn_tp_size=sizes,
        attn_cp_size=sizes,
        dp_size=sizes,
        pp_size=sizes,
        page_size=st.integers(1, 2**40),
        kv_cache_dtype=st.none() | words,
        kv_layout=st.none() | words,
        dsv41_spec_layout=st.none() | st.dictionaries(words, st.lists(st.integers())),
        follow_bootstrap_room=st.booleans(),
        enable_dsa_cache_layer_split=st.booleans(),
        enable_kv_cache_sharding=st.booleans(),
        decode_allocation_policy=st.sampled_from(["early", "prefill_complete"]),
    )


@given(shapes(), st.data())
def test_an_announcement_survives_the_wire(shape: Shape, data: st.DataObject) -> None:
    seat = data.draw(st.sampled_from(sorted(shape.seats())))
    http_port = data.draw(st.none() | st.integers(1, 65535))
    claim = Announcement(seat, shape, Endpoint("fd00::7", 5), http_port)
    assert Announcement.from_body(json.loads(json.dumps(claim.to_body()))) == claim


@given(shapes(), st.none() | st.integers(1, 65535))
def test_the_topology_has_stock_keys_no_null_layout_and_reads_back(shape: Shape, http_port: int | None) -> None:
    reply = json.loads(json.dumps(topology_body(shape, http_port)))
    optional = {name for name in ("kv_layout", "dsv41_spec_layout") if getattr(shape, name) is not None}
    assert set(reply) == STOCK_KEYS | optional
    assert reply["prefill_http_port"] == http_port
    assert shape_from_topology(reply) == shape


@given(shapes())
def test_the_seats_are_exactly_those_inside_the_shape(shape: Shape) -> None:
    seats = shape.seats()
    assert len(seats) == shape.n_seats
    around = [Seat(dp, cp, tp, pp) for dp in range(-1, 6) for cp in range(3) for tp in range(-1, 6) for pp in range(3)]
    assert {seat for seat in around if seat in shape} == seats & set(around)


def test_the_dp_rank_is_attentions_with_one_replica_and_the_replicas_with_several() -> None:
    one = Announcement.from_body(body(attn_dp_size=4, attn_dp_rank=3))
    assert (one.seat.dp, one.shape.dp_size) == (3, 4)
    several = Announcement.from_body(body(system_dp_size=2, system_dp_rank=1))
    assert (several.seat.dp, several.shape.dp_size) == (1, 2)


def test_what_is_left_out_has_stocks_defaults() -> None:
    claim = Announcement.from_body(body())
    assert claim == Announcement(Seat(0, 0, 1, 0), Shape(2, 1, 1, 1, 16, "bfloat16"), Endpoint("10.0.0.1", 40123))
    assert claim.shape.follow_bootstrap_room
    assert claim.shape.decode_allocation_policy == "early"


@pytest.mark.parametrize("value", ["16", " 16 ", "+16", "1_6", 16.0])
def test_numbers_come_as_text_where_stock_takes_text(value: object) -> None:
    claim = Announcement.from_body(body(page_size=value, rank_port=value, prefill_http_port=value))
    assert (claim.shape.page_size, claim.address.port, claim.prefill_http_port) == (16, 16, 16)


@pytest.mark.parametrize("field", sorted(body()))
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(BadField, match="is missing") as refusal:
        Announcement.from_body(body(**{field: ...}))
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG.items() for value in values],
    ids=lambda value: repr(value)[:30].encode("ascii", "replace").decode(),
)
def test_what_no_rank_can_mean_is_refused_naming_the_field(field: str, value: object) -> None:
    with pytest.raises(BadField) as refusal:
        Announcement.from_body(body(**{field: value}))
    assert refusal.value.field == field
    str(refusal.value).encode()  # can be sent
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    "said",
    [{"page_size": "0" * 4000 + "16"}, {"page_size": 16.0}, {"kv_cache_dtype": "e5m2" * 60}],
    ids=lambda said: next(iter(said)),
)
def test_what_was_read_before_is_read_the_same_again(said: JSON) -> None:
    once, again = Announcement.from_body(body(**said)), Announcement.from_body(body(rank_port=5, **said))
    assert (once.seat, once.shape) == (again.seat, again.shape)
    assert type(again.shape.page_size) is int


def test_a_switch_that_is_no_switch_is_refused_though_it_equals_one_that_was_taken() -> None:
    Announcement.from_body(body(enable_kv_cache_sharding=True, attn_tp_size=1, attn_tp_rank=0))
    for said in (
        {"enable_kv_cache_sharding": 1, "attn_tp_size": 1},
        {"enable_kv_cache_sharding": True, "attn_tp_size": True},
    ):
        with pytest.raises(BadField):
            Announcement.from_body(body(attn_tp_rank=0, **said))


def test_a_page_size_of_any_length_is_remembered_nowhere() -> None:
    text = " " * 100_000 + "16"
    held = sys.getrefcount(text)
    assert Announcement.from_body(body(page_size=text)).shape.page_size == 16
    assert sys.getrefcount(text) == held


@pytest.mark.parametrize("sent", [None, 7, "text", [], [{}]], ids=repr)
def test_a_body_that_is_no_object_is_refused(sent: object) -> None:
    with pytest.raises(BadField, match="send one JSON object"):
        Announcement.from_body(sent)


def test_sizes_that_make_too_many_ranks_are_refused_before_one_is_made() -> None:
    with pytest.raises(BadField, match=str(MAX_SEATS)) as refusal:
        Announcement.from_body(body(attn_tp_size=60_000, pp_size=60_000))
    assert refusal.value.field == "attn_tp_size"
    with pytest.raises(BadField):
        Announcement.from_body(body(attn_tp_size=10**15))


def test_a_bottomless_layout_is_refused() -> None:
    layout: JSON = {}
    for _ in range(100):
        layout = {"in": [layout]}
    with pytest.raises(BadField, match="nested deeper"):
        Announcement.from_body(body(dsv41_spec_layout=layout))


def test_fields_from_the_future_are_ignored() -> None:
    assert Announcement.from_body(body(colour="red")) == Announcement.from_body(body())
    reply = topology_body(Announcement.from_body(body()).shape, None)
    assert shape_from_topology(reply | {"colour": "red"}) == shape_from_topology(reply)


def test_a_topology_from_the_rust_registry_is_read_without_what_it_drops() -> None:
    full = topology_body(Shape(2, 1, 1, 1, 16, None), 30000)
    dropped = ("enable_kv_cache_sharding", "decode_allocation_policy", "target_tp_rank", "required_dst_info_num")
    reply = {name: value for name, value in full.items() if name not in dropped}
    assert shape_from_topology(reply) == Shape(2, 1, 1, 1, 16, None)


@pytest.mark.parametrize("field", ["attn_tp_size", "dp_size", "page_size", "kv_cache_dtype", "follow_bootstrap_room"])
def test_a_topology_without_a_needed_key_is_refused(field: str) -> None:
    reply = topology_body(Shape(2, 1, 1, 1, 16, None), None)
    del reply[field]
    with pytest.raises(BadField) as refusal:
        shape_from_topology(reply)
    assert refusal.value.field == field


def test_an_address_reply_survives_the_wire() -> None:
    assert rank_body(Endpoint("fd00::7", 5)) == {"rank_ip": "fd00::7", "rank_port": 5}
    assert rank_from_body(rank_body(Endpoint("fd00::7", 5))) == Endpoint("fd00::7", 5)


def test_a_claim_for_a_seat_outside_its_shape_cannot_be_made() -> None:
    with pytest.raises(BadField, match="outside the shape"):
        Announcement(Seat(0, 0, 2, 0), Shape(2, 1, 1, 1, 16, None), Endpoint("10.0.0.1", 5))


def test_differences_start_with_those_that_stock_has_words_for() -> None:
    one, other = Shape(1, 1, 1, 1, 16, None), Shape(2, 1, 1, 1, 64, None, decode_allocation_policy="prefill_complete")
    names = [name for name, _, _ in one.differences(other)]
    assert names == ["decode_allocation_policy", "attn_tp_size", "page_size"]
