"""
By which means a session is asked whether it works: the deepest that is there for it.

    this process has an engine       the engine's own `prove`: identity, and data where it can
    it has none (a sidecar)          our handshake: the descriptor, which the table compares with the life that it knows
    the session is no `host:port`    `send_probe` of an installed engine: somebody answers, and no more is known
    neither                          nobody can ask it; said once, and then it is lifted by registration or by hand

Never decides what an answer is worth, never waits past the deadline that it was given, and never lets questions that
hang take what others need: `send_probe` holds its thread for 61 s when the peer hangs, whatever is set (MOONCAKE_FACTS
H4), so it has threads of its own, few, one for each peer, and those that are held are counted and named.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.kinds import Depth
from pdctl.engine import handshake
from pdctl.engine.base import PeerCard, Proof
from pdctl.errors import BadField, Cause, TransferFailed

log = structlog.get_logger(__name__)

SendProbe = Callable[[str], int]
"""The engine's blocking question: 0 when somebody answers at the session."""

MAX_THREADS = 8
_MEANINGS = {
    -1: (Cause.LOCAL, "the engine that should ask is not open"),
    -101: (Cause.REFUSED, "its name leads to no address"),
    -102: (Cause.REFUSED, "nobody answers at its address"),
    -103: (Cause.NOT_AN_ENGINE, "what answers there is no Mooncake engine"),
    -200: (Cause.REFUSED, "the metadata server knows no engine of that name"),
}
_NO_WAY = "it is no host:port, and no engine with send_probe is here to ask it by name"


class Proves(Protocol):
    """What is asked of an engine; every `engine.base.Engine` has it."""

    async def prove(self, session: str, *, deadline_s: float) -> Proof: ...

    async def probe(self, session: str, *, deadline_s: float) -> PeerCard: ...


class Asking:
    """`engine`: None where this process moves no bytes itself. `send_probe`: of an engine that is open, if it has one.

    Used on one event loop. Both questions raise TransferFailed and can be cancelled at any moment.
    """

    def __init__(self, engine: Proves | None = None, send_probe: SendProbe | None = None) -> None:
        self._engine = engine
        self._threads = None if send_probe is None else ProbeThreads(send_probe)
        self._said_no_way = False

    @property
    def held(self) -> tuple[str, ...]:
        """Sessions whose question has been given up and still holds its thread."""
        return () if self._threads is None else self._threads.held

    async def prove(self, session: str, *, deadline_s: float) -> Proof:
        """Ask as deep as can be."""
        if not _is_address(session):
            return await self._by_name(session, deadline_s)
        if self._engine is not None:
            return await self._engine.prove(session, deadline_s=deadline_s)
        found = await handshake.metadata(session, deadline_s=deadline_s)
        return Proof(found.card, Depth.IDENTITY, "descriptor compared")

    async def card(self, session: str, *, deadline_s: float) -> PeerCard | None:
        """What the peer shows of itself; None where its kind of session shows nothing."""
        if not _is_address(session):
            return None
        if self._engine is not None:
            return await self._engine.probe(session, deadline_s=deadline_s)
        return (await handshake.metadata(session, deadline_s=deadline_s)).card

    async def _by_name(self, session: str, deadline_s: float) -> Proof:
        if self._threads is None:
            if not self._said_no_way:
                self._said_no_way = True
                log.warning(
                    "session cannot be asked: it is lifted when its peer registers anew, or by hand",
                    session=session,
                    why=_NO_WAY,
                )
            raise TransferFailed(Cause.LOCAL, session, f"{_NO_WAY}: register it anew, or lift it by hand")
        code = await self._threads.ask(session, deadline_s=deadline_s)
        if code != 0:
            cause, words = _MEANINGS.get(code, (Cause.LOCAL, "a code that this version does not know"))
            raise TransferFailed(cause, session, f"{words} (send_probe: {code})")
        return Proof(PeerCard(session, 0, ()), Depth.HANDSHAKE, "send_probe answered")


def _is_address(session: str) -> bool:
    try:
        Endpoint.parse(session)
    except BadField:
        return False
    return True


@dataclass(eq=False)
class _Call:
    """One `send_probe` that runs. `held`: somebody has stopped waiting for it, and nobody did so for an answer."""

    session: str
    began: float
    outcome: asyncio.Future[int | Exception]
    held: bool = False


class ProbeThreads:
    """`send_probe` on daemon threads of its own: at most `limit`, at most one for each peer.

    Who asks again while a peer holds its thread waits for the same answer. With every thread taken the answer is LOCAL,
    at once and with the names of who has them: it says nothing about the peer, and waiting could take a minute.
    """

    def __init__(self, send_probe: SendProbe, limit: int = MAX_THREADS) -> None:
        self._send_probe = send_probe
        self._limit = limit
        self._calls: dict[str, _Call] = {}
        self._loop = asyncio.get_running_loop()

    @property
    def held(self) -> tuple[str, ...]:
        return tuple(call.session for call in self._calls.values() if call.held)

    async def ask(self, session: str, *, deadline_s: float) -> int:
        """The engine's code. Raises TransferFailed (TIMED_OUT, LOCAL)."""
        call = self._calls.get(session) or self._begin(session)
        try:
            await asyncio.wait([call.outcome], timeout=deadline_s)
        finally:
            self._hold(call)
        if not call.outcome.done():
            detail = f"send_probe has not answered for {self._age_s(call):g} s, and holds a thread until it does"
            raise TransferFailed(Cause.TIMED_OUT, session, detail)
        outcome = call.outcome.result()
        if isinstance(outcome, Exception):
            raise TransferFailed(Cause.LOCAL, session, f"send_probe broke: {outcome!r}") from outcome
        return outcome

    def _begin(self, session: str) -> _Call:
        if len(self._calls) >= self._limit:
            who = ", ".join(self._calls)
            raise TransferFailed(Cause.LOCAL, session, f"all {self._limit} threads are taken by questions to {who}")
        call = _Call(session, self._loop.time(), self._loop.create_future())
        try:
            threading.Thread(target=self._live, args=(call,), name=f"pdctl-probe {session}", daemon=True).start()
        except RuntimeError as cause:  # the host gives us no more threads
            raise TransferFailed(Cause.LOCAL, session, f"no thread to ask with: {cause}") from cause
        self._calls[session] = call
        return call

    def _live(self, call: _Call) -> None:
        """The thread, for as long as the engine takes."""
        outcome: int | Exception
        try:
            outcome = int(self._send_probe(call.session))
        except Exception as defect:
            outcome = defect
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._ended, call, outcome)

    def _ended(self, call: _Call, outcome: int | Exception) -> None:
        if call.held:
            log.info("held thread is free again", session=call.session, held_s=self._age_s(call))
        del self._calls[call.session]
        call.outcome.set_result(outcome)

    def _hold(self, call: _Call) -> None:
        """Somebody has stopped waiting."""
        if call.outcome.done() or call.held:
            return
        call.held = True
        log.warning("question that hangs holds a thread", session=call.session, held=len(self.held), of=self._limit)

    def _age_s(self, call: _Call) -> float:
        return round(self._loop.time() - call.began, 1)
