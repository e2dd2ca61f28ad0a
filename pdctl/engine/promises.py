"""
The engine port's promises, kept once for every adapter: who is written to, what is waited for, when it is over.

An adapter is a `Carrier`: it asks peers, holds registrations, moves blocks. Everything that must not differ between
adapters is here: the pinned life of a peer, the address check, deadlines, cancellation, rest. All of it on one loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.engine.base import Capabilities, PeerCard
from pdctl.engine.blocks import Direction, Lane, Transfer, blocks, split
from pdctl.engine.checks import check_plan, check_region, first_outside
from pdctl.engine.handshake import Descriptor
from pdctl.errors import BadField, Cause, TransferFailed

log = structlog.get_logger(__name__)

_ATTEMPTS = 1 + 4  # the engine has four connections to a peer, and each can be stale; every attempt meets one at least


class Carrier(Protocol):
    """What an adapter adds. Codes of the registrations: 0 is done, everything else is a refusal."""

    @property
    def session(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def is_open(self) -> bool: ...

    async def register(self, region: Region) -> int: ...

    async def unregister(self, region: Region) -> int: ...

    async def describe(self, session: str, deadline_s: float) -> Descriptor:
        """Who is there? Raises TransferFailed."""

    async def lane(self, session: str, found: Descriptor) -> Lane:
        """A way to this life of the peer, not shared with any other life."""

    def add(self, transfer: Transfer) -> None:
        """Carry it, and call its `settle` on the loop when it is at rest."""

    def nudge(self) -> None:
        """A transfer was stopped: look at once."""


@dataclass(frozen=True, slots=True)
class Patience:
    """`ask_s` bounds one question to a peer; after `recheck_s` without one, it is asked again before a transfer;
    `rest_s` bounds what closing waits for blocks in flight; `block_limit` bytes is the longest block."""

    ask_s: float
    recheck_s: float
    rest_s: float
    block_limit: int


@dataclass(slots=True)
class _Pin:
    """The life of a peer that is meant. `faith`: what `lane.failures` was at its last good answer."""

    card: PeerCard
    lane: Lane
    asked_at: float
    faith: int = 0

    @property
    def doubted(self) -> bool:
        return self.faith != self.lane.failures


class PromisedEngine:
    """See engine/base.py for what each method promises. Used on the loop it was made on."""

    def __init__(self, carrier: Carrier, patience: Patience) -> None:
        self._carrier = carrier
        self._loop = asyncio.get_running_loop()
        self._pins = _Pins(carrier, patience, self._loop.time)
        self._patience = patience
        self._regions: set[Region] = set()
        self._moving: dict[str, set[Transfer]] = {}
        self._closed = False

    @property
    def session(self) -> str:
        return self._carrier.session

    @property
    def capabilities(self) -> Capabilities:
        return self._carrier.capabilities

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
        self._pins.close()
        return at_rest

    async def _rest(self) -> bool:
        moving = [transfer for transfers in self._moving.values() for transfer in transfers]
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
        for left in reversed(range(_ATTEMPTS)):
            try:
                await self._attempt(session, plan, until, deadline_s, direction)
                break
            except TransferFailed as failure:
                if not left or failure.cause is not Cause.PEER_GONE:
                    raise
                if not await self._is_well_after_all(session, plan, until):
                    raise

    async def _is_well_after_all(self, session: str, plan: CopyPlan, until: float) -> bool:
        """Whether a connection broke while its peer lives on: then the copies, which are at rest, may be made again.

        Measured: of transfers that came first after a peer had hung, 16 of 28 met a stale connection at once, and 2 of
        those met one again. Another life raises PEER_CHANGED: that is the better word.
        """
        try:
            await self._pins.meet(session, plan, until)
        except TransferFailed as failure:
            if failure.cause is Cause.PEER_CHANGED:
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
        transfer = Transfer(pin.lane, pin.faith, direction, blocks(pieces), len(pieces), rest)
        self._begin(session, transfer)
        await self._see_through(session, transfer, until, deadline_s)

    def _begin(self, session: str, transfer: Transfer) -> None:
        self._moving.setdefault(session, set()).add(transfer)
        transfer.rest.add_done_callback(lambda _: self._at_rest(session, transfer))
        self._carrier.add(transfer)

    def _at_rest(self, session: str, transfer: Transfer) -> None:
        moving = self._moving[session]
        moving.discard(transfer)
        if not moving:
            del self._moving[session]

    async def _see_through(self, session: str, transfer: Transfer, until: float, deadline_s: float) -> None:
        try:
            await asyncio.wait([transfer.rest], timeout=max(0.0, until - self._loop.time()))
        except asyncio.CancelledError:
            self._stop(transfer, Cause.LOCAL, "cancelled")
            await outlast(transfer.rest)
            raise
        if not transfer.rest.done():
            detail = f"not over within {deadline_s:g} s, {transfer.submitted} of {transfer.total} blocks submitted"
            self._stop(transfer, Cause.TIMED_OUT, detail)
            self._pins.doubt(session)
            raise TransferFailed(Cause.TIMED_OUT, session, detail, settled=False)
        verdict = transfer.rest.result()
        if verdict is not None:
            raise TransferFailed(verdict[0], session, verdict[1])

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


class _Pins:
    """Which life of each peer is meant, and whether it has been proven well since its last failure."""

    def __init__(self, carrier: Carrier, patience: Patience, clock: Callable[[], float]) -> None:
        self._carrier = carrier
        self._patience = patience
        self._clock = clock
        self._pins: dict[str, _Pin] = {}
        self._asking: dict[str, asyncio.Lock] = {}

    async def meet(self, session: str, plan: CopyPlan, until: float) -> _Pin:
        """The pinned life, proven well where that is due, whose regions hold all of `plan.dst`."""
        async with self._asking.setdefault(session, asyncio.Lock()):
            pin, fresh = self._pins.get(session), False
            if pin is None or pin.doubted or self._clock() - pin.asked_at >= self._patience.recheck_s:
                pin, fresh = await self._ask(session, pin, until), True
            bad = first_outside(pin.card.regions, plan.dst, plan.nbytes)
            if bad is not None and not fresh:  # it may have registered more since
                pin = await self._ask(session, pin, until)
                bad = first_outside(pin.card.regions, plan.dst, plan.nbytes)
        if bad is not None:
            raise _rejected(session, plan, bad, pin.card)
        return pin

    def card(self, session: str) -> PeerCard | None:
        pin = self._pins.get(session)
        return pin.card if pin else None

    def doubt(self, session: str) -> None:
        if session in self._pins:
            self._pins[session].faith = -1

    def forget(self, session: str) -> None:
        pin = self._pins.pop(session, None)
        self._asking.pop(session, None)
        if pin is not None:
            pin.lane.close()

    def close(self) -> None:
        for session in list(self._pins):
            self.forget(session)

    async def _ask(self, session: str, pin: _Pin | None, until: float) -> _Pin:
        deadline_s = min(self._patience.ask_s, max(0.0, until - self._clock()))
        if pin is None:
            found = await self._carrier.describe(session, deadline_s)
            pin = _Pin(found.card, await self._carrier.lane(session, found), self._clock())
            self._pins[session] = pin
            return pin
        failures = pin.lane.failures  # before the question: a failure meanwhile is one more doubt
        found_now = await _unless_silent(self._carrier.describe(session, deadline_s), may_be_silent=not pin.doubted)
        if found_now is None:
            return pin
        if not pin.card.same_life(found_now.card):
            raise TransferFailed(Cause.PEER_CHANGED, session, "another process answers there now: let it register anew")
        pin.card, pin.asked_at, pin.faith = found_now.card, self._clock(), failures
        return pin


async def _unless_silent(asking: Awaitable[Descriptor], *, may_be_silent: bool) -> Descriptor | None:
    """Of a peer that did nothing wrong so far, silence is no news: its listener is one thread, and each idle connection
    to it costs 5 s. What is in flight to it is bounded by the carrier's own stall limit."""
    try:
        return await asking
    except TransferFailed as failure:
        if failure.cause is Cause.TIMED_OUT and may_be_silent:
            return None
        raise


def _rejected(session: str, plan: CopyPlan, bad: int, card: PeerCard) -> TransferFailed:
    where = f"{int(plan.dst[bad]):#x} + {int(plan.nbytes[bad])}"
    return TransferFailed(
        Cause.REJECTED_ADDRESS,
        session,
        f"{where} lies in none of the {len(card.regions)} regions that the peer announces: "
        "let the peer register it, or ask it for its addresses again",
    )


async def outlast(rest: asyncio.Future[Any]) -> None:
    """Wait for `rest` even through further cancellations: memory that still moves cannot be handed back."""
    while not rest.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([rest])
