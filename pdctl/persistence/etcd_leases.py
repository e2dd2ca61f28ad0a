"""
Leases of ranks, kept in etcd: a key for each life, PREFIX/pulses/EPOCH, which is gone when nobody has heard it.

    a rank renews at one registry ─> its lease is kept alive in etcd ─> every registry sees its key
    the key is gone ─> a registry that has heard the rank puts it back; else the life is over, after a grace

While etcd cannot be reached nothing is over: what is heard meanwhile is renewed when it is back.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NoReturn

from pdctl.core.lives import Record
from pdctl.errors import Unreachable
from pdctl.persistence.etcd_place import EtcdPlace
from pdctl.persistence.etcd_wire import Etcd, KeepAlive, KeyValue, Put
from pdctl.retry import RetryPolicy, retrying

GRACE_S: Final = 3.0
"""From the loss of a key to the end of the life: for another registry that has heard the rank to say so."""

AT_ONCE: Final = 64
"""Leases that are asked for side by side."""

AGAIN: Final = RetryPolicy(first_wait_s=0.1, max_wait_s=1.0, full_jitter=True)
"""How etcd is asked again, by the journal too."""

Told = Callable[[Record, float | None], None]


class Pulses:
    """Of all leased lives. Fed by the journal's listing and watch; `run` speaks to etcd."""

    def __init__(
        self, etcd: Etcd, place: EtcdPlace, clock: Callable[[], float], record: Callable[[int], Record | None]
    ) -> None:
        """`record`: what the journal keeps of the life with that epoch, if it lives."""
        self._etcd = etcd
        self._place = place
        self._clock = clock
        self._record = record
        self._leases: dict[int, int] = {}
        self._heard_at: dict[int, float] = {}
        self._to_renew: set[int] = set()
        self._to_put: dict[int, None] = {}
        self._work = asyncio.Event()
        self._told: Told | None = None

    def __contains__(self, epoch: int) -> bool:
        return epoch in self._leases

    def subscribe(self, told: Told) -> None:
        """As Shared says of `pulse`."""
        self._told = told

    # What etcd says

    def take_listing(self, keys: Iterable[KeyValue], leased: Mapping[int, Record]) -> None:
        """All that there are, and all lives that should have one."""
        known = {self._epoch(found.key): found.lease for found in keys}
        self._leases = known
        self._heard_at = {epoch: at for epoch, at in self._heard_at.items() if epoch in leased}
        self._to_renew &= leased.keys()
        for epoch, record in leased.items():
            if epoch in known:
                self._tell(record, None)
            else:
                self._missing(record, max(GRACE_S, record.claim.ttl_s or 0.0))

    def take_event(self, event: KeyValue) -> None:
        epoch = self._epoch(event.key)
        record = self._record(epoch)
        if event.value is not None:
            self._leases[epoch] = event.lease
            if record is not None:
                self._tell(record, None)
        elif record is None:
            self._forget(epoch)
        elif self._leases.pop(epoch, None) is not None:
            self._missing(record, GRACE_S)

    # What ranks say

    def heard(self, epoch: int) -> None:
        """A rank has spoken here."""
        self._heard_at[epoch] = self._clock()
        if epoch in self._leases:
            self._to_renew.add(epoch)
        else:
            self._to_put[epoch] = None
        self._work.set()

    async def begin(self, records: Iterable[Record]) -> None:
        """Lives that are about to be kept. Raises Unreachable."""
        new = [record for record in records if record.epoch not in self._leases]
        for first in range(0, len(new), AT_ONCE):
            await self._put(new[first : first + AT_ONCE])

    async def run(self) -> NoReturn:
        """Keep alive whom was heard; until cancelled."""
        while True:
            await retrying(AGAIN, self._run, keep_trying=True)

    async def _run(self) -> None:
        async with self._etcd.keep_alive() as stream:
            answers = asyncio.ensure_future(self._answers(stream))
            try:
                while not answers.done():
                    await self._some_work(answers)
                    await self._renew(stream)
                await answers
            finally:
                answers.cancel()
                await asyncio.wait({answers})

    async def _some_work(self, answers: asyncio.Future[NoReturn]) -> None:
        """Return when somebody was heard, or the answers have ended."""
        work = asyncio.ensure_future(self._work.wait())
        either: set[asyncio.Future[Any]] = {work, answers}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
        self._work.clear()

    async def _renew(self, stream: KeepAlive) -> None:
        again, self._to_put = self._to_put, {}
        records = [record for record in map(self._record, again) if record is not None]
        try:
            await self.begin(records)
        except Unreachable:
            self._to_put = again | self._to_put
            raise
        while self._to_renew:
            epoch = self._to_renew.pop()
            lease = self._leases.get(epoch)
            if lease is None:
                continue
            try:
                await stream.renew(lease)
            except Unreachable:
                self._to_renew.add(epoch)
                raise

    async def _answers(self, stream: KeepAlive) -> NoReturn:
        """Nothing is done with them: a lease that is over has lost its key, and the watch says so."""
        while True:
            await stream.answer()

    async def _put(self, records: list[Record]) -> None:
        leases = await asyncio.gather(*(self._etcd.grant(_whole(record)) for record in records))
        keys = [self._place.key(f"pulses/{record.epoch}") for record in records]
        await self._etcd.commit([Put(key, b"", lease) for key, lease in zip(keys, leases, strict=True)])

    def _missing(self, record: Record, over_in_s: float) -> None:
        heard_at, ttl_s = self._heard_at.get(record.epoch, -math.inf), record.claim.ttl_s or 0.0
        if self._clock() - heard_at < ttl_s:
            self._to_put[record.epoch] = None
            self._work.set()
        else:
            self._heard_at.pop(record.epoch, None)  # long ago
            self._tell(record, over_in_s)

    def _forget(self, epoch: int) -> None:
        """The life was over before its key."""
        self._leases.pop(epoch, None)
        self._heard_at.pop(epoch, None)
        self._to_renew.discard(epoch)
        self._to_put.pop(epoch, None)

    def _tell(self, record: Record, over_in_s: float | None) -> None:
        if self._told is not None:
            self._told(record, over_in_s)

    def _epoch(self, key: str) -> int:
        return int(self._place.name(key).removeprefix("pulses/"))


def _whole(record: Record) -> int:
    """Seconds as etcd counts them."""
    return math.ceil(record.claim.ttl_s or 1.0)
