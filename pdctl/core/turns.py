"""
Whose turn it is to write to one decode rank: the rooms in a circle, a turn each, while few enough bytes are under way.

No clock, no loop, no bytes: who asks is told by whoever holds it when `begin` names its turn.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np

from pdctl.core.plan import CopyPlan

SMALL, PASSING = 64, 8
"""A turn of a 64th of the limit does not wait behind large ones: an eighth of the limit may pass them at once."""


@dataclass(slots=True, eq=False)
class Turn:
    """`nbytes` of one room; `is_under_way` from the moment that `begin` has named it, `passes` if before its turn."""

    room: Hashable
    nbytes: int
    is_under_way: bool = False
    passes: bool = False


class Turns:
    """What one decode rank is being sent, and what waits. At most `max_nbytes` are under way, what passes, and whatever
    the last turn is over it: so a turn larger than the limit goes too, when less than the limit is under way."""

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._waiting: OrderedDict[Hashable, deque[Turn]] = OrderedDict()
        self._small: OrderedDict[Turn, None] = OrderedDict()
        self._under_way: set[Turn] = set()
        self._passing = 0
        self.nbytes = 0

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._under_way

    @property
    def rooms_waiting(self) -> int:
        return len(self._waiting)

    def ask(self, room: Hashable, nbytes: int) -> Turn:
        turn = Turn(room, nbytes)
        self._waiting.setdefault(room, deque()).append(turn)
        if nbytes * SMALL <= self._max_nbytes:
            self._small[turn] = None
        return turn

    def begin(self) -> Iterator[Turn]:
        """Those whose turn it is now: a room that has had one goes behind those that wait."""
        while self._waiting and self.nbytes < self._max_nbytes:
            room, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[room] = turns
            self._small.pop(turn, None)
            yield self._begun(turn)
        while self._small and self._passing * PASSING < self._max_nbytes:
            turn, _ = self._small.popitem(last=False)
            self._leave(turn)
            turn.passes = True
            self._passing += turn.nbytes
            yield self._begun(turn)

    def _begun(self, turn: Turn) -> Turn:
        self._under_way.add(turn)
        self.nbytes += turn.nbytes
        turn.is_under_way = True
        return turn

    def end(self, turn: Turn) -> None:
        """It is over, or nobody waits for it any more."""
        if turn.is_under_way:
            self._under_way.remove(turn)
            self.nbytes -= turn.nbytes
            self._passing -= turn.nbytes if turn.passes else 0
            return
        self._small.pop(turn, None)
        self._leave(turn)

    def _leave(self, turn: Turn) -> None:
        turns = self._waiting[turn.room]
        turns.remove(turn)
        if not turns:
            del self._waiting[turn.room]


def cut(plan: CopyPlan, nbytes: int) -> list[CopyPlan]:
    """The same copies, in order, in pieces of about `nbytes`: each begins where the next multiple of it is passed."""
    if plan.total <= nbytes:
        return [plan]
    piece = (np.cumsum(plan.nbytes) - plan.nbytes) // nbytes
    starts = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(plan)]
    return [CopyPlan(plan.src[a:b], plan.dst[a:b], plan.nbytes[a:b]) for a, b in itertools.pairwise(starts)]


def split(plan: CopyPlan, limit: int) -> CopyPlan:
    """The same bytes in copies of at most `limit`, in the same order."""
    if not len(plan) or int(np.maximum.reduce(plan.nbytes)) <= limit:
        return plan
    pieces = -(-plan.nbytes // limit)
    owner = np.repeat(np.arange(len(plan)), pieces)
    offset = (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * limit
    return CopyPlan(plan.src[owner] + offset, plan.dst[owner] + offset, np.minimum(plan.nbytes[owner] - offset, limit))
