"""
Which life of each peer is meant, asked again whenever that is in doubt, and proven as deep as it can be.

A pin is made at a peer's first use and stands for the life that answered then, until `forget`. What is asked is always
in this order: the handshake, whether it shows the same life, whether the data port takes connections, the boot id in
the peer's canary; and for a proof a nonce there and back, or one byte of a stock peer's.

A peer that is well behind a way of ours that is not (MOONCAKE_FACTS H2, H6) is told from a sick one by trying other
ways of ours: a lane of new connections, then a fresh engine. An engine cannot be taken back, so none is made while the
fault may be here: while our own loop is late, or when several peers fell silent together. No caller's bytes move here,
and nothing waits for rest.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import structlog

from pdctl.core.kinds import Depth
from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.engine.base import PeerCard, Proof
from pdctl.engine.blocks import Lane
from pdctl.engine.canary import MAGIC, NONCE_NBYTES, TITLE_NBYTES, Questions, candidates, slot
from pdctl.engine.carrier import Carrier
from pdctl.engine.checks import first_outside
from pdctl.engine.handshake import Descriptor
from pdctl.engine.settings import Patience
from pdctl.errors import Cause, TransferFailed
from pdctl.lag import watched

log = structlog.get_logger(__name__)

ATTEMPTS = 1 + 4  # each of a lane's connections can be stale; an attempt meets one at least, and none of them again

STALE = "stale connections: lane made anew"
WEDGED = "wedged lane: moved to a fresh engine"
_NONCE, _BYTE, _COMPARED = "nonce written and read back", "one byte read", "descriptor compared"

# What the engine has known by a name it never forgets: a peer that stays sick gets new names now and then.
_REMAKE_S = 10.0
_MOST_SCOUTS = 1024
# An answer takes a millisecond, and half of the probe's second is waited for it.
_LATE_S, _TOGETHER_S = 0.25, 5.0


@dataclass(slots=True)
class Pin:
    """The life of a peer that is meant. `faith`: what `lane.failures` was at its last good answer.

    `canary`: where its own is, if it is one of ours. `lanes`: by which engine object it can be reached; `lane` is the
    one that transfers take. `silent_since`: when a proof first got no answer; never, once one has got one.
    """

    card: PeerCard
    lane: Lane
    asked_at: float
    faith: int = 0
    canary: Region | None = None
    lanes: dict[int, Lane] = field(default_factory=dict)
    remade_at: float = -math.inf
    silent_since: float = math.inf
    closed: bool = False

    @property
    def session(self) -> str:
        return self.card.session

    @property
    def doubted(self) -> bool:
        return self.faith != self.lane.failures or self.lane.over() is not None

    def take(self, lane: Lane) -> None:
        """From now on by this lane. What is under way by another engine goes on there."""
        before = self.lanes.get(lane.engine)
        if before is not None and before is not lane:
            before.close()
        self.keep(lane)
        self.lane = lane
        self.faith = lane.failures

    def keep(self, lane: Lane) -> None:
        """For as long as the pin stands; it may have been forgotten while the lane was made."""
        self.lanes[lane.engine] = lane
        if self.closed:
            lane.close()

    def close(self) -> None:
        self.closed = True
        for lane in self.lanes.values():
            lane.close()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one look at a peer has shown; `faith`: what the lane's failures were before it."""

    lane: Lane
    card: PeerCard
    canary: Region | None
    depth: Depth
    how: str
    faith: int


class _OutOfReach(Exception):
    """The peer answers as the life that is meant, but this lane does not reach its memory."""

    def __init__(self, failure: TransferFailed) -> None:
        super().__init__(str(failure))
        self.failure = failure

    @property
    def silent(self) -> bool:
        return self.failure.cause is Cause.TIMED_OUT

    def verdict(self) -> TransferFailed:
        if self.failure.cause is Cause.LOCAL:
            return self.failure
        detail = f"its handshake answers, its memory does not: {self.failure.detail}"
        return TransferFailed(Cause.NO_DATA, self.failure.session, detail)


class _Silent(Exception):
    """Nothing came back in time; `verdict` is what to say where that counts."""

    def __init__(self, verdict: TransferFailed) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict


class Pins:
    """The pinned lives of all peers, and whether each has been proven well since its last failure.

    `chance(n)` gives a number below n that no two provers share.
    """

    def __init__(
        self,
        carrier: Carrier,
        questions: Questions,
        patience: Patience,
        clock: Callable[[], float],
        chance: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self._carrier = carrier
        self._questions = questions
        self._patience = patience
        self._clock = clock
        self._chance = chance
        self._pins: dict[str, Pin] = {}
        # Peers that were proven before anybody used them: each look would take a lane's name otherwise.
        self._scouts: OrderedDict[str, Pin] = OrderedDict()
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # while somebody asks, or waits to

    async def meet(self, session: str, plan: CopyPlan, until: float) -> Pin:
        """The pinned life, proven well where that is due, whose regions hold all of `plan.dst`."""
        pin = self._pins.get(session)
        is_well = pin is not None and session not in self._asking and not self._is_due(pin)  # nearly always
        if pin is not None and is_well and first_outside(pin.card.regions, plan.dst, plan.nbytes) is None:
            return pin
        async with self._asking.setdefault(session, asyncio.Lock()):
            pin, fresh = self._pins.get(session), False
            if pin is None or self._is_due(pin):
                pin, fresh = await self._ask(session, pin, until), True
            bad = first_outside(pin.card.regions, plan.dst, plan.nbytes)
            if bad is not None and not fresh:  # it may have registered more since
                pin = await self._ask(session, pin, until)
                bad = first_outside(pin.card.regions, plan.dst, plan.nbytes)
        if bad is not None:
            raise _rejected(session, plan, bad, pin.card)
        return pin

    def _is_due(self, pin: Pin) -> bool:
        """To be asked before it is used."""
        return pin.doubted or self._clock() - pin.asked_at >= self._patience.recheck_s

    async def prove(self, session: str, deadline_s: float) -> Proof:
        """As deep as can be, by another way of ours if the usual one fails. Pins nothing."""
        until = self._clock() + deadline_s
        async with self._its_turn(session, until, deadline_s):
            pin = self._pins.get(session) or await self._scout(session, until)
            try:
                seen = await self._look(pin, pin.lane, self._share(until), deep=True, knock=True)
            except _OutOfReach as reason:
                self._note_silence(pin, reason.failure)
                async with watched(self._clock) as late_s:
                    seen, cured = await self._cure(pin, reason, until, late_s)
                return Proof(seen.card, seen.depth, seen.how, cured)
            except TransferFailed as failure:
                self._note_silence(pin, failure)
                raise
            self._renew(pin, seen)
            return Proof(seen.card, seen.depth, seen.how)

    def card(self, session: str) -> PeerCard | None:
        pin = self._pins.get(session)
        return pin.card if pin else None

    def doubt(self, session: str) -> None:
        if session in self._pins:
            self._pins[session].faith = -1

    def forget(self, session: str) -> None:
        self._asking.pop(session, None)
        for pin in (self._pins.pop(session, None), self._scouts.pop(session, None)):
            if pin is not None:
                pin.close()

    def close(self) -> None:
        for session in [*self._pins, *self._scouts]:
            self.forget(session)

    # --- asking before a transfer

    async def _ask(self, session: str, pin: Pin | None, until: float) -> Pin:
        if pin is None:
            return await self._first(session, until)
        # A broken connection makes the engine wait a second before the next (measured): whoever is in doubt waits too.
        doubted = pin.doubted
        by = until if doubted else min(until, self._clock() + self._patience.ask_s)
        try:
            self._renew(pin, await self._seen(pin, by, knock=doubted))
        except _Silent as silence:
            # Of a peer that did nothing wrong so far, silence is no news: its listener is one thread, and each idle
            # connection to it costs 5 s. What is in flight to it is bounded by the carrier's own stall limit.
            if doubted:
                raise silence.verdict from silence
        return pin

    async def _first(self, session: str, by: float) -> Pin:
        found = await self._describe(session, by, self._patience.ask_s)
        pin = await self._made(session, found, min(by, self._clock() + self._patience.ask_s))
        try:
            self._renew(pin, await self._seen(pin, by, knock=True, found=found))
        except _Silent as silence:
            pin.close()
            raise silence.verdict from silence
        except BaseException:
            pin.close()
            raise
        self._pins[session] = pin
        return pin

    async def _seen(self, pin: Pin, by: float, *, knock: bool, found: Descriptor | None = None) -> _Seen:
        """A look that is deep enough to go on with. Raises TransferFailed; _Silent where time ran out."""
        try:
            return await self._look(pin, pin.lane, by, deep=False, knock=knock, found=found)
        except _OutOfReach as reason:
            if reason.silent:
                raise _Silent(reason.verdict()) from reason
            raise reason.verdict() from reason
        except TransferFailed as failure:
            if failure.cause is Cause.TIMED_OUT:
                raise _Silent(failure) from failure
            raise

    async def _made(self, session: str, found: Descriptor, by: float) -> Pin:
        """A pin that is meant by nobody yet. A scout's lane is taken over where it leads to the same data port."""
        scout = self._scouts.pop(session, None)
        if scout is not None and scout.card.data_port == found.card.data_port and scout.lane.over() is None:
            return Pin(found.card, scout.lane, self._clock(), scout.lane.failures, None, scout.lanes, scout.remade_at)
        if scout is not None:
            scout.close()
        lane = await self._new_lane(session, found, 0, by)
        return Pin(found.card, lane, self._clock(), lanes={lane.engine: lane})

    async def _scout(self, session: str, until: float) -> Pin:
        """A stand-in for the pin of a peer that nobody has used: made for this proof, kept for its lanes only."""
        found = await self._describe(session, until)
        pin = await self._made(session, found, self._share(until))
        self._scouts[session] = pin
        while len(self._scouts) > _MOST_SCOUTS:
            self._scouts.popitem(last=False)[1].close()
        return pin

    # --- one look at a peer

    async def _look(
        self, pin: Pin, lane: Lane, by: float, *, deep: bool, knock: bool, found: Descriptor | None = None
    ) -> _Seen:
        """Identity, then reach. Raises _OutOfReach when only this lane's reach fails.

        A connection that broke while its peer lives on is found out by using it, so a block that ends FAILED is tried
        again; but never without asking who is there now.
        """
        at_most_s = math.inf if deep else self._patience.ask_s
        for left in reversed(range(ATTEMPTS)):
            faith = lane.failures
            found = found or await self._describe(pin.session, by, at_most_s)
            self._check_life(pin, found)
            if (end := lane.over()) is not None:
                lane, faith = await self._tied_anew(pin, lane, found, by, end), 0
            if knock:
                await self._carrier.knock(pin.session, found, min(self._left(by), at_most_s))
            try:
                return await self._reach(pin, lane, found, by, faith, deep=deep)
            except TransferFailed as failure:
                if failure.cause is Cause.PEER_CHANGED:
                    raise
                if not left or failure.cause is not Cause.PEER_GONE:
                    raise _OutOfReach(failure) from failure
            found = None
        raise AssertionError("the last attempt returns or raises")

    async def _tied_anew(self, pin: Pin, lane: Lane, found: Descriptor, by: float, end: str) -> Lane:
        """A lane to whoever holds the data port now. Who that is, only a boot id can say: of two processes of a stock
        peer that got the same ports and addresses, nothing tells the second from the first but that the first ended."""
        if pin.canary is None and not lane.was_cut():
            raise _changed(pin.session, f"{end}; nothing that answers there can show to be the same")
        lane.close()
        anew = await self._new_lane(pin.session, found, lane.engine, by)
        pin.keep(anew)
        if pin.lane is lane:
            pin.lane, pin.faith = anew, -1  # until the look that this is for has seen who it is
        return anew

    async def _reach(self, pin: Pin, lane: Lane, found: Descriptor, by: float, faith: int, *, deep: bool) -> _Seen:
        seen = _Seen(lane, replace(found.card, boot=pin.card.boot), None, Depth.IDENTITY, _COMPARED, faith)
        if not self._carrier.capabilities.async_read:
            return seen
        canary, boot = await self._recognized(pin, lane, found, by)
        seen = replace(seen, card=replace(found.card, boot=boot), canary=canary)
        if deep and canary is not None:
            await self._there_and_back(pin.session, lane, canary, by)
            return replace(seen, depth=Depth.DATA, how=_NONCE)
        if deep and found.card.regions:
            # Another one at each attempt: a peer may have unmapped what it has never unregistered.
            region = found.card.regions[lane.failures % len(found.card.regions)]
            await self._questions.read(pin.session, lane, region.pointer, 1, by)
            return replace(seen, depth=Depth.DATA, how=_BYTE)
        return seen

    async def _recognized(self, pin: Pin, lane: Lane, found: Descriptor, by: float) -> tuple[Region | None, bytes]:
        """Where its canary is, and its boot id; neither for a stock peer."""
        for place in [pin.canary] if pin.canary else candidates(found.card.regions)[:2]:
            title = await self._questions.read(pin.session, lane, place.pointer, TITLE_NBYTES, by)
            if title.startswith(MAGIC) and pin.card.boot in (b"", title[len(MAGIC) :]):
                return place, title[len(MAGIC) :]
            if pin.canary:
                raise _changed(pin.session)
        return None, b""

    async def _there_and_back(self, session: str, lane: Lane, canary: Region, by: float) -> None:
        """Others prove this peer too: where our nonce did not stand for long, somebody chose the same slot."""
        for _ in range(3):
            nonce, place = secrets.token_bytes(NONCE_NBYTES), slot(canary, self._chance)
            await self._questions.write(session, lane, place, nonce, by)
            if await self._questions.read(session, lane, place, NONCE_NBYTES, by) == nonce:
                return
        raise TransferFailed(Cause.NO_DATA, session, "what was written there did not come back, three times")

    def _check_life(self, pin: Pin, found: Descriptor) -> None:
        """A canary never moves, and is there from its engine's first moment to its last."""
        if not pin.card.same_life(found.card) or (pin.canary and pin.canary not in found.card.regions):
            raise _changed(pin.session)

    def _renew(self, pin: Pin, seen: _Seen) -> None:
        pin.card, pin.canary, pin.faith, pin.asked_at = seen.card, seen.canary, seen.faith, self._clock()
        pin.silent_since = math.inf

    # --- mending our own side

    async def _cure(
        self, pin: Pin, reason: _OutOfReach, until: float, late_s: Callable[[], float]
    ) -> tuple[_Seen, str]:
        """By the first other way of ours that reaches the peer; transfers take it from now on."""
        for engine, cured in self._ways(pin, reason, late_s):
            try:
                seen = await self._look_by(pin, engine, until, anew=cured is STALE)
            except _OutOfReach:
                continue
            except TransferFailed as failure:
                if failure.cause is Cause.TIMED_OUT:
                    break  # its handshake did answer just now: what is known of it is that its memory does not
                raise
            log.debug("a link was cured on this side", session=pin.session, cured=cured, engine=engine)
            return seen, cured
        raise reason.verdict() from reason

    async def _look_by(self, pin: Pin, engine: int, until: float, *, anew: bool) -> _Seen:
        lane = await self._lane(pin, engine, until, anew=anew)
        try:
            seen = await self._look(pin, lane, self._share(until), deep=True, knock=False)
        except BaseException:
            if anew:
                lane.close()
            raise
        pin.take(seen.lane)
        self._renew(pin, seen)
        return seen

    def _ways(self, pin: Pin, reason: _OutOfReach, late_s: Callable[[], float]) -> Iterator[tuple[int, str]]:
        """Engine object and what it would cure. A lane's connections can each be gone without a word, or its names lead
        nowhere; new ones are tried before an engine is made, and for a silent peer in the same breath."""
        here, before = pin.lane.engine, pin.remade_at
        anew = self._clock() - before >= _REMAKE_S
        if anew:
            yield here, STALE
        for step in range(1, self._carrier.engines):
            engine = (here + step) % self._carrier.engines
            if not self._carrier.has_made(engine):
                if not anew and reason.silent:
                    continue
                if (why := self._doubts_itself(pin, late_s())) is not None:
                    log.warning("no fresh engine is made while the fault may be here", session=pin.session, why=why)
                    if late_s() > _LATE_S:
                        pin.remade_at = before  # it has not been tried in earnest
                    return
            yield engine, WEDGED

    def _doubts_itself(self, pin: Pin, late_s: float) -> str | None:
        if late_s > _LATE_S:
            return f"our own loop was {late_s:.2f} s late"
        others = [*self._pins.values(), *self._scouts.values()]
        together = sum(
            abs(other.silent_since - pin.silent_since) <= _TOGETHER_S for other in others if other is not pin
        )
        return f"{together} other peers fell silent together with it" if together else None

    def _note_silence(self, pin: Pin, failure: TransferFailed) -> None:
        if failure.cause is Cause.TIMED_OUT:
            pin.silent_since = min(pin.silent_since, self._clock())

    async def _lane(self, pin: Pin, engine: int, until: float, *, anew: bool) -> Lane:
        if engine in pin.lanes and not anew and pin.lanes[engine].over() is None:
            return pin.lanes[engine]
        found = await self._describe(pin.session, until)
        self._check_life(pin, found)
        if anew:
            pin.remade_at = self._clock()
        try:
            lane = await self._new_lane(pin.session, found, engine, self._share(until))
        except TransferFailed as failure:
            raise _OutOfReach(failure) from failure
        if not anew:
            pin.keep(lane)
        return lane

    async def _new_lane(self, session: str, found: Descriptor, engine: int, by: float) -> Lane:
        try:
            async with asyncio.timeout_at(by):
                return await self._carrier.lane(session, found, engine)
        except TimeoutError:
            detail = "no way to its data port could be made in time: is it firewalled?"
            raise TransferFailed(Cause.NO_DATA, session, detail) from None

    # --- time

    @asynccontextmanager
    async def _its_turn(self, session: str, until: float, deadline_s: float) -> AsyncIterator[None]:
        """One question at a time to a peer, and no more of it after `until`."""
        try:
            async with asyncio.timeout_at(until), self._asking.setdefault(session, asyncio.Lock()):
                yield
        except TimeoutError:
            raise TransferFailed(Cause.TIMED_OUT, session, f"not proven within {deadline_s:g} s") from None

    async def _describe(self, session: str, by: float, at_most_s: float = math.inf) -> Descriptor:
        return await self._carrier.describe(session, min(self._left(by), at_most_s))

    def _left(self, by: float) -> float:
        return max(0.0, by - self._clock())

    def _share(self, until: float) -> float:
        """Half of what is left: a way that does not lead there must leave time for the next. An answer takes 1 ms."""
        return self._clock() + self._left(until) / 2


def _changed(session: str, how: str = "another process answers there now") -> TransferFailed:
    return TransferFailed(Cause.PEER_CHANGED, session, f"{how}: let it register anew")


def _rejected(session: str, plan: CopyPlan, bad: int, card: PeerCard) -> TransferFailed:
    where = f"{int(plan.dst[bad]):#x} + {int(plan.nbytes[bad])}"
    return TransferFailed(
        Cause.REJECTED_ADDRESS,
        session,
        f"{where} lies in none of the {len(card.regions)} regions that the peer announces: "
        "let the peer register it, or ask it for its addresses again",
    )
