"""
The engine port's promises, kept once for every adapter: who is written to, what is waited for, when it is over.

An adapter is a `Carrier`: it asks peers, holds registrations, moves blocks. Everything that must not differ between
adapters is here and in pins.py: the pinned life of a peer, the address check, deadlines, cancellation, rest. All of it
on one loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import numpy as np
import structlog

from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.core.turns import split
from pdctl.engine.base import Capabilities, PeerCard, Proof
from pdctl.engine.blocks import Direction, Transfer, blocks
from pdctl.engine.canary import Canary, Questions
from pdctl.engine.carrier import Carrier
from pdctl.engine.checks import check_plan, check_region, first_outside
from pdctl.engine.gather import Gathering
from pdctl.engine.pins import ATTEMPTS, Pins
from pdctl.engine.settings import Patience
from pdctl.errors import BadField, Cause, TransferFailed

log = structlog.get_logger(__name__)

_LOOKED_AT = 256  # copies of a plan whose transfer failed, evenly spread: what is not mapped is mostly all of an arena


class _BesideAnother(TransferFailed):
    """None of its own blocks has failed: it was stopped because one of another transfer with the same peer had."""


class PromisedEngine:
    """See engine/base.py for what each method promises. Used on the loop it was made on."""

    def __init__(self, carrier: Carrier, patience: Patience) -> None:
        self._carrier = carrier
        self._loop = asyncio.get_running_loop()
        self._canary = Canary()
        self._questions = Questions(self._canary, carrier.add, carrier.nudge)
        self._pins = Pins(carrier, self._questions, patience, self._loop.time)
        self._patience = patience
        self._regions: set[Region] = set()
        self._moving: dict[str, set[Transfer]] = {}
        self._closed = False
        self._shown = False

    @property
    def session(self) -> str:
        return self._carrier.session

    @property
    def capabilities(self) -> Capabilities:
        return self._carrier.capabilities

    @property
    def canary(self) -> Canary:
        """What this engine lets its peers see of its life, beside what is registered."""
        return self._canary

    async def show(self) -> None:
        """Let peers reach the canary: once, before anybody can know this engine."""
        code = await self._carrier.register(self._canary.region)
        if code != 0:
            log.warning("peers cannot prove that they reach this engine: its canary is not registered", code=code)
        self._shown = code == 0

    async def register(self, region: Region) -> None:
        self._check_open(self.session)
        check_region(region, self._regions)
        self._regions.add(region)
        code = await self._carrier.register(region)
        if code != 0:
            self._regions.discard(region)
            raise BadField("pointer", f"the engine does not register {region} (code {code}): check that it is mapped")

    async def unregister(self, region: Region) -> None:
        self._check_open(self.session)
        if region not in self._regions:
            raise BadField("pointer", f"{region} is not registered: give exactly what was registered")
        self._regions.discard(region)
        code = await self._carrier.unregister(region)
        if code != 0:
            log.warning("the engine did not unregister a region", region=str(region), code=code)

    async def write(self, session: str, plan: CopyPlan, *, deadline_s: float) -> None:
        await self._move(session, plan, deadline_s, Direction.WRITE)

    async def read(self, session: str, plan: CopyPlan, *, deadline_s: float) -> None:
        if not self.capabilities.async_read:
            raise TransferFailed(Cause.LOCAL, session, "the installed engine cannot read: install mooncake 0.3.13")
        await self._move(session, plan, deadline_s, Direction.READ)

    async def probe(self, session: str, *, deadline_s: float) -> PeerCard:
        return (await self._carrier.describe(session, deadline_s)).card

    async def prove(self, session: str, *, deadline_s: float) -> Proof:
        self._check_open(session)
        return await self._pins.prove(session, deadline_s)

    def card(self, session: str) -> PeerCard | None:
        return self._pins.card(session)

    def forget(self, session: str) -> None:
        self._pins.forget(session)

    async def settle(self, session: str) -> None:
        moving = self._moving.get(session)
        if moving:
            await asyncio.wait([transfer.rest for transfer in moving])

    async def close(self) -> bool:
        """Stop and wait for rest, take back the regions; whether all is at rest."""
        self._closed = True
        at_rest = await self._rest()
        while self._regions and self._carrier.is_open:
            await self._carrier.unregister(self._regions.pop())
        if self._shown and self._carrier.is_open:
            await self._carrier.unregister(self._canary.region)
        self._pins.close()
        return at_rest

    async def _rest(self) -> bool:
        moving = [transfer for transfers in self._moving.values() for transfer in transfers] + self._questions.moving
        if not moving:
            return True
        for transfer in moving:
            self._stop(transfer, Cause.LOCAL, "this engine is closing")
        _, restless = await asyncio.wait([transfer.rest for transfer in moving], timeout=self._patience.rest_s)
        return not restless

    # --- one transfer

    async def _move(self, session: str, plan: CopyPlan, deadline_s: float, direction: Direction) -> None:
        until = self._loop.time() + deadline_s
        self._check_open(session)
        check_plan(plan)
        if not len(plan):
            return
        self._check_local(session, plan)
        left = ATTEMPTS
        while True:
            try:
                await self._attempt(session, plan, until, deadline_s, direction)
                return
            except TransferFailed as failure:
                self._check_own_fault(session, plan, failure)
                # What another's failure has ended is no attempt of its own: beside a write whose every attempt failed,
                # from memory that was registered and not mapped, a good write failed with it once in 3 rounds.
                left -= not isinstance(failure, _BesideAnother)
                if not left or failure.cause is not Cause.PEER_GONE:
                    raise
                if not await self._is_well_after_all(session, plan, until):
                    raise

    def _check_own_fault(self, session: str, plan: CopyPlan, failure: TransferFailed) -> None:
        """A source that is not mapped any more, or a process without descriptors, looks to the engine as a peer that
        hangs up (docs/hazards.md): before the peer is blamed, and asked, this side is looked at."""
        if isinstance(failure, _BesideAnother) or failure.cause not in (Cause.PEER_GONE, Cause.REFUSED):
            return
        some = np.linspace(0, len(plan) - 1, min(len(plan), _LOOKED_AT)).astype(np.int64)
        spans = zip(plan.src[some].tolist(), plan.nbytes[some].tolist(), strict=True)
        fault = self._carrier.own_fault(Region(*span) for span in spans)
        if fault is not None:
            raise TransferFailed(Cause.LOCAL, session, f"{fault} ({failure.detail})") from failure

    async def _is_well_after_all(self, session: str, plan: CopyPlan, until: float) -> bool:
        """Whether a connection broke while its peer lives on: then the copies, which are at rest, may be made again.

        Measured: of transfers that came first after a peer had hung, 16 of 28 met a stale connection at once, and 2 of
        those met one again. Another life raises PEER_CHANGED, and a peer that has taken the memory back
        REJECTED_ADDRESS: these are the better words.
        """
        try:
            await self._pins.meet(session, plan, until)
        except TransferFailed as failure:
            if failure.cause is Cause.PEER_CHANGED or not failure.cause.speaks_of_peer:
                raise
            return False
        return True

    async def _attempt(
        self, session: str, plan: CopyPlan, until: float, deadline_s: float, direction: Direction
    ) -> None:
        pin = await self._pins.meet(session, plan, until)
        self._check_open(session)
        pieces = split(plan, self._patience.block_limit)
        rest: asyncio.Future[Any] = self._loop.create_future()
        moves, total = blocks(pieces), len(pieces)
        if direction is Direction.WRITE and self._carrier.gathers:
            gathering = Gathering.of(pieces)
            moves, total = gathering.blocks(), len(gathering)
        transfer = Transfer(pin.lane, pin.faith, direction, moves, total, plan.total, rest)
        over = self._loop.create_future()  # and not `rest` itself, which a cancelled wait would cancel
        self._begin(session, transfer, over)
        await self._see_through(session, transfer, over, until, deadline_s)

    def _begin(self, session: str, transfer: Transfer, over: asyncio.Future[None]) -> None:
        self._moving.setdefault(session, set()).add(transfer)
        transfer.rest.add_done_callback(lambda _: self._at_rest(session, transfer, over))
        self._carrier.add(transfer)

    def _at_rest(self, session: str, transfer: Transfer, over: asyncio.Future[None]) -> None:
        moving = self._moving[session]
        moving.discard(transfer)
        if not moving:
            del self._moving[session]
        _end(over)

    async def _see_through(
        self, session: str, transfer: Transfer, over: asyncio.Future[None], until: float, deadline_s: float
    ) -> None:
        late = self._loop.call_at(until, _end, over)
        try:
            await over
        except asyncio.CancelledError:
            self._stop(transfer, Cause.LOCAL, "cancelled")
            await outlast(transfer.rest)
            raise
        finally:
            late.cancel()
        if not transfer.rest.done():
            detail = f"not over within {deadline_s:g} s, {transfer.submitted} of {transfer.total} blocks submitted"
            self._stop(transfer, Cause.TIMED_OUT, detail)
            self._pins.doubt(session)
            raise TransferFailed(Cause.TIMED_OUT, session, detail, settled=False)
        verdict = transfer.rest.result()
        if verdict is not None:
            raise (_BesideAnother if transfer.by_another else TransferFailed)(verdict[0], session, verdict[1])

    def _stop(self, transfer: Transfer, cause: Cause, detail: str) -> None:
        transfer.stop(cause, detail)
        self._carrier.nudge()

    def _check_open(self, session: str) -> None:
        if self._closed or not self._carrier.is_open:
            raise TransferFailed(Cause.LOCAL, session, "this engine is closed")

    def _check_local(self, session: str, plan: CopyPlan) -> None:
        """What is not registered cannot be sent over RDMA, and a bad pointer would look like the peer's failure."""
        bad = first_outside(self._regions, plan.src, plan.nbytes)
        if bad is not None:
            where = f"{int(plan.src[bad]):#x} + {int(plan.nbytes[bad])}"
            raise TransferFailed(Cause.LOCAL, session, f"{where} lies in no region registered here: register it first")


def _end(wait: asyncio.Future[None]) -> None:
    if not wait.done():
        wait.set_result(None)


async def outlast(rest: asyncio.Future[Any]) -> None:
    """Wait for `rest` even through further cancellations: memory that still moves cannot be handed back."""
    while not rest.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([rest])
