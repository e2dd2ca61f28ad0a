"""What every room of the house needs in its tests: a clock that is turned by hand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from pdctl.config import Settings
from pdctl.core.registry import Registry
from pdctl.core.rooms import RoomBook
from pdctl.dialects import native, sglang
from pdctl.dialects.watch import Broadcast
from pdctl.engine.asking import Asking
from pdctl.links import Links
from pdctl.looking import Looking
from pdctl.metrics import Metrics
from pdctl.persistence.memory import MemoryJournal
from pdctl.registrar import Registrar
from pdctl.server import app, bind, bound, serve

# How fast a busy host is says nothing of what a property holds: 200 ms for one example ended tests that were true.
settings.register_profile("pdctl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pdctl")


class Clock:
    """Seconds, monotonic, any zero. `clock()` reads it, `clock.forward(s)` turns it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> float:
        assert seconds >= 0
        self.now += seconds
        return self.now


@pytest.fixture(autouse=True, scope="session")
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a service keeps unless told otherwise: no test may find, or leave, anything in the user's own home."""
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        environ.delenv("STATE_DIRECTORY", raising=False)
        yield


@pytest.fixture
def info_is_logged() -> Iterator[None]:
    """As in a service: what would be a line is one, though no handler is set up."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(before)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def registrar(clock: Clock, metrics: Metrics) -> Registrar:
    """A registry with nothing in it; its time is the hand-turned clock."""
    return Registrar(Registry(), RoomBook(), MemoryJournal(), metrics, clock)


@pytest.fixture
def news(registrar: Registrar, metrics: Metrics) -> Broadcast:
    """What watchers of that registry hear."""
    return native.broadcast(registrar, metrics)


@pytest.fixture
def links(registrar: Registrar, metrics: Metrics) -> Links:
    """Its session table, that asks nobody unless its loops run."""
    return Links.open(Settings(), Asking(), metrics, native.refusing(registrar))


@pytest.fixture
def looking(registrar: Registrar, news: Broadcast, links: Links, metrics: Metrics, clock: Clock) -> Looking:
    """What it shows of its fleet; nobody calls `lookout.tick` but the test."""
    return Looking.open(Settings(), registrar, news, None, links, metrics, "memory:", clock)


@pytest.fixture
async def registry_url(
    registrar: Registrar, metrics: Metrics, news: Broadcast, links: Links, looking: Looking
) -> AsyncIterator[str]:
    """The registry as `pdctl serve` runs it: real HTTP, port 0, in the test's own loop. No slash at the end."""
    plain = sglang.Plain(registrar)
    routers = [plain.router(), native.router(registrar, news), links.router, looking.router]
    service = looking.in_front(sglang.in_front(plain, app(routers, metrics, unready=list)))
    with bind("127.0.0.1", 0) as sock:
        server = asyncio.create_task(serve(service, sock, grace_s=1.0))
        yield f"http://{bound(sock)}"
        server.cancel()
        await asyncio.wait({server})
