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
from collections.abc import AsyncIterator, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.layout import Region
from pdctl.engine import handshake, wheel
from pdctl.engine.base import Capabilities, Engine
from pdctl.engine.blocks import Direction, Lane, Transfer
from pdctl.engine.environment import MooncakeSettings, environment, prepare
from pdctl.engine.handshake import Descriptor, Introduction
from pdctl.engine.mover import Calls as MoverCalls
from pdctl.engine.mover import Mover
from pdctl.engine.promises import PromisedEngine, outlast
from pdctl.errors import Cause, EngineUnavailable

__all__ = ["MooncakeSettings", "environment", "open_mooncake"]

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
) -> AsyncIterator[Engine]:
    """An open engine; closing it waits, within a bound, until no block of it touches this process's memory.

    `factory` makes the engine object (the wheel's class by default); `bind_device` runs first on the mover thread.
    """
    prepare(settings, os.environ if environ is None else environ, wheel.MODULE in sys.modules)
    carrier = _Carrier(settings)
    await carrier.open(factory or _factory(importer), bind_device)
    engine = PromisedEngine(carrier, settings.patience)
    try:
        yield engine
    finally:
        if not await engine.close():
            log.error("blocks did not come to rest: the engine is destroyed", session=engine.session)
        await carrier.close()


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

    def write(self, name: str, local: int, remote: int, nbytes: int) -> int:
        return int(self._engine.transfer_submit_write(name, local, remote, nbytes))

    def read(self, name: str, local: int, remote: int, nbytes: int) -> int:
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


class _Carrier:
    """The mover thread with its engine object, and the thread that registers memory."""

    def __init__(self, settings: MooncakeSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._names: set[str] = set()
        self._registering = ThreadPoolExecutor(1, "pdctl-register")
        self._opened: asyncio.Future[str] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()

    @property
    def session(self) -> str:
        return self._opened.result()

    @property
    def capabilities(self) -> Capabilities:
        has = self._calls.has
        return Capabilities("mooncake", wheel.version(), has["send_probe"], has["batch_transfer_async_read"])

    @property
    def is_open(self) -> bool:
        return not self._gone.done()

    async def register(self, region: Region) -> int:
        return await self._loop.run_in_executor(self._registering, self._calls.register, region)

    async def unregister(self, region: Region) -> int:
        return await self._loop.run_in_executor(self._registering, self._calls.unregister, region)

    async def describe(self, session: str, deadline_s: float) -> Descriptor:
        return await handshake.metadata(session, deadline_s=deadline_s)

    async def lane(self, session: str, found: Descriptor) -> Lane:
        """Over TCP we introduce the peer ourselves. RDMA exchanges queue pairs by the peer's own name: there the engine
        asks the peer, and a peer that hangs between our question and its own still costs all 61 s (H3)."""
        if not self._settings.forces_tcp:
            return Lane(session)
        introduction = await Introduction.listening(found.opening, self._settings.loopback, self._names)
        return Lane(introduction.name, close=introduction.close)

    def add(self, transfer: Transfer) -> None:
        self._mover.add(transfer)

    def nudge(self) -> None:
        self._mover.nudge()

    async def open(self, factory: Callable[[], Any], bind_device: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._live, args=(factory, bind_device), name="pdctl-mover", daemon=True)
        thread.start()
        try:
            await asyncio.shield(self._opened)
        except asyncio.CancelledError:
            await outlast(self._opened)
            if self._opened.exception() is None:
                await self.close()
            raise

    async def close(self) -> None:
        self._mover.end()
        await outlast(self._gone)
        self._registering.shutdown(wait=False)

    def _live(self, factory: Callable[[], Any], bind_device: Callable[[], None]) -> None:
        """The mover thread, from the engine's birth to its end."""
        try:
            bind_device()
            self._calls = _Calls(factory())
            session = self._calls.initialize(self._settings)
        except BaseException as cause:
            self._post(_refuse, self._opened, cause)
            return
        calls = MoverCalls({Direction.WRITE: self._calls.write, Direction.READ: self._calls.read}, self._calls.check)
        self._mover = Mover(self._loop, calls, self._settings.window, float(self._settings.progress_timeout_s))
        self._post(_resolve, self._opened, session)
        at_rest = self._mover.run()
        self._calls.give_up(at_rest=at_rest)
        self._mover.let_go(Cause.LOCAL, "this engine was closed under it")
        self._post(_resolve, self._gone, None)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *args)


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _refuse(future: asyncio.Future[Any], cause: BaseException) -> None:
    if not future.done():
        future.set_exception(cause)
