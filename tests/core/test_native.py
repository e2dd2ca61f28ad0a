"""What is said on pdctl's own wire comes back as it was, and what cannot be meant is refused by its field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pdctl.core.address import Endpoint
from pdctl.core.lives import Owner
from pdctl.core.native import Drain, Grant, Registration, in_our_words, rank_path, read_seat, seat_name
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import BadField

SHAPE = Shape(attn_tp_size=4, attn_cp_size=2, dp_size=3, pp_size=2, page_size=16, kv_cache_dtype="auto")
LAYOUT = {"layers": [{"name": "x", "nbytes": 3}]}
ROW = Announcement(Seat(2, 1, 3, 1), replace(SHAPE, dsv41_spec_layout=LAYOUT), Endpoint("fd00::7", 4000), 30000)
OWNER = Owner("10.0.0.9", "team-a")
GRANT = {"instance": "a", "seat": "dp0/cp0/tp0/pp0", "epoch": 3, "ttl_s": 15, "standing": "alive", "revision": 9}
AXES = st.integers(0, 65_535)


@given(st.builds(Seat, AXES, AXES, AXES, AXES))
def test_a_seat_is_read_as_it_was_written(seat: Seat) -> None:
    assert read_seat(seat_name(seat)) == seat


def test_an_axis_that_is_left_out_is_0_and_their_order_is_free() -> None:
    assert read_seat("tp1") == Seat(0, 0, 1, 0)
    assert read_seat("tp1-dp2") == Seat(2, 0, 1, 0)


@pytest.mark.parametrize(
    "text", ["", "1", "tp", "tp-1", "tp01", "tp1-", "-tp1", "tp1-tp1", "tp1/dp0", "TP1", "tp100000", "tp1\n", "tp1-xx2"]
)
def test_what_is_no_seat_is_refused(text: str) -> None:
    with pytest.raises(BadField, match="is no seat"):
        read_seat(text)


def test_a_registration_survives_the_wire_and_is_the_claim_it_was_made_of() -> None:
    said = Registration.of(ROW, 15.0, role="decode", labels={"zone": "a"}, metadata={"models": ["m"], "n": 1.5})
    read = TypeAdapter(Registration).validate_json(json.dumps(said.to_body()), strict=True)
    assert read == said
    claim = read.claim("a", ROW.seat, OWNER)
    assert (claim.announcement, claim.owner, claim.ttl_s) == (ROW, OWNER, 15.0)
    assert (claim.role, claim.labels, claim.metadata) == ("decode", {"zone": "a"}, {"models": ["m"], "n": 1.5})


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"host": "::"}, "host"),
        ({"port": 0}, "port"),
        ({"role": "-"}, "role"),
        ({"labels": {"a": "x\ty"}}, "labels.'a'"),
        ({"metadata": {"a": float("nan")}}, "metadata"),
        ({"metadata": {"a": "\ud800"}}, "metadata"),
        ({"shape": replace(SHAPE, kv_cache_dtype="")}, "shape.kv_cache_dtype"),
        ({"shape": replace(SHAPE, page_size=None)}, "shape.page_size"),
    ],
)
def test_what_no_rank_can_mean_is_refused_by_its_name_here(said: dict[str, Any], field: str) -> None:
    with pytest.raises(BadField) as refused:
        replace(Registration.of(ROW, 15.0), **said).claim("a", ROW.seat, OWNER)
    assert in_our_words(refused.value).field == field
    assert str(in_our_words(refused.value)).startswith(f"{field}: ")


def test_a_seat_outside_of_the_shape_is_refused() -> None:
    with pytest.raises(BadField, match="outside the shape"):
        Registration.of(ROW, None).claim("a", Seat(3, 0, 0, 0), OWNER)


@pytest.mark.parametrize("grace_s", [-1.0, 1e9, float("nan"), float("inf")])
def test_a_grace_that_cannot_be_is_refused(grace_s: float) -> None:
    with pytest.raises(BadField, match="grace_s"):
        Drain(grace_s)


def test_a_grant_is_read_from_a_later_registry_too() -> None:
    assert Grant.from_body(GRANT | {"more": 1}) == Grant("a", "dp0/cp0/tp0/pp0", 3, 15.0, "alive", 9)
    assert Grant.from_body(GRANT | {"ttl_s": None}).ttl_s is None


@pytest.mark.parametrize("wrong", [{"ttl_s": 0}, {"ttl_s": True}, {"ttl_s": "15"}, {"epoch": "x"}, {"revision": None}])
def test_what_is_no_grant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadField):
        Grant.from_body(GRANT | wrong)


def test_an_instance_that_is_no_name_makes_no_path() -> None:
    assert rank_path("a.b-c_1", Seat(0, 0, 1, 0)) == "/v1/instances/a.b-c_1/ranks/dp0-cp0-tp1-pp0"
    with pytest.raises(BadField, match="instance"):
        rank_path("../x", ROW.seat)
