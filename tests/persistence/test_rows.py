"""Rows of the journal as text."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from pdctl.core.address import Endpoint
from pdctl.core.lives import Claim, Owner, Record
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.persistence.rows import decoded, encoded

SHAPE = Shape(2, 1, 1, 1, 16, "bfloat16")
TEXTS = st.sampled_from(["default", 'a "b" \\ %s %d %', "é 😀", "{}"])
SECONDS = st.none() | st.sampled_from([15, 0.1, 1e-5 + 1, 86_400.0])
OBJECTS = st.sampled_from([{}, {"a": "%d"}, {"zone": 'b"', "é": "\u2028"}])
PLACES = st.sampled_from([0, 1])


@st.composite
def records(draw: st.DrawFn) -> Record:
    shape = Shape(
        *(2, 2, 2, 2),
        page_size=draw(st.sampled_from([None, 1, 64])),
        kv_cache_dtype=draw(st.none() | TEXTS),
        kv_layout=draw(st.none() | TEXTS),
        dsv41_spec_layout=draw(st.sampled_from([None, {}, {"%": [1, {"b": 0.5}]}])),
        follow_bootstrap_room=draw(st.booleans()),
        enable_dsa_cache_layer_split=draw(st.booleans()),
        enable_kv_cache_sharding=draw(st.booleans()),
        decode_allocation_policy=draw(TEXTS),
    )
    seat = Seat(*(draw(PLACES) for _ in range(4)))
    host = draw(st.sampled_from(["10.0.0.1", "fd00::7", "node-%d.example", "nöde"]))
    http_port = draw(st.none() | st.integers(1, 65_535))
    announcement = Announcement(seat, shape, Endpoint(host, draw(st.integers(1, 65_535))), http_port)
    owner = Owner(draw(TEXTS), draw(st.none() | TEXTS))
    more: dict[str, Any] = {"labels": draw(OBJECTS), "metadata": draw(OBJECTS), "ttl_s": draw(SECONDS)}
    claim = Claim(draw(TEXTS), announcement, owner, draw(TEXTS), **more)
    epoch = draw(st.integers(1, 2**62))
    return Record(claim, epoch, draw(st.integers(1, epoch)), draw(SECONDS), draw(st.none() | TEXTS))


@given(record=records())
@example(record=Record(Claim("a", Announcement(Seat(0, 0, 1, 0), SHAPE, Endpoint("h", 1)), Owner("h")), 1, 1))
def test_a_row_is_the_record_in_json_to_the_letter_and_reads_back(record: Record) -> None:
    row = encoded(record)
    assert row[2] == json.dumps(record.to_row(), separators=(",", ":"))
    assert decoded([row], "here") == [record]
