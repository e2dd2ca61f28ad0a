"""
What a watcher hears of a registry, as values, and the picture that they add up to.

No sockets, no clock: events come in, whole news come out. A list that is being told (`reset` to `synced`) is one piece
of news or none: a stream that breaks off in the middle of it has said nothing.

    reset, instance, instance, change, ..., synced   ->  Listed: all there is; forget what you knew
    change                                           ->  Changed: one thing that happened, and the row it left behind
    bye                                              ->  Unreachable: the registry ends the stream, in its own words
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pdctl.core.address import Endpoint
from pdctl.core.events import Event
from pdctl.core.route import Seat, Shape, as_integer, as_object, needed
from pdctl.errors import BadField, TooLarge, Unreachable

MAX_LIST_NBYTES = 512 << 20
"""10,000 ranks are listed in 4 MB; 200,000, the most that a registry holds by default, in 80 without metadata."""

_SHAPE_FIELDS = frozenset(each.name for each in fields(Shape))


@dataclass(frozen=True, slots=True)
class Rank:
    """A row: one life in one seat. `epoch` tells lives of an instance apart; `metadata` are the rank's own words."""

    seat: Seat
    address: Endpoint
    epoch: int
    incarnation: int
    standing: str
    ttl_s: float | None = None
    prefill_http_port: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Summary:
    """How an instance stands. `ready`: every seat of the served `incarnation` is held."""

    name: str
    role: str
    ready: bool
    draining: bool
    dead: bool
    seats: int
    alive: int
    incarnation: int
    revision: int


@dataclass(slots=True)
class Instance:
    """An instance and its rows by epoch, those of a forming incarnation too. Of a Picture: live, never write it."""

    summary: Summary
    ranks: dict[int, Rank] = field(default_factory=dict)
    shapes: dict[int, Shape] = field(default_factory=dict)

    @property
    def served(self) -> list[Rank]:
        """The rows that count, in the order of their seats."""
        rows = (rank for rank in self.ranks.values() if rank.incarnation == self.summary.incarnation)
        return sorted(rows, key=lambda rank: rank.seat)

    @property
    def shape(self) -> Shape | None:
        """Of the served incarnation; None where its wire knows none (vLLM's)."""
        return self.shapes.get(self.summary.incarnation)

    def copy(self) -> Instance:
        return Instance(self.summary, dict(self.ranks), dict(self.shapes))


@dataclass(frozen=True, slots=True)
class Listed:
    """All there is at `revision`: whatever was known before is void. `cursor` is where a watch goes on from."""

    cursor: str
    revision: int
    instances: Mapping[str, Instance]


@dataclass(frozen=True, slots=True)
class Changed:
    """One change: `rank` is the row now, None where it is over; `gone` are epochs whose rows are over.

    kind     as the registry names it: seated, replaced, expired, left, ...
    summary  how the instance stands now; None where it is forgotten
    shape    of the incarnation that `rank` begins
    """

    cursor: str
    revision: int
    kind: str
    instance: str
    rank: Rank | None
    gone: tuple[int, ...]
    summary: Summary | None
    why: str | None = None
    shape: Shape | None = None


News = Listed | Changed


class Picture:
    """What whoever has heard everything knows now."""

    def __init__(self) -> None:
        self.instances: dict[str, Instance] = {}
        self.cursor: str | None = None
        self.revision = 0

    def take(self, news: News) -> None:
        self.cursor, self.revision = news.cursor, news.revision
        if isinstance(news, Listed):
            self.instances = {name: instance.copy() for name, instance in news.instances.items()}
        else:
            self._change(news)

    def ranks(self, role: str | None = None) -> Iterator[Rank]:
        """The rows that count, of all instances or of those of one role."""
        for instance in self.instances.values():
            if role is None or instance.summary.role == role:
                yield from instance.served

    def _change(self, news: Changed) -> None:
        if news.summary is None:
            self.instances.pop(news.instance, None)
            return
        instance = self.instances.setdefault(news.instance, Instance(news.summary))
        instance.summary = news.summary
        for epoch in news.gone:
            instance.ranks.pop(epoch, None)
        if news.rank is not None:
            instance.ranks[news.rank.epoch] = news.rank
            if news.shape is not None:
                instance.shapes[news.rank.incarnation] = news.shape
        for number in [each for each in instance.shapes if each < news.summary.incarnation]:
            del instance.shapes[number]


class Hearing:
    """One stream, from its first event on. Raises BadField for what no registry says."""

    def __init__(self, max_list_nbytes: int = MAX_LIST_NBYTES) -> None:
        self._max_list_nbytes = max_list_nbytes
        self._listing: Picture | None = None
        self._nbytes = 0

    def hear(self, event: Event) -> News | None:
        """The news that the event completes. Raises BadField, TooLarge; Unreachable for a goodbye."""
        match event.kind:
            case "reset":
                self._listing, self._nbytes = Picture(), 0
            case "instance":
                instance = read_instance(_body(event))
                self._list(event).instances[instance.summary.name] = instance
            case "synced":
                return self._synced(event)
            case "change":
                changed = read_change(_body(event), _cursor(event))
                if self._listing is None:
                    return changed
                self._list(event).take(changed)
            case "bye":
                raise Unreachable(f"the registry ends the stream: {_words(event)}")
        return None  # what else a later registry says is not ours

    def _list(self, event: Event) -> Picture:
        if self._listing is None:
            raise BadField("event", f"{event.kind!r} comes without a reset before it")
        self._nbytes += len(event.data)
        if self._nbytes > self._max_list_nbytes:
            raise TooLarge(f"the list of instances has more than {self._max_list_nbytes} bytes: is it a registry's?")
        return self._listing

    def _synced(self, event: Event) -> Listed:
        listing, self._listing = self._list(event), None
        return Listed(_cursor(event), as_integer(needed(_body(event), "revision"), "revision"), listing.instances)


def read_instance(row: Mapping[str, Any]) -> Instance:
    """From an `instance` event, or `GET /v1/instances/{instance}`. Raises BadField."""
    instance = Instance(_summary(row))
    forming = row.get("forming")
    for each in (row, *([] if forming is None else [as_object(forming)])):
        if each.get("shape") is not None:
            instance.shapes[as_integer(needed(each, "incarnation"), "incarnation")] = _shape(each["shape"])
        for rank in map(_rank, _array(needed(each, "alive_seats"), "alive_seats")):
            instance.ranks[rank.epoch] = rank
    return instance


def read_change(row: Mapping[str, Any], cursor: str) -> Changed:
    """From a `change` event. Raises BadField."""
    rank, summary, shape, why = (row.get(name) for name in ("rank", "summary", "shape", "why"))
    return Changed(
        cursor=cursor,
        revision=as_integer(needed(row, "revision"), "revision"),
        kind=_text(row, "kind"),
        instance=_text(row, "instance"),
        rank=None if rank is None else _rank(rank),
        gone=tuple(as_integer(epoch, "gone") for epoch in _array(row.get("gone", []), "gone")),
        summary=None if summary is None else _summary(as_object(summary)),
        why=None if why is None else str(why),
        shape=None if shape is None else _shape(shape),
    )


def _rank(body: object) -> Rank:
    row = as_object(body)
    ttl_s, http_port = row.get("ttl_s"), row.get("prefill_http_port")
    if ttl_s is not None and (isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float)):
        raise BadField("ttl_s", "is no number of seconds")
    return Rank(
        seat=Seat(*(as_integer(needed(row, axis), axis) for axis in ("dp", "cp", "tp", "pp"))),
        address=Endpoint.parse(_text(row, "address")),
        epoch=as_integer(needed(row, "epoch"), "epoch"),
        incarnation=as_integer(needed(row, "incarnation"), "incarnation"),
        standing=_text(row, "standing"),
        ttl_s=None if ttl_s is None else float(ttl_s),
        prefill_http_port=None if http_port is None else as_integer(http_port, "prefill_http_port"),
        labels=as_object(row.get("labels", {})),
        metadata=as_object(row.get("metadata", {})),
    )


def _summary(row: Mapping[str, Any]) -> Summary:
    return Summary(
        name=_text(row, "name"),
        role=_text(row, "role"),
        ready=bool(needed(row, "ready")),
        draining=bool(needed(row, "draining")),
        dead=bool(needed(row, "dead")),
        seats=as_integer(needed(row, "seats"), "seats"),
        alive=as_integer(needed(row, "alive"), "alive"),
        incarnation=as_integer(needed(row, "incarnation"), "incarnation"),
        revision=as_integer(needed(row, "revision"), "revision"),
    )


def _shape(body: object) -> Shape:
    """What a later registry says of a shape besides is not ours."""
    try:
        return Shape(**{name: value for name, value in as_object(body).items() if name in _SHAPE_FIELDS})
    except TypeError as error:
        raise BadField("shape", f"cannot be read ({error})") from None


def _body(event: Event) -> Mapping[str, Any]:
    try:
        return as_object(json.loads(event.data))
    except (ValueError, RecursionError) as error:
        raise BadField(event.kind, f"is not JSON ({error})") from None


def _words(event: Event) -> str:
    try:
        return str(_body(event)["error"]["message"])[:500]
    except (BadField, KeyError, TypeError):
        return "it does not say why"


def _cursor(event: Event) -> str:
    if not event.id:
        raise BadField("id", f"is not there: a {event.kind} event has one to come back with")
    return event.id


def _text(row: Mapping[str, Any], name: str) -> str:
    value = needed(row, name)
    if not isinstance(value, str):
        raise BadField(name, f"is {str(value)[:60]!r}: text is wanted")
    return value


def _array(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadField(name, "is no array")
    return value
