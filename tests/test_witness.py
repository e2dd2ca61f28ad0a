"""The witness over real sockets: a rank that is gone is known to be dead, and one that returns is served again."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from random import Random

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from pdctl.core.address import Endpoint
from pdctl.core.lives import Claim, Life, Owner
from pdctl.core.registry import Registry
from pdctl.core.rooms import RoomBook
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.core.witness import Means, Sign, Target, Verdict, WitnessPolicy, WitnessTable
from pdctl.metrics import Metrics
from pdctl.persistence.memory import MemoryJournal
from pdctl.registrar import Registrar
from pdctl.witness import Ask, Heard, Witness, asking, connect
from tests.patience import until
from tests.small_server import listening

SHAPE = Shape(attn_tp_size=1, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="auto")
QUICK = WitnessPolicy(tcp=True, interval_s=0.1, retry_s=0.05, deadline_s=0.5, max_lag_s=5.0)


@pytest.fixture
def registrar(metrics: Metrics) -> Registrar:
    return Registrar(Registry(), RoomBook(), MemoryJournal(), metrics, time.monotonic)


class ControlPort:
    """A rank's: accepts connections and remembers how they ended."""

    def __init__(self) -> None:
        self.port = 0
        self.heard: list[bytes] = []
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionResetError):
            self.heard.append(await reader.read())
        writer.close()


@pytest.fixture
async def control() -> AsyncIterator[ControlPort]:
    port = ControlPort()
    await port.open()
    yield port
    await port.close()


@asynccontextmanager
async def witnessing(registrar: Registrar, metrics: Metrics, policy: WitnessPolicy) -> AsyncIterator[WitnessTable]:
    async with asking(policy) as ask:
        table = WitnessTable(policy, Random(7).random)
        witness = Witness(
            table, lambda: under_witness(registrar), tell(registrar), ask, clock=time.monotonic, metrics=metrics
        )
        stop = registrar.herald.subscribe(witness.lives_changed)
        running = asyncio.create_task(witness.run())
        yield table
        stop()
        running.cancel()
        await asyncio.wait({running})


def under_witness(registrar: Registrar) -> Iterator[Life]:
    return (life for view in registrar.views() for life in view.under_witness)


def tell(registrar: Registrar) -> Callable[[Verdict], Awaitable[None]]:
    async def told(said: Verdict) -> None:
        await registrar.witnessed(said.instance, said.seat, said.epoch, said.alive, said.why)

    return told


def claim(port: int, *, http_port: int | None = None, ttl_s: float | None = None) -> Claim:
    announcement = Announcement(Seat(0, 0, 0, 0), SHAPE, Endpoint("127.0.0.1", port), http_port)
    return Claim("default", announcement, Owner("127.0.0.1"), ttl_s=ttl_s)


def vouched(registrar: Registrar) -> bool:
    view = registrar.view("default")
    return view is not None and any(life.is_vouched for life in view.lives)


async def test_a_rank_whose_control_port_is_gone_is_known_to_be_dead_and_served_again_when_it_is_back(
    registrar: Registrar, metrics: Metrics, control: ControlPort
) -> None:
    await registrar.register(claim(control.port))
    async with witnessing(registrar, metrics, QUICK):
        await until(lambda: vouched(registrar))
        assert registrar.health("default") is None
        await control.close()
        await until(lambda: registrar.health("default"))
        said = registrar.health("default")
        assert said is not None
        assert (
            f"shows no sign of life (connecting to 127.0.0.1:{control.port}: connection refused, 3 times in a row)"
            in said
        )
        await control.open()
        await until(lambda: registrar.health("default") is None)
        assert registrar.topology("default").ready


async def test_an_engine_that_answers_5xx_is_known_to_be_dead_though_its_control_port_listens(
    registrar: Registrar, metrics: Metrics, control: ControlPort
) -> None:
    status, asked = 200, 0

    async def health(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=status)

    engine = web.Application()
    engine.router.add_get("/health", health)
    policy = replace(QUICK, http_url="http://{host}:{http_port}/health")
    async with listening(web.AppRunner(engine)) as url:
        await registrar.register(claim(control.port, http_port=int(url.rpartition(":")[2])))
        async with witnessing(registrar, metrics, policy):
            await until(lambda: asked > 1)  # it has been seen serving
            status = 503
            await until(lambda: "answered 503" in (registrar.health("default") or ""))
            status = 404  # it serves, and somebody has written another path
            await until(lambda: registrar.health("default") is None)


async def test_a_rank_with_a_lease_is_not_asked(registrar: Registrar, metrics: Metrics, control: ControlPort) -> None:
    await registrar.register(claim(control.port, ttl_s=30.0))
    async with witnessing(registrar, metrics, QUICK) as table:
        await registrar.register(Claim("other", claim(control.port).announcement, Owner("127.0.0.1")))
        await until(lambda: len(table) == 1)


async def test_a_connection_that_stands_is_closed_at_once_and_nothing_was_said(control: ControlPort) -> None:
    assert await connect(Target(Means.TCP, "", "127.0.0.1", control.port)) == (Sign.WELL, "")
    await until(lambda: control.heard)
    assert control.heard == [b""]


async def test_one_hung_rank_holds_up_no_other(registrar: Registrar, metrics: Metrics) -> None:
    asked: list[str] = []

    async def hang_or_answer(target: Target) -> Heard:
        asked.append(target.where)
        if target.port == 1:
            await asyncio.Event().wait()
        return Sign.WELL, ""

    verdicts: list[Verdict] = []

    async def remember(verdict: Verdict) -> None:
        verdicts.append(verdict)

    for n in (1, 2):
        await registrar.register(Claim(f"prefill-{n}", claim(n).announcement, Owner("127.0.0.1")))
    policy = replace(QUICK, deadline_s=60.0)
    ask: dict[Means, Ask] = {Means.TCP: hang_or_answer}
    table = WitnessTable(policy, Random(7).random)
    witness = Witness(table, lambda: under_witness(registrar), remember, ask, clock=time.monotonic, metrics=metrics)
    running = asyncio.create_task(witness.run())
    await until(lambda: asked.count("127.0.0.1:2") > 3)
    assert asked.count("127.0.0.1:1") == 1
    assert [(verdict.instance, verdict.alive) for verdict in verdicts] == [("prefill-2", True)]
    running.cancel()
    await asyncio.wait({running})


@pytest.mark.parametrize(
    ("number", "sign"),
    [
        (errno.ECONNREFUSED, Sign.REFUSED),
        (errno.EHOSTUNREACH, Sign.SILENT),
        (errno.ETIMEDOUT, Sign.SILENT),
        (errno.ENETUNREACH, Sign.VOID),
        (errno.EMFILE, Sign.VOID),
    ],
    ids=errno.errorcode.get,
)
async def test_a_failed_connection_is_read_for_whose_fault_it_is(
    number: int, sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(host: str, port: int) -> None:
        raise OSError(number, "said the kernel")

    monkeypatch.setattr(asyncio, "open_connection", fail)
    assert (await connect(Target(Means.TCP, "", "10.0.0.1", 1)))[0] is sign


async def test_a_question_that_breaks_on_our_side_is_told_and_counts_for_nobody(
    registrar: Registrar, metrics: Metrics
) -> None:
    async def broken(target: Target) -> Heard:
        raise RuntimeError("a defect")

    async def never(verdict: Verdict) -> None:
        raise AssertionError(verdict)

    await registrar.register(claim(1))
    table = WitnessTable(QUICK, Random(7).random)
    ask: dict[Means, Ask] = {Means.TCP: broken}
    witness = Witness(table, lambda: under_witness(registrar), never, ask, clock=time.monotonic, metrics=metrics)
    with capture_logs() as said:
        running = asyncio.create_task(witness.run())
        await until(lambda: len(said) > 3)
    running.cancel()
    await asyncio.wait({running})
    assert {line["event"] for line in said} == {"question for a sign of life failed on our side"}
