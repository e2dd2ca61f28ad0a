"""
What is known of one instance, as a value: a view is never changed, another one takes its place.

An instance has two incarnations at most, each with its own shape: the one that is served, and one that is forming
beside it because the instance was restarted with other settings. They never mix. The forming one is served from the
moment it is complete, or from the moment that nobody is left of the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Claim, Life
from pdctl.core.route import Seat, Shape


@dataclass(frozen=True, slots=True)
class Loss:
    """A seat's last holder is gone, and nobody has come since. `kind` is how: LOST ones may be found again."""

    life: Life
    kind: ChangeKind
    why: str
    at: float
    after: int = 0  # the registry's last epoch then

    @property
    def may_return(self) -> bool:
        return self.kind is ChangeKind.LOST


@dataclass(frozen=True)
class Incarnation:
    """Who sits where in one shape. `number` is the epoch of its first life."""

    number: int
    shape: Shape
    role: str = "prefill"
    alive: Mapping[Seat, Life] = field(default_factory=dict)
    lost: Mapping[Seat, Loss] = field(default_factory=dict)
    was_complete: bool = False

    @property
    def is_complete(self) -> bool:
        """Set equality: every key of `alive` is a seat of `shape`, so that equal sizes are equal sets."""
        return len(self.alive) == self.shape.n_seats

    @property
    def missing(self) -> Iterator[Seat]:
        """Seats that nobody holds, in order. Up to 65,536 of them: take what you show."""
        shape = self.shape
        places = product(*map(range, (shape.dp_size, shape.attn_cp_size, shape.attn_tp_size, shape.pp_size)))
        return (seat for seat in (Seat(*place) for place in places) if seat not in self.alive)

    @cached_property
    def http_port(self) -> int | None:
        """The API port of the lowest seat that says one: the same answer in whatever order the ranks came."""
        said = ((seat, life.announcement.prefill_http_port) for seat, life in self.alive.items())
        return min(((seat, port) for seat, port in said if port is not None), default=(None, None))[1]

    @cached_property
    def is_draining(self) -> bool:
        """Whether any rank drains: a pair needs them all."""
        return any(life.is_draining for life in self.alive.values())

    @cached_property
    def death(self) -> Loss | None:
        """The first loss, when nothing can be finished here any more and nobody has come since the last one.

        That is: nobody is left; or it was complete, and each of its DP groups has lost a rank.
        """
        if not self.lost or self._newest > max(loss.after for loss in self.lost.values()):
            return None
        groups = {seat.dp for seat in self.lost}
        if self.alive and not (self.was_complete and len(groups) == self.shape.dp_size):
            return None
        return min(self.lost.values(), key=lambda loss: loss.at)

    @property
    def returnable(self) -> Iterator[Life]:
        return (loss.life for loss in self.lost.values() if loss.may_return)

    @property
    def kept(self) -> Iterator[Life]:
        """Every life of it that a journal still keeps: all that are remembered."""
        yield from self.alive.values()
        yield from (loss.life for loss in self.lost.values())

    @property
    def newest_at(self) -> float:
        """When its latest life began."""
        return max((life.since for life in self.alive.values()), default=-math.inf)

    @property
    def _newest(self) -> int:
        return max((life.epoch for life in self.alive.values()), default=-1)

    def fits(self, claim: Claim) -> bool:
        shape = claim.announcement.shape
        return (self.shape is shape or self.shape == shape) and self.role == claim.role

    def seating(self, *lives: Life) -> Incarnation:
        alive = dict(self.alive)
        alive.update([(life.seat, life) for life in lives])
        lost = {seat: loss for seat, loss in self.lost.items() if seat not in alive} if self.lost else self.lost
        complete = self.was_complete or len(alive) == self.shape.n_seats
        return Incarnation(self.number, self.shape, self.role, alive, lost, complete)

    def losing(self, losses: Iterable[Loss]) -> Incarnation:
        gone = {loss.life.seat: loss for loss in losses}
        alive = {seat: life for seat, life in self.alive.items() if seat not in gone}
        return replace(self, alive=alive, lost={**self.lost, **gone})


@dataclass(frozen=True)
class InstanceView:
    """What is known of one instance. `revision` is that of the last Change to it: the same one means the same view.

    What readers use speaks of the served incarnation: `shape`, `alive`, `missing`, `ready`, `http_port`.
    """

    name: str
    served: Incarnation
    forming: Incarnation | None = None
    last_epoch: int = 0
    revision: int = 0
    empty_since: float | None = None

    @property
    def shape(self) -> Shape:
        return self.served.shape

    @property
    def role(self) -> str:
        return self.served.role

    @property
    def alive(self) -> Mapping[Seat, Life]:
        return self.served.alive

    @property
    def ready(self) -> bool:
        """Whether every seat of the shape is held: others may use the instance, unless it drains."""
        return self.served.is_complete

    @property
    def missing(self) -> Iterator[Seat]:
        return self.served.missing

    @property
    def http_port(self) -> int | None:
        return self.served.http_port

    @property
    def draining(self) -> bool:
        """Whether it gets no new pairs."""
        return self.served.is_draining

    def health(self, now: float) -> str | None:
        """Why the instance is known to be dead; None while it lives or is starting."""
        loss = self.served.death
        if loss is None:
            return None
        return (
            f"instance {self.name} is known to be dead: the rank in {loss.life.seat} at {loss.life.address} "
            f"{loss.why}, {now - loss.at:.0f} s ago: start it again"
        )

    @property
    def incarnations(self) -> tuple[Incarnation, ...]:
        return (self.served,) if self.forming is None else (self.served, self.forming)

    @property
    def lives(self) -> Iterator[Life]:
        """Everybody who is alive, in either incarnation."""
        return (life for incarnation in self.incarnations for life in incarnation.alive.values())

    @property
    def under_witness(self) -> Iterator[Life]:
        """The lives without a lease, of whom only a witness can tell; those included that it has lost."""
        for incarnation in self.incarnations:
            yield from (life for life in incarnation.alive.values() if life.ttl_s is None)
            yield from incarnation.returnable

    @property
    def n_remembered(self) -> int:
        """Lives held in memory: alive, or lost."""
        served, forming = self.served, self.forming
        n_served = len(served.alive) + len(served.lost)
        return n_served if forming is None else n_served + len(forming.alive) + len(forming.lost)

    @property
    def is_empty(self) -> bool:
        """Whether nobody is alive, in either incarnation."""
        return not self.served.alive and (self.forming is None or not self.forming.alive)

    def holder(self, seat: Seat, epoch: int) -> Life | None:
        """The life of that epoch in that seat, in either incarnation."""
        held = (incarnation.alive.get(seat) for incarnation in self.incarnations)
        return next((life for life in held if life is not None and life.epoch == epoch), None)

    def loss(self, seat: Seat, epoch: int) -> Loss | None:
        """How the life of that epoch was lost."""
        lost = (incarnation.lost.get(seat) for incarnation in self.incarnations)
        return next((loss for loss in lost if loss is not None and loss.life.epoch == epoch), None)

    def having(self, changed: Incarnation, last_epoch: int = 0) -> InstanceView:
        """With an incarnation in another state; a number that is neither's is a new one, which is forming."""
        is_served = changed.number == self.served.number
        served, forming = (changed, self.forming) if is_served else (self.served, changed)
        last_epoch = max(last_epoch, self.last_epoch)
        return InstanceView(self.name, served, forming, last_epoch, self.revision, self.empty_since)

    def written(self, revision: int, empty_since: float | None) -> InstanceView:
        """As it is kept, at `revision`."""
        return InstanceView(self.name, self.served, self.forming, self.last_epoch, revision, empty_since)
