"""
One process in one seat: what it claimed, how long its word is good for, and what became of it.

No clock: `now` is an argument (seconds, monotonic, any zero). Times are never written down: a `Record`, which is what
a journal keeps of a life, has none.

    ALIVE --no renewal for half the lease--> SUSPECT --none for the whole--> gone
    ALIVE --drain--> DRAINING --its rooms are done, or the grace is over--> gone

Half the lease: renewals come every third, so that one has been missed, and slack besides. A life without a lease (a
stock rank, which registers once and never speaks again) is ALIVE until somebody says otherwise: silence is not death.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from pdctl.core.address import Endpoint
from pdctl.core.kinds import ChangeKind
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import BadField

SUSPECT_AFTER = 0.5
"""Of the lease."""

ERA = 1 << 32
"""Epochs that are given out until a registry forgets everything; then it begins in another era, drawn by chance. So it
can tell a rank of before, which has to register again, from one that was replaced, which has to exit."""

SHORTEST_TTL_S = 0.1
LONGEST_TTL_S = 86_400.0

PREFILL = "prefill"
"""The role of those who are asked for on the plain paths, and of stock ranks, which name none."""

_LONGEST_NAME = 253


class Standing(StrEnum):
    """How far a life can be counted on."""

    ALIVE = "alive"
    SUSPECT = "suspect"  # has missed a renewal, or has not spoken since the registry restarted
    DRAINING = "draining"  # takes nothing new


@dataclass(frozen=True, slots=True)
class Owner:
    """Who speaks: the host that the connection comes from, and the name of the token where there is one.

    `admin`: the token has that role, by which its holder may end what others have registered. No row keeps it.
    """

    host: str
    principal: str | None = None
    admin: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return self.host if self.principal is None else f"{self.principal} at {self.host}"

    def may_change(self, row: Owner) -> bool:
        """Whether this one registered the row: by token where the row has one, else from the same host."""
        return self.host == row.host if row.principal is None else self.principal == row.principal

    def may_end(self, row: Owner) -> bool:
        """Whether this one may say goodbye for it."""
        return self.admin or self.may_change(row)

    def may_drain(self, row: Owner) -> bool:
        """As `may_end`; where nobody has a token, whoever is let in at all is an operator."""
        return self.principal is None or self.may_end(row)


@dataclass(frozen=True, slots=True)
class Claim:
    """ "I serve in that seat": an announcement, by whom, and for how long the word is good.

    `ttl_s` None: a stock rank, which holds no lease. Treat `labels` and `metadata` as read-only.
    """

    instance: str
    announcement: Announcement
    owner: Owner
    role: str = PREFILL
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        _check_name(self.instance, "instance")
        _check_name(self.role, "role")
        if self.ttl_s is not None and not (math.isfinite(self.ttl_s) and SHORTEST_TTL_S <= self.ttl_s <= LONGEST_TTL_S):
            raise BadField("ttl_s", f"is {self.ttl_s}: give {SHORTEST_TTL_S} to {LONGEST_TTL_S:g} seconds")

    @property
    def seat(self) -> Seat:
        return self.announcement.seat

    @property
    def shape(self) -> Shape:
        return self.announcement.shape

    @property
    def address(self) -> Endpoint:
        return self.announcement.address


def _check_name(text: str, name: str) -> None:
    if not 0 < len(text) <= _LONGEST_NAME or not text.isprintable():
        raise BadField(name, f"is {text[:60]!r}: give 1 to {_LONGEST_NAME} printable characters")


@dataclass(slots=True)
class Pulse:
    """What changes in a life without being a Change: when it last spoke, and what the witness last said of it."""

    spoke_at: float
    suspected: bool = False  # told already
    witnessed: bool = False  # the witness's last word was that it lives


@dataclass(frozen=True, slots=True)
class Ending:
    """How a life was lost, as far as it matters after a restart.

    after         the registry's last epoch then: whoever has a higher one has come since
    of_complete   whether its incarnation had been complete
    """

    kind: ChangeKind
    after: int
    of_complete: bool


@dataclass(frozen=True, slots=True)
class Record:
    """What a journal keeps of a life: everything but times. Of one that is over, until its seat is taken again or its
    instance forgotten: who was known to be dead is known to be dead after a restart.
    """

    claim: Claim
    epoch: int
    incarnation: int
    grace_s: float | None = None  # draining, with this grace
    lost: str | None = None  # why it is over
    ending: Ending | None = None

    def to_row(self) -> dict[str, Any]:
        """As JSON can write it."""
        claim = self.claim
        announced = claim.announcement.to_body()
        return {
            "instance": claim.instance,
            "announcement": announced,
            "host": claim.owner.host,
            "principal": claim.owner.principal,
            "role": claim.role,
            "labels": dict(claim.labels),
            "metadata": dict(claim.metadata),
            "ttl_s": claim.ttl_s,
            "epoch": self.epoch,
            "incarnation": self.incarnation,
            "grace_s": self.grace_s,
            "lost": self.lost,
        } | self._odd_fields()

    def _odd_fields(self) -> dict[str, Any]:
        """Those that most rows do without."""
        ending = self.ending
        said = {} if ending is None else {"ending": [ending.kind.value, ending.after, ending.of_complete]}
        return said | ({} if self.claim.shape.page_size is not None else {"no_page_size": True})

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Record:
        """Raises BadField or KeyError for what `to_row` never wrote."""
        announcement = _announcement(row)
        return cls(
            Claim(
                instance=row["instance"],
                announcement=announcement,
                owner=Owner(row["host"], row["principal"]),
                role=row["role"],
                labels=row["labels"],
                metadata=row["metadata"],
                ttl_s=row["ttl_s"],
            ),
            epoch=row["epoch"],
            incarnation=row["incarnation"],
            grace_s=row["grace_s"],
            lost=row["lost"],
            ending=_ending(row.get("ending")),
        )


def _ending(said: Any) -> Ending | None:
    if said is None:
        return None
    kind, after, of_complete = said
    return Ending(ChangeKind(kind), after, of_complete)


def _announcement(row: Mapping[str, Any]) -> Announcement:
    """A shape read from a topology may have no page size, which no rank may say of itself on the wire."""
    if not row.get("no_page_size"):
        return Announcement.from_body(row["announcement"])
    read = Announcement.from_body({**row["announcement"], "page_size": 1})
    return replace(read, shape=replace(read.shape, page_size=None))


@dataclass(frozen=True, slots=True)
class Life:
    """One process in one seat. `epoch` counts the lives of the registry: a later one is always higher.

    `incarnation` is the epoch of the first life of the instance's incarnation that this one belongs to.
    """

    claim: Claim
    epoch: int
    incarnation: int
    since: float
    pulse: Pulse = field(compare=False, repr=False)
    grace_s: float | None = None
    draining_until: float | None = None

    @classmethod
    def begin(cls, claim: Claim, epoch: int, incarnation: int, now: float) -> Life:
        return cls(claim, epoch, incarnation, now, Pulse(now))

    @classmethod
    def restored(cls, record: Record, now: float) -> Life:
        """One full lease to speak up in, and SUSPECT until it does; a drain has its whole grace again."""
        until = None if record.grace_s is None else now + record.grace_s
        pulse = Pulse(now, suspected=record.claim.ttl_s is not None)
        return cls(record.claim, record.epoch, record.incarnation, now, pulse, record.grace_s, until)

    def record(self, lost: str | None = None, ending: Ending | None = None) -> Record:
        return Record(self.claim, self.epoch, self.incarnation, self.grace_s, lost, ending)

    @property
    def announcement(self) -> Announcement:
        return self.claim.announcement

    @property
    def seat(self) -> Seat:
        return self.claim.announcement.seat

    @property
    def address(self) -> Endpoint:
        return self.claim.announcement.address

    @property
    def owner(self) -> Owner:
        return self.claim.owner

    @property
    def ttl_s(self) -> float | None:
        return self.claim.ttl_s

    @property
    def due(self) -> float | None:
        """When the lease ends; None without one."""
        return None if self.claim.ttl_s is None else self.pulse.spoke_at + self.claim.ttl_s

    @property
    def is_draining(self) -> bool:
        return self.draining_until is not None

    @property
    def next_event(self) -> float:
        """When time alone changes something: suspicion, the end of the lease, the end of the grace; inf for never."""
        ttl_s, until = self.claim.ttl_s, math.inf if self.draining_until is None else self.draining_until
        if ttl_s is None:
            return until
        return min(until, self.pulse.spoke_at + (ttl_s if self.pulse.suspected else ttl_s * SUSPECT_AFTER))

    @property
    def is_vouched(self) -> bool:
        """Whether its lease or its witness says that it lives. An expired lease is no life any more."""
        return self.claim.ttl_s is not None or self.pulse.witnessed

    def standing(self, now: float) -> Standing:
        if self.draining_until is not None:
            return Standing.DRAINING
        ttl_s = self.claim.ttl_s
        late = ttl_s is not None and now >= self.pulse.spoke_at + ttl_s * SUSPECT_AFTER
        return Standing.SUSPECT if late or self.pulse.suspected else Standing.ALIVE

    def draining(self, grace_s: float, now: float) -> Life:
        return replace(self, grace_s=grace_s, draining_until=now + grace_s)


ENDINGS = frozenset(
    {ChangeKind.DRAINED, ChangeKind.EXPIRED, ChangeKind.FORGOTTEN, ChangeKind.LEFT, ChangeKind.SUPERSEDED}
)


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to whom. `before` is the life that was in the seat until this one: its end, if it had not ended.
    `ending`: how the life is remembered from now on.

    `revision` rises with every Change of the registry, and goes on rising after a restart.
    """

    kind: ChangeKind
    life: Life
    revision: int
    before: Life | None = None
    why: str | None = None
    ending: Ending | None = None

    @property
    def instance(self) -> str:
        return self.life.claim.instance

    @property
    def seat(self) -> Seat:
        return self.life.seat

    @property
    def is_end(self) -> bool:
        return self.kind in ENDINGS

    @property
    def is_dropped(self) -> bool:
        """Whether a journal lets go of `life`; otherwise it keeps `record`."""
        return self.is_end and self.ending is None

    @property
    def is_kept(self) -> bool:
        """Whether it makes a difference to a journal."""
        return self.kind not in (ChangeKind.SUSPECTED, ChangeKind.RECOVERED)

    @property
    def record(self) -> Record:
        is_lost = self.ending is not None or self.kind is ChangeKind.LOST
        return self.life.record(self.why if is_lost else None, self.ending)
