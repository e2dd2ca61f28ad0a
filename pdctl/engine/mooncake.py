"""
The engine port over Mooncake's TransferEngine. Its return codes end here.

What may touch the engine is in `_Calls`, eight calls; what the hazards of MOONCAKE_FACTS ask for around them is in
docs/hazards.md, one row each. Never uses the engine's batch calls with more than one block, its probe, its notifies,
its store, or anything else that can block, crash or hold the interpreter lock.

Threads: the mover (mover.py) owns the engine; one more registers memory, because RDMA pins pages for seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.engine import handshake, wheel
from pdctl.engine.base import Capabilities, PeerCard
from pdctl.engine.checks import check_plan, check_region, first_outside, split
from pdctl.engine.environment import MooncakeSettings, environment, prepare
from pdctl.engine.mover import Block, Lane, Mover, Submit, Transfer
from pdctl.errors import BadField, Cause, EngineUnavailable, TransferFailed

__all__ = ["MooncakeEngine", "MooncakeSettings", "environment", "open_mooncake"]

log = structlog.get_logger(__name__)

_NEEDED = ("initialize", "get_rpc_port", "transfer_submit_write", "transfer_check_status")
_WELCOME = {
    "send_probe": "nothing is lost: peers are asked by pdctl's own handshake",
    "batch_transfer_async_read": "reads are refused; writes work",
    "batch_register_memory": "registering memory holds the interpreter for as long as the device takes",
}


@asynccontextmanager
async def open_mooncake(
    settings: MooncakeSettings,
    *,
    factory: Callable[[], Any] | None = None,
    importer: Callable[[str], ModuleType] = importlib.import_module,
    environ: MutableMapping[str, str] | None = None,
    bind_device: Callable[[], None] = lambda: None,
) -> AsyncIterator[MooncakeEngine]:
    """An open engine; closing it waits, within a bound, until no block of it touches this process's memory.

    `factory` makes the engine object (the wheel's class by default); `bind_device` runs first on the mover thread.
    """
    prepare(settings, os.environ if environ is None else environ, wheel.MODULE in sys.modules)
    engine = MooncakeEngine(settings)
    await engine._open(factory or _factory(importer), bind_device)
    try:
        yield engine
    finally:
        await engine._close()


def _factory(importer: Callable[[str], ModuleType]) -> Callable[[], Any]:
    module = wheel.load(importer)
    wheel.silence(module)
    return module.TransferEngine  # type: ignore[no-any-return]


class _Calls:
    """The only calls that are ever made on an engine object; None of them once it is given up."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        missing = [name for name in _NEEDED if not hasattr(type(engine), name)]
        if missing:
            raise EngineUnavailable(f"the installed Mooncake wheel has no {', '.join(missing)}: install 0.3.13")
        absent = {name: effect for name, effect in _WELCOME.items() if not hasattr(type(engine), name)}
        if absent:
            log.warning("the installed mooncake wheel lacks calls", version=wheel.version(), **absent)
        self.has = {name: name not in absent for name in _WELCOME}

    def initialize(self, settings: MooncakeSettings) -> str:
        """The session id. Only once: a second time gives the object a new port and kills its sessions."""
        code = self._engine.initialize(settings.host, "P2PHANDSHAKE", settings.protocol, settings.device)
        if code != 0:
            raise EngineUnavailable(
                f"the Mooncake engine cannot be opened on {settings.host} with protocol {settings.protocol!r} and "
                f"device {settings.device!r} (code {code}): check these three against the host"
            )
        return str(Endpoint(settings.host, self._engine.get_rpc_port()))

    def submit_write(self, name: str, local: int, remote: int, nbytes: int) -> int:
        return int(self._engine.transfer_submit_write(name, local, remote, nbytes))

    def submit_read(self, name: str, local: int, remote: int, nbytes: int) -> int:
        return int(self._engine.batch_transfer_async_read(name, [local], [remote], [nbytes]))

    def check(self, ticket: int) -> int:
        return int(self._engine.transfer_check_status(ticket))

    def register(self, region: Region) -> int:
        # The call for many lets go of the interpreter, the call for one does not.
        if self.has["batch_register_memory"]:
            return int(self._engine.batch_register_memory([region.pointer], [region.nbytes]))
        return int(self._engine.register_memory(region.pointer, region.nbytes))

    def unregister(self, region: Region) -> int:
        # One at a time: the call for many leaves a half state for ever if one is unknown.
        return int(self._engine.unregister_memory(region.pointer))

    def give_up(self, *, at_rest: bool) -> None:
        """At rest: keep it until the process exits. Else destroy it, which is the one fence that there is (4.2)."""
        engine, self._engine = self._engine, None
        if at_rest:
            wheel.keep_until_exit(engine)


@dataclass(slots=True)
class _Peer:
    """One life of a peer. `lane.name` is what our engine calls it; `faith`: `lane.failures` at the last good answer."""

    card: PeerCard
    lane: Lane
    introduction: handshake.Introduction | None
    asked_at: float
    faith: int = 0

    @property
    def doubted(self) -> bool:
        return self.faith != self.lane.failures


@dataclass(slots=True)
class _Sessions:
    """Who is pinned, who is being asked, what moves."""

    peers: dict[str, _Peer] = field(default_factory=dict)
    asking: dict[str, asyncio.Lock] = field(default_factory=dict)
    moving: dict[str, set[Transfer]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


class MooncakeEngine:
    """See engine/base.py for what each method promises. Made by `open_mooncake`, used on that loop only."""

    def __init__(self, settings: MooncakeSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._regions: set[Region] = set()
        self._known = _Sessions()
        self._registering = ThreadPoolExecutor(1, "pdctl-register")
        self._opened: asyncio.Future[str] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._closed = False

    @property
    def session(self) -> str:
        return self._opened.result()

    @property
    def capabilities(self) -> Capabilities:
        has = self._calls.has
        return Capabilities("mooncake", wheel.version(), has["send_probe"], has["batch_transfer_async_read"])

    async def register(self, region: Region) -> None:
        self._check_open(self.session)
        check_region(region, self._regions)
        self._regions.add(region)
        code = await self._loop.run_in_executor(self._registering, self._calls.register, region)
        if code != 0:
            self._regions.discard(region)
            raise BadField("pointer", f"the engine does not register {region} (code {code}): check that it is mapped")

    async def unregister(self, region: Region) -> None:
        self._check_open(self.session)
        if region not in self._regions:
            raise BadField("pointer", f"{region} is not registered: give exactly what was registered")
        self._regions.discard(region)
        code = await self._loop.run_in_executor(self._registering, self._calls.unregister, region)
        if code != 0:
            log.warning("the engine did not unregister a region", region=str(region), code=code)

    async def write(self, session: str, plan: CopyPlan, *, deadline_s: float) -> None:
        await self._move(session, plan, deadline_s, self._calls.submit_write)

    async def read(self, session: str, plan: CopyPlan, *, deadline_s: float) -> None:
        if not self._calls.has["batch_transfer_async_read"]:
            raise TransferFailed(Cause.LOCAL, session, "the installed Mooncake wheel cannot read: install 0.3.13")
        await self._move(session, plan, deadline_s, self._calls.submit_read)

    async def probe(self, session: str, *, deadline_s: float) -> PeerCard:
        return (await handshake.metadata(session, deadline_s=deadline_s)).card

    def forget(self, session: str) -> None:
        peer = self._known.peers.pop(session, None)
        if peer is not None and peer.introduction is not None:
            peer.introduction.close()

    async def settle(self, session: str) -> None:
        moving = self._known.moving.get(session)
        if moving:
            await asyncio.wait([transfer.rest for transfer in moving])

    # --- one transfer

    async def _move(self, session: str, plan: CopyPlan, deadline_s: float, submit: Submit) -> None:
        until = self._loop.time() + deadline_s
        self._check_open(session)
        check_plan(plan)
        if not len(plan):
            return
        self._check_local(session, plan)
        peer = await self._meet(session, plan, until)
        self._check_open(session)
        pieces = split(plan, self._settings.block_limit)
        await self._see_through(session, self._begin(session, peer, pieces, submit), until, deadline_s)

    def _begin(self, session: str, peer: _Peer, pieces: CopyPlan, submit: Submit) -> Transfer:
        rest: asyncio.Future[Any] = self._loop.create_future()
        transfer = Transfer(peer.lane, peer.faith, submit, _blocks(pieces), len(pieces), rest)
        moving = self._known.moving.setdefault(session, set())
        moving.add(transfer)
        rest.add_done_callback(lambda _: self._at_rest(session, transfer))
        self._mover.add(transfer)
        return transfer

    def _at_rest(self, session: str, transfer: Transfer) -> None:
        moving = self._known.moving[session]
        moving.discard(transfer)
        if not moving:
            del self._known.moving[session]

    async def _see_through(self, session: str, transfer: Transfer, until: float, deadline_s: float) -> None:
        try:
            await asyncio.wait([transfer.rest], timeout=max(0.0, until - self._loop.time()))
        except asyncio.CancelledError:
            self._stop(transfer, Cause.LOCAL, "cancelled")
            await _outlast(transfer.rest)
            raise
        if not transfer.rest.done():
            detail = f"not over within {deadline_s:g} s, {transfer.submitted} of {transfer.total} blocks submitted"
            self._stop(transfer, Cause.TIMED_OUT, detail)
            self._doubt(session)
            raise TransferFailed(Cause.TIMED_OUT, session, detail, settled=False)
        verdict = transfer.rest.result()
        if verdict is not None:
            raise TransferFailed(verdict[0], session, verdict[1])

    def _stop(self, transfer: Transfer, cause: Cause, detail: str) -> None:
        transfer.stop(cause, detail)
        self._mover.nudge()

    def _doubt(self, session: str) -> None:
        if session in self._known.peers:
            self._known.peers[session].faith = -1

    def _check_open(self, session: str) -> None:
        if self._closed or self._gone.done():
            raise TransferFailed(Cause.LOCAL, session, "this engine is closed")

    def _check_local(self, session: str, plan: CopyPlan) -> None:
        """A source that is not registered cannot be sent over RDMA, and a bad one looks like the peer's failure."""
        bad = first_outside(self._regions, plan.src, plan.nbytes)
        if bad is not None:
            where = f"{int(plan.src[bad]):#x} + {int(plan.nbytes[bad])}"
            raise TransferFailed(
                Cause.LOCAL, session, f"local bytes {where} lie in no registered region: register them first"
            )

    # --- knowing the peer

    async def _meet(self, session: str, plan: CopyPlan, until: float) -> _Peer:
        """The pinned life, proven well where that is due, whose regions hold all of `plan.dst`."""
        async with self._known.asking.setdefault(session, asyncio.Lock()):
            peer, fresh = self._known.peers.get(session), False
            if peer is None or peer.doubted or self._loop.time() - peer.asked_at >= self._settings.recheck_s:
                peer, fresh = await self._ask(session, peer, until), True
            bad = first_outside(peer.card.regions, plan.dst, plan.nbytes)
            if bad is not None and not fresh:  # it may have registered more since
                peer = await self._ask(session, peer, until)
                bad = first_outside(peer.card.regions, plan.dst, plan.nbytes)
        if bad is not None:
            where = f"{int(plan.dst[bad]):#x} + {int(plan.nbytes[bad])}"
            raise TransferFailed(
                Cause.REJECTED_ADDRESS,
                session,
                f"{where} lies in none of the {len(peer.card.regions)} regions that the peer announces: "
                "let the peer register it, or ask it for its addresses again",
            )
        return peer

    async def _ask(self, session: str, peer: _Peer | None, until: float) -> _Peer:
        deadline_s = min(self._settings.handshake_timeout_s, max(0.0, until - self._loop.time()))
        failures = peer.lane.failures if peer else 0  # before the question: a failure meanwhile is one more doubt
        try:
            found = await handshake.metadata(session, deadline_s=deadline_s)
        except TransferFailed as failure:
            # Of a peer that did nothing wrong so far, silence is no news: its listener is one thread, and each idle
            # connection to it costs 5 s. What it has in flight is bounded by the engine's own stall limit.
            if failure.cause is Cause.TIMED_OUT and peer is not None and not peer.doubted:
                return peer
            raise
        if peer is None:
            return await self._pin(session, found)
        if not peer.card.same_life(found.card):
            raise TransferFailed(Cause.PEER_CHANGED, session, "another process answers there now: let it register anew")
        peer.card, peer.asked_at, peer.faith = found.card, self._loop.time(), failures
        return peer

    async def _pin(self, session: str, found: handshake.Descriptor) -> _Peer:
        introduction = None
        if self._settings.force_tcp:
            introduction = await handshake.Introduction.listening(
                found.opening, self._settings.loopback, self._known.names
            )
        lane = Lane(introduction.name if introduction else session)
        peer = self._known.peers[session] = _Peer(found.card, lane, introduction, self._loop.time())
        return peer

    # --- life

    async def _open(self, factory: Callable[[], Any], bind_device: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._live, args=(factory, bind_device), name="pdctl-mover", daemon=True)
        thread.start()
        await self._opened

    def _live(self, factory: Callable[[], Any], bind_device: Callable[[], None]) -> None:
        """The mover thread, from the engine's birth to its end."""
        try:
            bind_device()
            self._calls = _Calls(factory())
            session = self._calls.initialize(self._settings)
        except BaseException as cause:
            self._post(_refuse, self._opened, cause)
            return
        settings = self._settings
        self._mover = Mover(self._loop, self._calls.check, settings.window, float(settings.progress_timeout_s))
        self._post(_resolve, self._opened, session)
        at_rest = self._mover.run()
        self._calls.give_up(at_rest=at_rest)
        self._mover.let_go(Cause.LOCAL, "this engine was closed under it")
        self._post(_resolve, self._gone, None)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *args)

    async def _close(self) -> None:
        self._closed = True
        await self._rest()
        for region in list(self._regions):
            await self._loop.run_in_executor(self._registering, self._calls.unregister, region)
        self._regions.clear()
        self._mover.end()
        await _outlast(self._gone)
        for session in list(self._known.peers):
            self.forget(session)
        self._registering.shutdown(wait=False)

    async def _rest(self) -> None:
        moving = [transfer for transfers in self._known.moving.values() for transfer in transfers]
        for transfer in moving:
            self._stop(transfer, Cause.LOCAL, "this engine is closing")
        if not moving:
            return
        _, restless = await asyncio.wait([t.rest for t in moving], timeout=self._settings.longest_rest_s)
        if restless:
            log.error("blocks did not come to rest, destroying the engine", transfers=len(restless))


def _blocks(pieces: CopyPlan) -> Iterator[Block]:
    return zip(pieces.src.tolist(), pieces.dst.tolist(), pieces.nbytes.tolist(), strict=True)


async def _outlast(rest: asyncio.Future[Any]) -> None:
    """Wait for `rest` even through further cancellations: memory that still moves cannot be handed back."""
    while not rest.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([rest])


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _refuse(future: asyncio.Future[Any], cause: BaseException) -> None:
    if not future.done():
        future.set_exception(cause)
