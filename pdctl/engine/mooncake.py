"""
The engine port over Mooncake's TransferEngine. Its return codes end here.

What may touch the engine is in `_Calls`, eight calls; what the hazards of MOONCAKE_FACTS ask for around them is in
docs/hazards.md, one row each. Never uses the engine's batch calls with more than one block, its notifies, its store, or
anything else that can block, crash or hold the interpreter lock; its probe only where nothing else can ask (`by_name`).

Threads: the mover (mover.py) owns the engine; one more registers memory, because RDMA pins pages for seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import os
import resource
import sys
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.layout import Region
from pdctl.device.base import Device
from pdctl.engine import handshake, wheel
from pdctl.engine.asking import SendProbe
from pdctl.engine.base import Capabilities, Engine
from pdctl.engine.blame import own_fault
from pdctl.engine.blocks import Direction, Lane, Transfer
from pdctl.engine.environment import prepare
from pdctl.engine.handshake import Descriptor
from pdctl.engine.idle import Idle
from pdctl.engine.mover import Calls as MoverCalls
from pdctl.engine.mover import Mover
from pdctl.engine.promises import PromisedEngine, outlast
from pdctl.engine.settings import MooncakeSettings
from pdctl.engine.tether import Tether
from pdctl.engine.ways import Introduction, Serial
from pdctl.errors import BadField, Cause, DeviceUnavailable, EngineUnavailable, TransferFailed

log = structlog.get_logger(__name__)

_MOST_ENGINES = 3  # in a process: each costs two threads, five descriptors and two open ports until it exits
_FEW_WAYS = 16  # to a peer, where there are so many of them that more would take the process's descriptors
_LOOKED_AT = 64  # lanes, each time that one is made: 0.1 ms, and the dead never outnumber the living for long
_TIDY_EVERY_S = 2.0  # where none is made: each that died keeps up to 17 connections half closed, and their ports
_KEEP_ALIVE_EVERY_S = 30.0  # connections that idle are looked for: of 4,000 descriptors in 10 ms, on a thread
_GIVEN_UP = -1  # the code of a registration that came when the mover had failed and the loop did not know it yet
_NEEDED = ("initialize", "get_rpc_port", "transfer_submit_write", "transfer_check_status")
_WELCOME = {
    "send_probe": "nothing is lost: peers are asked by pdctl's own handshake",
    "batch_transfer_async_read": "reads are refused; writes work",
    "batch_register_memory": "registering memory holds the interpreter for as long as the device takes",
}


@asynccontextmanager
async def open_mooncake(
    settings: MooncakeSettings,
    device: Device,
    *,
    factory: Callable[[], Any] | None = None,
    importer: Callable[[str], ModuleType] = importlib.import_module,
    environ: MutableMapping[str, str] | None = None,
) -> AsyncIterator[Engine]:
    """An open engine; closing it waits, within a bound, until no block of it touches this process's memory.

    `device`: whose memory it will move (`open_device`); set on each of our threads before the engine is made there, or
    memory registered. `factory` makes the engine object (the wheel's class by default).
    """
    device.check_protocol(settings.protocol)
    variables = os.environ if environ is None else environ
    prepare(settings, variables, wheel.MODULE in sys.modules)
    make = factory or _factory(importer, settings, device)

    def prepared() -> Any:
        prepare(settings, variables, loaded=False)  # each engine object reads them when it is made
        return make()

    carrier = _Carrier(settings, prepared, device)
    await carrier.open()
    engine = PromisedEngine(carrier, settings.patience)
    try:
        await engine.show()
        yield engine
    finally:
        if not await engine.close():
            log.error("blocks did not come to rest: the engine is destroyed", session=engine.session)
        await carrier.close()
        wheel.keep_until_exit(engine.canary)  # a peer's nonce may still be on its way to it (H12)


def by_name(
    settings: MooncakeSettings,
    device: Device,
    *,
    importer: Callable[[str], ModuleType] = importlib.import_module,
    environ: MutableMapping[str, str] | None = None,
) -> SendProbe | None:
    """The engine's own question, for sessions that are no `host:port` (asking.py); None where the wheel has none.

    It is put by an engine object that does nothing else, made by the thread that asks first and kept until the process
    exits: it has no region and no block, so a question that hangs in it fences nothing and delays no transfer.
    """
    make = _factory(importer, settings, device)
    if not hasattr(make, "send_probe"):
        return None
    once, made = threading.Lock(), list[Any]()

    def send_probe(session: str) -> int:
        with once:
            if not made:
                prepare(settings, os.environ if environ is None else environ, loaded=False)
                device.bind()
                engine = make()
                _Calls(engine).initialize(settings, device)
                wheel.keep_until_exit(engine)
                made.append(engine)
        return int(made[0].send_probe(session))

    return send_probe


def _factory(importer: Callable[[str], ModuleType], settings: MooncakeSettings, device: Device) -> Callable[[], Any]:
    module = wheel.load(importer)
    wheel.check_can_move(module, device.spec, settings.protocol)
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

    def initialize(self, settings: MooncakeSettings, device: Device) -> str:
        """The session id. Only once: a second time gives the object a new port and kills its sessions."""
        name = device.engine_name(settings.host)
        code = self._engine.initialize(name, "P2PHANDSHAKE", settings.protocol, settings.device)
        if code != 0:
            raise EngineUnavailable(
                f"the Mooncake engine cannot be opened on {name} with protocol {settings.protocol!r} and "
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
        engine = self._engine
        if engine is None:
            return _GIVEN_UP
        # The call for many lets go of the interpreter, the call for one does not.
        if self.has["batch_register_memory"]:
            return int(engine.batch_register_memory([region.pointer], [region.nbytes]))
        return int(engine.register_memory(region.pointer, region.nbytes))

    def unregister(self, region: Region) -> int:
        engine = self._engine
        # One at a time: the call for many leaves a half state for ever if one is unknown.
        return _GIVEN_UP if engine is None else int(engine.unregister_memory(region.pointer))

    def give_up(self, *, at_rest: bool) -> None:
        """At rest: keep it until the process exits. Else destroy it, which is the one fence that there is (4.2)."""
        engine, self._engine = self._engine, None
        if at_rest:
            wheel.keep_until_exit(engine)


class _Motor:
    """One engine object, and the mover thread that owns it from its birth to its end."""

    def __init__(self, settings: MooncakeSettings, device: Device) -> None:
        self._settings = settings
        self._device = device
        self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[str] = self._loop.create_future()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self.calls: _Calls
        self.mover: Mover

    async def open(self, factory: Callable[[], Any]) -> None:
        """Cancelled, it is closed again. Raises what opening the engine raises."""
        self.start(factory)
        try:
            await asyncio.shield(self.opened)
        except asyncio.CancelledError:
            await outlast(self.opened)
            if self.opened.exception() is None:
                await self.close()
            raise

    def start(self, factory: Callable[[], Any]) -> None:
        threading.Thread(target=self._live, args=(factory,), name="pdctl-mover", daemon=True).start()

    async def close(self) -> None:
        self.mover.end()
        await outlast(self.gone)

    def _live(self, factory: Callable[[], Any]) -> None:
        try:
            self._device.bind()
            self.calls = _Calls(factory())
            session = self.calls.initialize(self._settings, self._device)
        except BaseException as cause:
            self._post(_refuse, self.opened, cause)
            return
        calls = MoverCalls({Direction.WRITE: self.calls.write, Direction.READ: self.calls.read}, self.calls.check)
        self.mover = Mover(self._loop, calls, self._settings.window, float(self._settings.progress_timeout_s))
        self._post(_resolve, self.opened, session)
        at_rest = self.mover.run()
        self.calls.give_up(at_rest=at_rest)
        self.mover.let_go(Cause.LOCAL, "this engine was closed under it")
        self._post(_resolve, self.gone, None)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *args)


class _Carrier:
    """The engine that peers know, fresh ones for peers that it does not reach any more, and a thread that registers.

    `spare` makes the next engine object, on its own thread.
    """

    def __init__(self, settings: MooncakeSettings, factory: Callable[[], Any], device: Device) -> None:
        self._settings = settings
        self._factory = factory
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._serial = Serial()
        self._registering = ThreadPoolExecutor(1, "pdctl-register")
        self._first = _Motor(settings, device)
        self._motors = {0: self._first}
        self._tethered: deque[Lane] = deque()
        self._next_tidying: asyncio.TimerHandle | None = None
        self._data_ports: Counter[int] = Counter()
        self._idle, self._next_look = Idle(), 0.0

    @property
    def session(self) -> str:
        return self._first.opened.result()

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def is_open(self) -> bool:
        return not self._first.gone.done()

    @property
    def gathers(self) -> bool:
        """RDMA sends from registered memory only, and costs nothing a block that a copy would save."""
        return self._settings.forces_tcp and self._device.spec.is_host

    @property
    def engines(self) -> int:
        """Over RDMA memory belongs to the engine that registered it, and the wedge is one of the TCP transport."""
        return _MOST_ENGINES if self._settings.forces_tcp else 1

    def has_made(self, engine: int) -> bool:
        return engine in self._motors

    async def register(self, region: Region) -> int:
        return await self._loop.run_in_executor(self._registering, self._bound, self._first.calls.register, region)

    async def unregister(self, region: Region) -> int:
        return await self._loop.run_in_executor(self._registering, self._bound, self._first.calls.unregister, region)

    def _bound(self, call: Callable[[Region], int], region: Region) -> int:
        """On the registering thread, which is not the one that the device was set on."""
        self._device.bind()
        return call(region)

    async def describe(self, session: str, deadline_s: float) -> Descriptor:
        return await handshake.metadata(session, deadline_s=deadline_s)

    async def knock(self, session: str, found: Descriptor, deadline_s: float) -> None:
        if self._settings.forces_tcp:
            await handshake.knock(session, found, deadline_s=deadline_s)

    async def lane(self, session: str, found: Descriptor, engine: int) -> Lane:
        """Over TCP we introduce the peer ourselves. RDMA exchanges queue pairs by the peer's own name: there the engine
        asks the peer, and a peer that hangs between our question and its own still costs all 61 s (H3)."""
        await self._running(session, engine)
        if not self._settings.forces_tcp:
            return Lane(itertools.repeat(session))
        self._tidy()
        deadline_s = self._settings.handshake_timeout_s
        try:
            return await self._tied(session, found, engine, deadline_s)
        except OSError as cause:
            words = own_fault(cause) or f"no port of our own can be opened: {cause}"
            raise TransferFailed(Cause.LOCAL, session, words) from cause

    async def _tied(self, session: str, found: Descriptor, engine: int, deadline_s: float) -> Lane:
        tether = await Tether.tie(session, found.host, found.card.data_port, deadline_s=deadline_s)
        try:
            introduction = await Introduction.listening(found.opening, self._settings.loopback, self._serial)
        except BaseException:
            tether.close()
            raise
        lane = Lane(introduction.names, engine, self._most_ways(), greets=self.capabilities.async_read)
        lane.over, lane.was_cut = lambda: tether.over, lambda: tether.was_cut
        lane.close = lambda: self._leave(lane, tether, introduction, found.card.data_port)
        self._tethered.append(lane)
        self._data_ports[found.card.data_port] += 1
        if self._next_tidying is None:
            self._tidy_later()
        self._next_look = 0.0  # at the next tidying: then its first ways are there
        return lane

    def _most_ways(self) -> int:
        """Of one lane more. Each way is a descriptor here and one at the peer, and the engine gives none back."""
        may_have, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        window = self._settings.window
        lanes = len(self._tethered) + 1
        return window if may_have < 0 or lanes * window <= may_have // 4 else min(window, _FEW_WAYS)

    def _tidy_later(self) -> None:
        self._tidy()
        later = bool(self._tethered) and self.is_open
        self._next_tidying = self._loop.call_later(_TIDY_EVERY_S, self._tidy_later) if later else None
        if later and self._loop.time() >= self._next_look:
            self._next_look = self._loop.time() + _KEEP_ALIVE_EVERY_S
            self._loop.run_in_executor(self._registering, self._idle.keep_alive, frozenset(self._data_ports))

    def _tidy(self) -> None:
        """Close what is held for lives that have ended: nobody says that a peer will never come back. How a life ended
        is known all the same, and no block goes there."""
        for _ in range(min(_LOOKED_AT, len(self._tethered))):
            lane = self._tethered.popleft()
            if lane.over() is None:
                self._tethered.append(lane)
            else:
                lane.close()

    def _leave(self, lane: Lane, tether: Tether, introduction: Introduction, data_port: int) -> None:
        self._data_ports[data_port] -= 1
        if not self._data_ports[data_port]:
            del self._data_ports[data_port]
        tether.close()
        introduction.close()
        self._motors[lane.engine].mover.leave(lane)

    def add(self, transfer: Transfer) -> None:
        self._motors[transfer.lane.engine].mover.add(transfer)

    def nudge(self) -> None:
        for motor in self._running_motors():
            motor.mover.nudge()

    def own_fault(self, spans: Iterable[Region]) -> str | None:
        try:
            for span in spans:
                self._device.where(span)
        except BadField as cause:
            return f"the memory of this side that it was to move is not there any more: {cause}"
        except DeviceUnavailable as cause:
            return f"this side's device does not answer: {cause}"
        except OSError as cause:
            return own_fault(cause) or f"this process cannot look at its own memory: {cause}"
        return None

    async def open(self) -> None:
        await self._first.open(self._factory)
        has = self._first.calls.has
        # Once: to read the wheel's version off the disk takes 3 ms, and every look at a peer asks what can be done.
        self._capabilities = Capabilities(
            "mooncake", wheel.version(), has["send_probe"], has["batch_transfer_async_read"]
        )

    async def close(self) -> None:
        """The spare ones first: while the first is open, so is this."""
        if self._next_tidying is not None:
            self._next_tidying.cancel()
        for number in sorted(self._motors, reverse=True):
            motor = self._motors[number]
            await outlast(motor.opened)
            if motor.opened.exception() is None:
                await motor.close()
        self._registering.shutdown(wait=False)

    async def _running(self, session: str, engine: int) -> None:
        """That engine object is open; a spare one is opened now, and goes on opening if who wanted it gives up."""
        if engine not in self._motors:
            self._motors[engine] = motor = _Motor(self._settings, self._device)
            log.warning("a fresh engine is opened for peers that an older one does not reach", engine=engine)
            motor.start(self._factory)
        motor = self._motors[engine]
        try:
            await asyncio.shield(motor.opened)
        except Exception as cause:
            del self._motors[engine]
            raise TransferFailed(Cause.LOCAL, session, f"no fresh engine can be opened: {cause}") from cause

    def _running_motors(self) -> list[_Motor]:
        return [motor for motor in self._motors.values() if motor.opened.done() and not motor.opened.exception()]


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _refuse(future: asyncio.Future[Any], cause: BaseException) -> None:
    if not future.done():
        future.set_exception(cause)
