"""
What a prefill rank says of itself, and what the registry says of an instance: SGLang's HTTP bodies, both directions.

Bodies are what `json.loads` gives. Nothing here is stored, asked for or sent. What stock ranks of 0.5.23 say is taken
word for word (numeric text for ports and page size included); what no rank can mean raises BadField with the field's
name on the wire, before anything was changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import product
from operator import itemgetter
from typing import Any, NamedTuple

from pdctl.core.address import Endpoint, check_host, check_port, is_wildcard
from pdctl.errors import BadField

MAX_SEATS = 65_536
"""Seats of one instance. A size of 10**9 in one PUT must not become 10**9 objects."""

_MAX_BITS = (
    128  # rooms are random 63-bit numbers; nothing on this wire is larger, and str() of 4,300 digits is not free
)
_MAX_TEXT = 256
_MAX_DEPTH = 16
_FOLLOW = "follow_bootstrap_room"
_UNUSED_KEYS = (  # the client fills these in for itself, but stock's reply has them, as null
    "target_tp_rank",
    "target_tp_ranks",
    "target_cp_ranks",
    "target_pp_ranks",
    "required_dst_info_num",
    "required_prefill_response_num",
)

Body = Mapping[str, Any]


class Seat(NamedTuple):
    """One rank's place in its instance. A tuple, for it is a key in all that the registry does."""

    dp: int
    cp: int
    tp: int
    pp: int

    def __str__(self) -> str:
        return f"dp{self.dp}/cp{self.cp}/tp{self.tp}/pp{self.pp}"


@dataclass(frozen=True, slots=True)
class Shape:
    """What all ranks of an instance must agree on. Treat `dsv41_spec_layout` as read-only."""

    attn_tp_size: int
    attn_cp_size: int
    dp_size: int
    pp_size: int
    page_size: int | None
    kv_cache_dtype: str | None
    kv_layout: str | None = None
    dsv41_spec_layout: Body | None = field(default=None, hash=False)
    follow_bootstrap_room: bool = True
    enable_dsa_cache_layer_split: bool = False
    enable_kv_cache_sharding: bool = False
    decode_allocation_policy: str = "early"

    def __post_init__(self) -> None:
        for name in ("attn_tp_size", "attn_cp_size", "dp_size", "pp_size", "page_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadField(name, f"is {value}: give 1 or more")
        if self.n_seats > MAX_SEATS:
            sizes = f"dp {self.dp_size} x cp {self.attn_cp_size} x tp {self.attn_tp_size} x pp {self.pp_size}"
            raise BadField(
                self._largest, f"makes {sizes} more than {MAX_SEATS} ranks, the limit of one instance: check the sizes"
            )

    @property
    def n_seats(self) -> int:
        return self.dp_size * self.attn_cp_size * self.attn_tp_size * self.pp_size

    @property
    def _largest(self) -> str:
        return max(("attn_tp_size", "attn_cp_size", "dp_size", "pp_size"), key=lambda name: int(getattr(self, name)))

    def seats(self) -> frozenset[Seat]:
        """Every seat that a complete instance of this shape has."""
        sizes = (self.dp_size, self.attn_cp_size, self.attn_tp_size, self.pp_size)
        return frozenset(Seat(*ranks) for ranks in product(*map(range, sizes)))

    def __contains__(self, seat: Seat) -> bool:
        return (
            0 <= seat.dp < self.dp_size
            and 0 <= seat.cp < self.attn_cp_size
            and 0 <= seat.tp < self.attn_tp_size
            and 0 <= seat.pp < self.pp_size
        )

    def differences(self, other: Shape) -> Iterator[tuple[str, Any, Any]]:
        """(field, ours, theirs) for each field that differs, those with stock's own sentence first."""
        for name in _COMPARED:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                yield name, ours, theirs


_STOCK_REFUSES = ("dsv41_spec_layout", "decode_allocation_policy")
_COMPARED = (*_STOCK_REFUSES, *(f.name for f in fields(Shape) if f.name not in _STOCK_REFUSES))


@dataclass(frozen=True, slots=True)
class Announcement:
    """One rank's claim: "I sit there, in an instance of this shape, and listen here"."""

    seat: Seat
    shape: Shape
    address: Endpoint
    prefill_http_port: int | None = None

    def __post_init__(self) -> None:
        if self.seat not in self.shape:
            raise BadField("seat", f"{self.seat} is outside the shape: ranks count from 0 to size - 1")
        if self.address.is_wildcard:
            raise BadField("rank_ip", f"{self.address.host} is every interface: announce the address that peers dial")
        if self.prefill_http_port is not None:
            check_port(self.prefill_http_port, "prefill_http_port")

    def to_body(self) -> dict[str, Any]:
        """What a stock rank of the same place PUTs."""
        shape, seat = self.shape, self.seat
        return {
            "attn_tp_size": shape.attn_tp_size,
            "attn_tp_rank": seat.tp,
            "attn_cp_size": shape.attn_cp_size,
            "attn_cp_rank": seat.cp,
            "attn_dp_size": shape.dp_size,
            "attn_dp_rank": seat.dp,
            "pp_size": shape.pp_size,
            "pp_rank": seat.pp,
            "system_dp_size": 1,
            "system_dp_rank": 0,
            "rank_ip": self.address.host,
            "rank_port": self.address.port,
            "page_size": shape.page_size,
            "kv_cache_dtype": shape.kv_cache_dtype,
            "kv_layout": shape.kv_layout,
            "dsv41_spec_layout": shape.dsv41_spec_layout,
            "load_balance_method": _FOLLOW if shape.follow_bootstrap_room else "round_robin",
            "enable_dsa_cache_layer_split": shape.enable_dsa_cache_layer_split,
            "enable_kv_cache_sharding": shape.enable_kv_cache_sharding,
            "prefill_http_port": self.prefill_http_port,
            "decode_allocation_policy": shape.decode_allocation_policy,
        }

    @classmethod
    def from_body(cls, body: object) -> Announcement:
        """From what a rank PUTs. Raises BadField naming the field."""
        row = as_object(body)
        seat, shape = _placed(row)
        http_port = row.get("prefill_http_port")
        return cls(
            seat, shape, _address(row), None if http_port is None else as_integer(http_port, "prefill_http_port")
        )


def topology_body(shape: Shape, http_port: int | None) -> dict[str, Any]:
    """The reply to "all four -1". Stock's client unpacks it into a dataclass: one key too many and it never starts."""
    body: dict[str, Any] = {
        "attn_tp_size": shape.attn_tp_size,
        "attn_cp_size": shape.attn_cp_size,
        "dp_size": shape.dp_size,
        "pp_size": shape.pp_size,
        "page_size": shape.page_size,
        "kv_cache_dtype": shape.kv_cache_dtype,
        "follow_bootstrap_room": shape.follow_bootstrap_room,
        "enable_dsa_cache_layer_split": shape.enable_dsa_cache_layer_split,
        "decode_allocation_policy": shape.decode_allocation_policy,
        "enable_kv_cache_sharding": shape.enable_kv_cache_sharding,
        "prefill_http_port": http_port,
        **dict.fromkeys(_UNUSED_KEYS),
    }
    # Absent, never null: clients from before these fields have no such parameter
    optional = {"kv_layout": shape.kv_layout, "dsv41_spec_layout": shape.dsv41_spec_layout}
    return body | {name: value for name, value in optional.items() if value is not None}


def shape_from_topology(body: object) -> Shape:
    """What a client reads in that reply, from our registry or from a stock one, older and newer ones included."""
    row = as_object(body)
    page_size = needed(row, "page_size")
    return Shape(
        attn_tp_size=as_integer(needed(row, "attn_tp_size"), "attn_tp_size"),
        attn_cp_size=as_integer(needed(row, "attn_cp_size"), "attn_cp_size"),
        dp_size=as_integer(needed(row, "dp_size"), "dp_size"),
        pp_size=as_integer(needed(row, "pp_size"), "pp_size"),
        page_size=None if page_size is None else as_integer(page_size, "page_size"),
        kv_cache_dtype=_text(needed(row, "kv_cache_dtype"), "kv_cache_dtype"),
        kv_layout=_text(row.get("kv_layout"), "kv_layout"),
        dsv41_spec_layout=_layout(row.get("dsv41_spec_layout")),
        follow_bootstrap_room=_as_switch(needed(row, "follow_bootstrap_room"), "follow_bootstrap_room"),
        enable_dsa_cache_layer_split=_switch(row, "enable_dsa_cache_layer_split"),
        enable_kv_cache_sharding=_switch(row, "enable_kv_cache_sharding"),
        decode_allocation_policy=_word(row.get("decode_allocation_policy", "early"), "decode_allocation_policy"),
    )


def rank_body(address: Endpoint) -> dict[str, Any]:
    """The reply to a question for one rank."""
    return {"rank_ip": address.host, "rank_port": address.port}


def rank_from_body(body: object) -> Endpoint:
    return _address(as_object(body))


def as_object(body: object) -> Body:
    if not isinstance(body, Mapping):
        raise BadField("body", f"is {_kind(body)}: send one JSON object")
    return body


def needed(row: Body, name: str) -> Any:
    if name not in row:
        raise BadField(name, "is missing: send it")
    return row[name]


def as_integer(value: object, name: str) -> int:
    """An integer, a whole float or numeric text: what stock's `int()` would take, less booleans and fractions."""
    if type(value) is int and value.bit_length() <= _MAX_BITS:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadField(name, f"is {_kind(value)}: send an integer")
    if isinstance(value, float) and not value.is_integer():
        raise BadField(name, f"is {value}: send an integer")
    try:
        number = int(value)
    except ValueError:
        raise BadField(name, f"is the text {_short(value)}: send an integer") from None
    if number.bit_length() > _MAX_BITS:
        raise BadField(name, f"is {_short(number)}: send one of {_MAX_BITS} bits at most")
    return number


class _Rank(NamedTuple):
    rank: int
    size: int


_PLACING = (
    *("attn_tp_size", "attn_tp_rank", "attn_cp_size", "attn_cp_rank", "attn_dp_size", "attn_dp_rank"),
    *("pp_size", "pp_rank", "system_dp_size", "system_dp_rank", "page_size", "kv_cache_dtype", "kv_layout"),
    *("dsv41_spec_layout", "load_balance_method", "enable_dsa_cache_layer_split", "enable_kv_cache_sharding"),
    "decode_allocation_policy",
)
_all_placing = itemgetter(*_PLACING)
_ABSENT = object()


def _placed(row: Body) -> tuple[Seat, Shape]:
    """Where in which shape. Ranks that come back say the same but for their port, and all of it is read once."""
    try:
        said = _all_placing(row)  # stock ranks leave none of them out
    except KeyError:
        said = tuple(row.get(name, _ABSENT) for name in _PLACING)
    place = _placed_by if type(row.get("page_size")) is int else _placed_by.__wrapped__  # a text may be of any length
    try:
        return place(*said)
    except TypeError:  # an array, or an object: no key for a cache
        return _placed_by.__wrapped__(*said)


@lru_cache(maxsize=4096, typed=True)  # typed, for True is 1 otherwise; who is refused is not kept
def _placed_by(*said: object) -> tuple[Seat, Shape]:
    row = {name: value for name, value in zip(_PLACING, said, strict=True) if value is not _ABSENT}
    tp, cp = _rank(row, "attn_tp"), _rank(row, "attn_cp")
    dp, pp = _rank(row, "attn_dp"), _rank(row, "pp")
    replica = _rank(row, "system_dp")
    # One replica: the DP groups are those of attention. Several: each replica is a DP rank of its own.
    dp = dp if replica.size == 1 else replica
    sizes = (tp.size, cp.size, dp.size, pp.size)
    return Seat(dp.rank, cp.rank, tp.rank, pp.rank), _shape(sizes, row)


def _rank(row: Body, name: str) -> _Rank:
    """`<name>_size` and `<name>_rank`, which fit each other."""
    size_name, rank_name = f"{name}_size", f"{name}_rank"
    size = _plain_integer(needed(row, size_name), size_name)
    rank = _plain_integer(needed(row, rank_name), rank_name)
    if not 1 <= size <= MAX_SEATS:
        raise BadField(size_name, f"is {_short(size)}: give 1 to {MAX_SEATS}")
    if not 0 <= rank < size:
        raise BadField(
            rank_name, f"is {_short(rank)} but {name}_size is {size}: ranks count from 0 to size - 1 ({size - 1})"
        )
    return _Rank(rank, size)


def _shape(sizes: tuple[int, int, int, int], row: Body) -> Shape:
    """Raises BadField."""
    page_size, kv_cache_dtype = needed(row, "page_size"), needed(row, "kv_cache_dtype")
    layout = _layout(row.get("dsv41_spec_layout"))
    shape = _shape_of(
        *sizes,
        page_size=as_integer(page_size, "page_size"),
        kv_cache_dtype=_text(kv_cache_dtype, "kv_cache_dtype"),
        kv_layout=_text(row.get("kv_layout"), "kv_layout"),
        follow_bootstrap_room=_word(row.get("load_balance_method", _FOLLOW), "load_balance_method") == _FOLLOW,
        enable_dsa_cache_layer_split=_switch(row, "enable_dsa_cache_layer_split"),
        enable_kv_cache_sharding=_switch(row, "enable_kv_cache_sharding"),
        decode_allocation_policy=_word(row.get("decode_allocation_policy", "early"), "decode_allocation_policy"),
    )
    return shape if layout is None else replace(shape, dsv41_spec_layout=layout)


_shape_of = lru_cache(maxsize=1024)(Shape)  # one object for all ranks of an instance: to compare it is to look at it


def _plain_integer(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadField(name, f"is {_kind(value)}: send an integer")
    return value


def _address(row: Body) -> Endpoint:
    host = needed(row, "rank_ip")
    if not isinstance(host, str):
        raise BadField("rank_ip", f"is {_kind(host)}: send the address as text")
    check_host(host, "rank_ip")
    if is_wildcard(host):
        raise BadField("rank_ip", f"{host} is every interface: announce the address that peers dial")
    port = as_integer(needed(row, "rank_port"), "rank_port")
    check_port(port, "rank_port")
    return Endpoint(host, port)


def _text(value: object, name: str) -> str | None:
    """Printable text of bounded length, or null."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadField(name, f"is {_kind(value)}: send text or null")
    if not value or len(value) > _MAX_TEXT or not value.isprintable():
        raise BadField(name, f"is {_short(value)}: send 1 to {_MAX_TEXT} printable characters")
    return value


def _word(said: object, name: str) -> str:
    value = _text(said, name)
    if value is None:
        raise BadField(name, "is null: send text, or leave the field out")
    return value


def _switch(row: Body, name: str) -> bool:
    return _as_switch(row.get(name, False), name)


def _as_switch(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise BadField(name, f"is {_kind(value)}: send true or false")
    return value


def _layout(value: object) -> Body | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise BadField("dsv41_spec_layout", f"is {_kind(value)}: send an object or null")
    _check_repeatable(value, "dsv41_spec_layout", _MAX_DEPTH)
    return value


def _check_repeatable(value: object, name: str, depth: int) -> None:
    """What is passed on to decodes must be writable as JSON again: no NaN, no lone surrogate, no bottomless nesting."""
    if depth == 0:
        raise BadField(name, f"is nested deeper than {_MAX_DEPTH} levels: send the layout that the engine makes")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadField(name, f"holds {value}, which JSON has no word for: send finite numbers")
    if isinstance(value, str) and not value.isprintable():
        raise BadField(name, f"holds {_short(value)}: send printable text")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_repeatable(key, name, depth - 1)
            _check_repeatable(inner, name, depth - 1)
    elif isinstance(value, list):
        for inner in value:
            _check_repeatable(inner, name, depth - 1)


def _kind(value: object) -> str:
    """The JSON word for what was sent, with the value where it is short."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {_short(value)}"
        case int() | float():
            return f"the number {_short(value)}"
        case list():
            return "an array"
        case Mapping():
            return "an object"
    return f"a {type(value).__name__}"


def _short(value: object, limit: int = 60) -> str:
    """`value` as Python writes it, escapes and all, cut to `limit` characters."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[:limit]}..."
