"""
Who serves prefill, in which seats, and may decode use them yet.

No sockets, no clock, no logging, no locks: claims come in, what they changed comes out.

    seat:      ABSENT --claim--> ALIVE --claim from another address--> ALIVE, a new life with a higher epoch
    instance:  ready <=> the seats alive are exactly those of its shape

A claim that contradicts the instance is refused and changes nothing. One kind of contradiction is a restart and wins:
the instance's only seat, claimed again from the same host at another port. That is a single-rank prefill started anew
with other settings. From the same port it is the same life, and a life does not change its settings. With other seats
held, or from another host, nothing tells a restart from a rank with wrong flags, and taking it would mix two shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import product
from typing import Any

from pdctl.core.address import Endpoint
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import Refused


class ChangeKind(StrEnum):
    """What a claim did."""

    SEATED = "seated"  # a seat that nobody held has a holder
    REPLACED = "replaced"  # a new life in the seat: another address
    RESHAPED = "reshaped"  # a new life in the only seat, and the instance has its shape now
    AMENDED = "amended"  # the same life says another HTTP port
    COMPLETED = "completed"  # with this life the instance became ready


@dataclass(frozen=True, slots=True)
class Life:
    """One process in one seat. `epoch` counts the lives of the instance: a later one is always higher."""

    announcement: Announcement
    epoch: int
    since: float

    @property
    def address(self) -> Endpoint:
        return self.announcement.address


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to whom. `before` is the address that lost the seat."""

    kind: ChangeKind
    instance: str
    life: Life
    before: Endpoint | None = None

    @property
    def seat(self) -> Seat:
        return self.life.announcement.seat


@dataclass(slots=True)
class InstanceView:
    """What is known of one instance; live, to be read at once and never kept or written."""

    name: str
    shape: Shape
    alive: dict[Seat, Life] = field(default_factory=dict)
    last_epoch: int = 0

    @property
    def ready(self) -> bool:
        """Set equality: every key of `alive` is a seat of `shape`, so that equal sizes are equal sets."""
        return len(self.alive) == self.shape.n_seats

    @property
    def missing(self) -> Iterator[Seat]:
        """Seats that nobody holds, in order. Up to 65,536 of them: take what you show."""
        shape = self.shape
        places = product(*map(range, (shape.dp_size, shape.attn_cp_size, shape.attn_tp_size, shape.pp_size)))
        return (seat for seat in (Seat(*place) for place in places) if seat not in self.alive)

    @property
    def http_port(self) -> int | None:
        """The API port of the lowest seat that says one: the same answer in whatever order the ranks came."""
        said = ((seat, life.announcement.prefill_http_port) for seat, life in self.alive.items())
        return min(((seat, port) for seat, port in said if port is not None), default=(None, None))[1]


class Registry:
    """All instances by name. One owner, in one event loop."""

    def __init__(self) -> None:
        self._instances: dict[str, InstanceView] = {}

    def __iter__(self) -> Iterator[InstanceView]:
        return iter(self._instances.values())

    def view(self, instance: str) -> InstanceView | None:
        return self._instances.get(instance)

    def find(self, instance: str, seat: Seat) -> Endpoint | None:
        """Where the rank in `seat` listens, ready or not."""
        view = self._instances.get(instance)
        life = view.alive.get(seat) if view else None
        return life.address if life else None

    def register(self, instance: str, claim: Announcement, now: float) -> list[Change]:
        """Take a rank's claim. An empty list: all of it was known. Raises Refused, changing nothing."""
        view = self._instances.get(instance) or InstanceView(instance, claim.shape)
        held = view.alive.get(claim.seat)
        kind = _verdict(view, held, claim)
        if kind is None:
            return []
        was_ready = view.ready and kind is not ChangeKind.RESHAPED
        if kind is ChangeKind.AMENDED and held is not None:
            life = replace(held, announcement=claim)
        else:
            life = Life(claim, view.last_epoch + 1, now)
        self._put(view, life)
        before = held.address if held and held.epoch != life.epoch else None
        changes = [Change(kind, instance, life, before)]
        if view.ready and not was_ready:
            changes.append(Change(ChangeKind.COMPLETED, instance, life))
        return changes

    def restore(self, change: Change, now: float) -> None:
        """Take a Change from a journal as it stands: it was judged when it was made."""
        view = self._instances.get(change.instance)
        view = view or InstanceView(change.instance, change.life.announcement.shape)
        self._put(view, replace(change.life, since=now))

    def _put(self, view: InstanceView, life: Life) -> None:
        view.shape = life.announcement.shape  # another one only with the only seat: nobody else is left in the old
        view.alive[life.announcement.seat] = life
        view.last_epoch = max(view.last_epoch, life.epoch)
        self._instances[view.name] = view


def _verdict(view: InstanceView, held: Life | None, claim: Announcement) -> ChangeKind | None:
    """What the claim would do, None for nothing. Raises Refused."""
    difference = next(view.shape.differences(claim.shape), None)
    if difference is not None:
        if held is None or not _is_restart(view, held, claim):
            raise _refusal(*difference)
        return ChangeKind.RESHAPED
    if held is None:
        return ChangeKind.SEATED
    if held.address != claim.address:
        return ChangeKind.REPLACED
    return None if held.announcement == claim else ChangeKind.AMENDED


def _is_restart(view: InstanceView, held: Life, claim: Announcement) -> bool:
    same_host, same_port = held.address.host == claim.address.host, held.address.port == claim.address.port
    return len(view.alive) == 1 and same_host and not same_port


_SENTENCES = {  # stock's own words first, for who looks for them
    "dsv41_spec_layout": "DeepSeek-V4.1 DSpark PD layout differs across prefill ranks",
    "decode_allocation_policy": "Inconsistent prefill allocation policies",
}


def _refusal(name: str, held: Any, offered: Any) -> Refused:
    ours, theirs = _told_apart(held, offered)
    wire_name = "load_balance_method" if name == "follow_bootstrap_room" else name
    facts = f"{wire_name} is {ours} for this prefill but this rank offers {theirs}"
    text = f"{_SENTENCES[name]}: {facts}" if name in _SENTENCES else facts
    advice = (
        f"start every rank with the same {wire_name}; if the whole prefill was restarted with other settings, "
        "restart this registry too"
    )
    return Refused(f"{text}: {advice}", field=wire_name, held=held, offered=offered)


def _told_apart(held: Any, offered: Any) -> tuple[str, str]:
    """Both values as short text: of two objects only the keys that differ."""
    if isinstance(held, Mapping) and isinstance(offered, Mapping):
        keys = [key for key in sorted({*held, *offered}) if held.get(key) != offered.get(key)]
        held, offered = ({key: values.get(key) for key in keys} for values in (held, offered))
    ours, theirs = (text if len(text) <= 200 else f"{text[:200]}..." for text in (repr(held), repr(offered)))
    return ours, theirs
