"""
pdctl's own wire, version 1: what a rank says of itself to hold a lease, and what it is granted. Both directions.

    PUT    /v1/instances/{instance}/ranks/{seat}           Registration -> Grant
    POST   /v1/instances/{instance}/ranks/{seat}/renew     Renewal -> Grant
    DELETE /v1/instances/{instance}/ranks/{seat}?epoch=N
    POST   /v1/instances/{instance}[/ranks/{seat}]/drain   Drain

Plain dataclasses: the dialect reads them strictly and publishes their schema, the client writes them. Whatever a rank
says here can be said on SGLang's wire too, where decodes will read it: one check for both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pdctl.core.address import Endpoint
from pdctl.core.lives import Claim, Owner
from pdctl.core.route import Announcement, Seat, Shape, as_integer, as_object, needed
from pdctl.errors import BadField

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""Of instances and roles: what a host name, a pod or an engine id can be, and what a path bears unescaped."""

SEAT = r"(?:(?:dp|cp|tp|pp)(?:0|[1-9][0-9]{0,4})(?:-|$)){1,4}"
"""`dp0-cp0-tp1-pp0`; an axis that is left out is 0, so that `tp1` is the same."""

LONGEST_GRACE_S = 86_400.0

_NAME = re.compile(NAME, re.ASCII)
_SEAT = re.compile(SEAT, re.ASCII)
_AXIS = re.compile(r"(dp|cp|tp|pp)([0-9]+)", re.ASCII)
_SHAPE_FIELDS = frozenset(each.name for each in fields(Shape))
_OURS = {"rank_ip": "host", "rank_port": "port", "attn_dp_size": "shape.dp_size"} | {
    "load_balance_method": "shape.follow_bootstrap_room"
}

_STRICT = {"extra": "forbid"}
"""Read by pydantic, if it is there: a field that nobody knows is a mistake of the sender."""


@dataclass(frozen=True, slots=True)
class Registration:
    """ "I serve in that seat, in an instance of this shape, and listen here." Treat the mappings as read-only.

    host, port         where peers dial the rank's control link
    prefill_http_port  the engine's own API port
    ttl_s              the lease: renew every third of it; null for a rank that will not speak again
    labels, metadata   for whoever lists or watches; labels are text, metadata is free JSON
    """

    __pydantic_config__ = _STRICT

    host: str
    port: int
    shape: Shape
    prefill_http_port: int | None = None
    role: str = "prefill"
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ttl_s: float | None = None

    @classmethod
    def of(cls, announcement: Announcement, ttl_s: float | None, **more: Any) -> Registration:
        where, http_port = announcement.address, announcement.prefill_http_port
        return cls(where.host, where.port, announcement.shape, http_port, ttl_s=ttl_s, **more)

    def to_body(self) -> dict[str, Any]:
        return asdict(self)

    def claim(self, instance: str, seat: Seat, owner: Owner) -> Claim:
        """Raises BadField, by core's names of the fields: see `in_our_words`."""
        check_name(self.role, "role")
        _check_labels(self.labels)
        _check_writable(self.metadata)
        announced = Announcement(seat, self.shape, Endpoint(self.host, self.port), self.prefill_http_port)
        announcement = Announcement.from_body(announced.to_body())
        return Claim(instance, announcement, owner, self.role, self.labels, self.metadata, self.ttl_s)


@dataclass(frozen=True, slots=True)
class Renewal:
    """ "I still serve." `epoch` is the granted one; `rooms`: how many rooms are under way, so that a drain can end."""

    __pydantic_config__ = _STRICT

    epoch: int
    rooms: int | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """Nothing new from now on; gone when the rooms under way are done, or after `grace_s`."""

    __pydantic_config__ = _STRICT

    grace_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0 <= self.grace_s <= LONGEST_GRACE_S:  # NaN included
            raise BadField("grace_s", f"is {self.grace_s:g}: give 0 to {LONGEST_GRACE_S:g} seconds")


@dataclass(frozen=True, slots=True)
class Grant:
    """What the registry answers: whose seat it is, and for how long.

    epoch     of this life; a renewal that names an older one than the seat's holder has is refused
    ttl_s     the lease; null for a rank that holds none
    standing  alive, suspect or draining
    revision  of the registry, this answer's change included
    """

    instance: str
    seat: str
    epoch: int
    ttl_s: float | None
    standing: str
    revision: int

    @classmethod
    def from_body(cls, body: object) -> Grant:
        """From our registry or a later one: what it says besides is not ours. Raises BadField."""
        row = as_object(body)
        ttl_s = needed(row, "ttl_s")
        if ttl_s is not None and (isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float) or not ttl_s > 0):
            raise BadField("ttl_s", "is no number of seconds above 0: send one, or null")
        return cls(
            instance=str(needed(row, "instance")),
            seat=str(needed(row, "seat")),
            epoch=as_integer(needed(row, "epoch"), "epoch"),
            ttl_s=None if ttl_s is None else float(ttl_s),
            standing=str(needed(row, "standing")),
            revision=as_integer(needed(row, "revision"), "revision"),
        )


def instance_path(instance: str) -> str:
    """Raises BadField."""
    return f"/v1/instances/{check_name(instance, 'instance')}"


def rank_path(instance: str, seat: Seat) -> str:
    return f"{instance_path(instance)}/ranks/{seat_name(seat)}"


def seat_name(seat: Seat) -> str:
    """A seat as a path writes it: `str` of one has slashes."""
    return str(seat).replace("/", "-")


def read_seat(text: str) -> Seat:
    """From `dp0-cp0-tp1-pp0` or `tp1`. Raises BadField("seat")."""
    axes = dict(_AXIS.findall(text))
    if not _SEAT.fullmatch(text) or text.endswith("-") or len(axes) != text.count("-") + 1:
        raise BadField("seat", f"{text[:60]!r} is no seat: write dp0-cp0-tp0-pp0, or those axes that are not 0")
    return Seat(*(int(axes.get(axis, "0")) for axis in ("dp", "cp", "tp", "pp")))


def check_name(text: str, name: str) -> str:
    """`text`, which names an instance or a role. Raises BadField(name)."""
    if not _NAME.fullmatch(text):
        raise BadField(name, f"is {text[:130]!r}: give 1 to 128 letters, digits and . _ -, a letter or digit at first")
    return text


def _check_labels(labels: Mapping[str, str]) -> None:
    for key, value in labels.items():
        if not (0 < len(key) <= 128 and len(value) <= 256 and key.isprintable() and value.isprintable()):
            raise BadField(
                f"labels.{key[:128]!r}", "is not printable or too long: keys have 1 to 128, values up to 256"
            )


def _check_writable(metadata: Mapping[str, Any]) -> None:
    """What comes in must be able to go out."""
    try:
        json.dumps(metadata, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError):
        raise BadField("metadata", "holds what JSON has no word for: send finite numbers, text and objects") from None


def in_our_words(error: BadField) -> BadField:
    """What core says of a field, by the name that stands in these bodies."""
    name = error.field
    ours = _OURS.get(name, f"shape.{name}" if name in _SHAPE_FIELDS else name)
    return BadField(ours, str(error).removeprefix(f"{name}: "))
