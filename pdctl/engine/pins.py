"""
Which life of each peer is meant, asked again whenever that is in doubt.

A pin is made at a peer's first use and stands for the life that answered then, until `forget`. Nothing is ever moved
here; who wants to move bytes asks `meet` first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pdctl.core.plan import CopyPlan
from pdctl.core.sessions import Depth
from pdctl.engine.base import PeerCard, Proof
from pdctl.engine.blocks import Lane
from pdctl.engine.carrier import Carrier, Patience
from pdctl.engine.checks import first_outside
from pdctl.engine.handshake import Descriptor
from pdctl.errors import Cause, TransferFailed


@dataclass(slots=True)
class Pin:
    """The life of a peer that is meant. `faith`: what `lane.failures` was at its last good answer."""

    card: PeerCard
    lane: Lane
    asked_at: float
    faith: int = 0

    @property
    def doubted(self) -> bool:
        return self.faith != self.lane.failures


class Pins:
    """Which life of each peer is meant, and whether it has been proven well since its last failure."""

    def __init__(self, carrier: Carrier, patience: Patience, clock: Callable[[], float]) -> None:
        self._carrier = carrier
        self._patience = patience
        self._clock = clock
        self._pins: dict[str, Pin] = {}
        self._asking: dict[str, asyncio.Lock] = {}

    async def meet(self, session: str, plan: CopyPlan, until: float) -> Pin:
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

    async def prove(self, session: str, deadline_s: float) -> Proof:
        """Ask again, as deep as can be asked. Pins nothing, and a pin that is there is not doubted afterwards."""
        async with self._asking.setdefault(session, asyncio.Lock()):
            pin = self._pins.get(session)
            if pin is None:
                found = await self._carrier.describe(session, deadline_s)
                return Proof(found.card, Depth.IDENTITY, "descriptor read")
            failures = pin.lane.failures
            self._renew(pin, await self._carrier.describe(session, deadline_s), failures)
            return Proof(pin.card, Depth.IDENTITY, "descriptor compared")

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

    async def _ask(self, session: str, pin: Pin | None, until: float) -> Pin:
        deadline_s = min(self._patience.ask_s, max(0.0, until - self._clock()))
        if pin is None:
            found = await self._carrier.describe(session, deadline_s)
            pin = Pin(found.card, await self._carrier.lane(session, found), self._clock())
            self._pins[session] = pin
            return pin
        failures = pin.lane.failures  # before the question: a failure meanwhile is one more doubt
        found_now = await _unless_silent(self._carrier.describe(session, deadline_s), may_be_silent=not pin.doubted)
        if found_now is None:
            return pin
        self._renew(pin, found_now, failures)
        return pin

    def _renew(self, pin: Pin, found: Descriptor, failures: int) -> None:
        if not pin.card.same_life(found.card):
            raise TransferFailed(
                Cause.PEER_CHANGED, pin.card.session, "another process answers there now: let it register anew"
            )
        pin.card, pin.asked_at, pin.faith = found.card, self._clock(), failures


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
