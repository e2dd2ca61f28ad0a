"""
The one owner of vLLM's workers: asks who is held where somebody comes again, journals, then acknowledges.

What a claim means is decided in `core.fleet`; no wire is spoken here. Claims take turns by prefill, because questions
lie between judging and writing; claims of different prefills share the journal's group commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from enum import Enum
from functools import partial
from itertools import islice
from math import prod
from typing import NoReturn
from weakref import WeakValueDictionary

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.fleet import Fleet, Move, Place, Prefill, Row, Worker, shown
from pdctl.core.lives import Owner
from pdctl.counts.wires import FleetChange
from pdctl.errors import NotReady, Occupied
from pdctl.metrics import Metrics
from pdctl.retry import deciding
from pdctl.several import of_each

AT_ONCE = 64
LOOK_EVERY_S = 0.5
"""How late it is noticed that nobody joins a prefill any more."""
MISSING_SHOWN = 8

log = structlog.get_logger(__name__)


class Presence(Enum):
    """What became of asking an address."""

    THERE = "there"
    REFUSED = "refused"  # the host says that nobody listens
    SILENT = "silent"  # nobody says anything: gone, or cut off


Hear = Callable[[str, Sequence[Move]], None]
"""What happened to a prefill; no moves: it is complete."""

Look = Callable[[Endpoint], Awaitable[Presence]]
"""Ask an address. Bounded in time by itself."""


class Roster:
    """The dialect calls it."""

    def __init__(
        self,
        fleet: Fleet,
        keep: Callable[[Sequence[Row]], Awaitable[None]],
        look: Look,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._keep = keep
        self._look = look
        self._counts = metrics.fleet
        self._clock = clock
        self._hearers: list[Hear] = []
        self._complete: set[str] = set()  # as it was told
        self._joining: dict[str, float] = {}  # prefills, and when they are complete if nobody joins them
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._counts.follow(lambda: len(fleet), lambda ready: sum(self.is_complete(each) is ready for each in fleet))

    def restore(self, rows: Sequence[Row]) -> None:
        """Take back what the journal kept. Before the first request."""
        self._fleet.apply(rows, self._clock())
        for prefill in self:
            self._look_at(prefill.name)

    def subscribe(self, hear: Hear) -> None:
        """Call `hear` with what has happened, when it holds."""
        self._hearers.append(hear)

    async def watch(self) -> NoReturn:
        """Tell of prefills that are complete because nobody joins them any more. Stand it beside the server."""
        while True:
            now = self._clock()
            for name in [name for name, ready_at in self._joining.items() if ready_at <= now]:
                self._look_at(name)
            await asyncio.sleep(LOOK_EVERY_S)

    async def register(self, worker: Worker) -> None:
        """Return when the claim holds and is journalled. Raises Occupied, LimitReached, BadField."""
        async with self._turn(worker.prefill):
            strangers = await deciding(partial(self._claim, worker))
        await self._bury(strangers)

    async def _claim(self, worker: Worker) -> Sequence[Worker]:
        """Who may be gone since it has come. Raises Behind, and as `register`."""
        rivals = self._fleet.rivals(worker, self._clock())
        found = await self._ask(rivals)
        gone = [rival for rival, presence in zip(rivals, found, strict=True) if presence is not Presence.THERE]
        strangers = self._fleet.strangers(worker)
        await self._perform(self._fleet.claim(worker, gone, self._clock()))
        return strangers

    async def remove(self, engine: str, by: Owner) -> bool:
        """Forget a prefill; False when there is none.

        Its own hosts and an admin's token may do so; others only when nobody is there any more. Raises Occupied.
        """
        prefill = self._fleet.find(engine)
        if prefill is None:
            return False
        async with self._turn(prefill.name):
            return await deciding(partial(self._remove, prefill.name, by))

    async def _remove(self, name: str, by: Owner) -> bool:
        prefill = self._fleet.get(name)
        if prefill is None:
            return False
        foreign = [held for held in prefill.workers.values() if not by.admin and held.host != by.host]
        found = await self._ask(foreign)
        for worker, presence in zip(foreign, found, strict=True):
            if presence is Presence.THERE:
                raise _not_theirs(worker, by)
        rows = self._fleet.drop(prefill)
        await self._perform(rows)
        return bool(rows)

    def query(self, instance: str) -> dict[str, object]:
        """What is complete of the prefills of an instance. Raises NotReady where some are and none is whole."""
        found = [prefill for prefill in self._fleet if prefill.last.instance == instance]
        complete = [prefill for prefill in found if self.is_complete(prefill)]
        if found and not complete:
            raise NotReady("; ".join(map(self._why_not, islice(found, MISSING_SHOWN))))
        return shown(complete)

    def query_engine(self, engine: str) -> dict[str, object]:
        """The prefill of this ID, or of this engine. Raises NotReady."""
        prefill = self._fleet.find(engine)
        if prefill is None:
            raise NotReady(f"no worker of engine {engine!r} has registered yet")
        if not self.is_complete(prefill):
            raise NotReady(self._why_not(prefill))
        return shown([prefill])

    def is_complete(self, prefill: Prefill) -> bool:
        return self._fleet.is_complete(prefill, self._clock())

    def missing(self, prefill: Prefill) -> Iterable[Place]:
        return prefill.missing(self._fleet.sizes)

    def get(self, name: str) -> Prefill | None:
        return self._fleet.get(name)

    def n_seats(self, prefill: Prefill) -> int:
        """How many workers it will have, as far as is known."""
        return prod(prefill.block(self._fleet.sizes))

    def __iter__(self) -> Iterator[Prefill]:
        return iter(self._fleet)

    def _why_not(self, prefill: Prefill) -> str:
        missing = [str(place) for place in islice(self.missing(prefill), MISSING_SHOWN)]
        what = f"missing {', '.join(missing)}" if missing else "workers still joining"
        return f"prefill {prefill.name!r} is not complete yet ({len(prefill.workers)} workers registered, {what})"

    async def _bury(self, strangers: Sequence[Worker]) -> None:
        """Drop prefills whose host says that they are gone: vLLM comes back under a new ID and says no goodbye."""
        found = await self._ask(strangers)
        for worker, presence in zip(strangers, found, strict=True):
            if presence is Presence.REFUSED:
                async with self._turn(worker.prefill):
                    await deciding(partial(self._bury_one, worker))

    async def _bury_one(self, worker: Worker) -> None:
        prefill = self._fleet.find(worker.prefill)
        if prefill is not None and worker in prefill.workers.values():
            await self._perform(self._fleet.drop(prefill))

    async def _ask(self, workers: Sequence[Worker]) -> list[Presence]:
        return await of_each(lambda worker: self._look(worker.address), workers, at_once=AT_ONCE)

    async def _perform(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        await self._keep(rows)
        self.learn(rows)

    def learn(self, rows: Sequence[Row]) -> None:
        """Rows that are journalled, by this registry or by another one."""
        moves: dict[str, list[Move]] = {}
        for move in self._fleet.apply(rows, self._clock()):
            row = move.row
            moves.setdefault(row.prefill, []).append(move)
            change = FleetChange.LEFT if row.worker is None else FleetChange.JOINED
            self._counts.changed(change)
            addr = None if row.worker is None else row.worker.addr
            log.info("vLLM worker", change=change.value, prefill=row.prefill, place=str(row.place), addr=addr)
        for name, happened in moves.items():
            self._tell(name, happened)
            self._look_at(name)

    def _look_at(self, name: str) -> None:
        """Tell when it has become complete, and remember when to look again."""
        self._joining.pop(name, None)
        prefill = self._fleet.get(name)
        if prefill is None or not self.is_complete(prefill):
            self._complete.discard(name)
            ready_at = None if prefill is None else self._fleet.ready_at(prefill)
            if ready_at is not None:
                self._joining[name] = ready_at
        elif name not in self._complete:
            self._complete.add(name)
            self._tell(name, [])

    def _tell(self, name: str, happened: Sequence[Move]) -> None:
        for hear in self._hearers:
            hear(name, happened)

    def _turn(self, prefill: str) -> asyncio.Lock:
        """One for each prefill, for as long as somebody holds it or waits for it."""
        return self._turns.setdefault(prefill, asyncio.Lock())


def _not_theirs(worker: Worker, by: Owner) -> Occupied:
    return Occupied(
        f"engine {worker.engine_id!r} was registered from {worker.host} and still answers at {worker.addr}, and {by} "
        "wants it forgotten: ask from that host or with a token of the admin role, or stop the engine first",
        holder=worker.host,
        claimant=by.host,
    )
