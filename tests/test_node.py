"""Nodes as a whole, over the real engine, and what each is made of: loops that live and die with their body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from pdctl.beside import LoopEnded, beside
from pdctl.config import Settings
from pdctl.core.address import Endpoint
from pdctl.core.lives import Claim, Owner
from pdctl.core.naming import HTTP_KEY, SESSION_KEY
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import ConfigError, LayoutMismatch, NotReady, Superseded
from pdctl.journals import journal_url
from pdctl.node import (
    DecodeNode,
    PrefillNode,
    decode_node,
    prefill_node,
)
from pdctl.retry import RetryPolicy
from pdctl.sections import NodeSettings, ServeSettings
from pdctl.serving import sidecar
from tests.node_rig import FIRST, SHAPE, Memory, memory_pools
from tests.scripted import answers, scripted

SOON_S = 60.0


def settings(registry: str = "http://127.0.0.1:1") -> Settings:
    policy = RetryPolicy(first_wait_s=0.05, max_wait_s=0.2)
    return Settings(node=NodeSettings(registry=registry), serve=ServeSettings(port=0, grace_s=0.5), retry=policy)


async def until_registered(node: PrefillNode | DecodeNode) -> None:
    async with asyncio.timeout(SOON_S):
        while not node.registered:  # noqa: ASYNC110  a property of another task's making: there is nothing to wait on
            await asyncio.sleep(0.01)


async def readiness(metrics_url: str) -> tuple[int, list[str]]:
    url = metrics_url.removesuffix("/metrics") + "/readyz"
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        return answer.status, (await answer.json())["reasons"]


@asynccontextmanager
async def fleet(shape: Shape = SHAPE) -> AsyncIterator[tuple[str, PrefillNode, Memory, DecodeNode, Memory]]:
    """A registry, a registered prefill and a decode of the plain shape."""
    here, there = Memory(), Memory()
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(sidecar(settings()))
        prefill = await stack.enter_async_context(
            prefill_node(settings(registry.url), **here.pools, seat=FIRST, shape=shape)
        )
        decode = await stack.enter_async_context(decode_node(settings(), **there.pools, shape=SHAPE))
        await until_registered(prefill)
        yield registry.url, prefill, here, decode, there


async def test_a_room_goes_from_a_prefill_to_a_decode_that_found_it_through_the_registry() -> None:
    async with fleet() as (registry, prefill, here, decode, there):
        here.kv[0][3], here.kv[1][3], here.aux[2] = 1, 2, 3
        at = await decode.pair(registry, room=7)
        async with prefill.sender.open(7) as sending, decode.receiver.open(7, at, [5], 1) as arriving:
            await sending.peers_ready()
            await sending.send([3])
            await sending.finish(2)
            await arriving.arrived()
        assert (there.kv[0][5] == 1).all()
        assert (there.kv[1][5] == 2).all()
        assert (there.aux[1] == 3).all()
        assert not there.kv[0][4].any()


async def test_a_prefill_is_not_ready_until_a_registry_has_said_yes() -> None:
    memory = Memory()
    async with prefill_node(settings(), **memory.pools, seat=FIRST, shape=SHAPE) as prefill:
        status, reasons = await readiness(prefill.metrics_url)
        assert (status, prefill.registered) == (503, False)
        assert "http://127.0.0.1:1" in reasons[0]
    async with fleet() as (_, prefill, _, decode, _):
        assert await readiness(prefill.metrics_url) == (200, [])
        assert await readiness(decode.metrics_url) == (200, [])


async def test_what_is_announced_is_a_link_that_listens_and_memory_that_can_be_reached() -> None:
    async with fleet() as (registry, prefill, here, decode, _):
        at = await decode.pair(registry, room=0)
        _, writer = await asyncio.open_connection(at.senders[0].host, at.senders[0].port)
        writer.close()
        card = await decode.engine.probe(prefill.engine.session, deadline_s=5)
        assert here.arena.region in card.regions


async def test_a_prefill_of_another_page_size_is_refused_before_a_room_is_opened() -> None:
    async with fleet(replace(SHAPE, page_size=64)) as (registry, _, _, decode, _):
        with pytest.raises(LayoutMismatch, match="page_size is 64 at the prefill and 16 at this decode"):
            await decode.pair(registry, room=1)


async def test_a_prefill_holds_a_lease_and_gives_it_back_when_it_closes() -> None:
    memory = Memory()
    async with sidecar(settings()) as registry:
        async with prefill_node(settings(registry.url), **memory.pools, seat=FIRST, shape=SHAPE) as prefill:
            await until_registered(prefill)
            view = registry.registrar.view("default")
            assert view
            assert view.alive[FIRST].ttl_s == NodeSettings().ttl_s
        view = registry.registrar.view("default")
        assert view
        assert not view.alive


async def test_a_prefill_that_drains_is_gone_as_soon_as_it_has_no_rooms() -> None:
    memory, quick = Memory(), settings()
    async with sidecar(quick) as registry:
        quick = quick.model_copy(update={"node": NodeSettings(registry=registry.url, ttl_s=2.0)})
        async with prefill_node(quick, **memory.pools, seat=FIRST, shape=SHAPE) as prefill:
            await until_registered(prefill)
            await registry.registrar.drain("default", None, grace_s=300.0)
            async with asyncio.timeout(SOON_S):
                while prefill.registered:  # noqa: ASYNC110  as in `until_registered`
                    await asyncio.sleep(0.01)
            view = registry.registrar.view("default")
            assert view
            assert not view.alive
            status, reasons = await readiness(prefill.metrics_url)
            assert (status, len(reasons)) == (503, 1)


async def test_a_prefill_that_is_replaced_ends_loudly() -> None:
    memory, quick = Memory(), settings()
    async with sidecar(quick) as registry:
        quick = quick.model_copy(update={"node": NodeSettings(registry=registry.url, ttl_s=2.0)})

        async def serve() -> None:
            async with prefill_node(quick, **memory.pools, seat=FIRST, shape=SHAPE) as prefill:
                await until_registered(prefill)
                elsewhere = Announcement(FIRST, SHAPE, Endpoint("127.0.0.1", 9))
                await registry.registrar.register(Claim("default", elsewhere, Owner("127.0.0.1"), ttl_s=60.0))
                await asyncio.sleep(SOON_S)

        with pytest.raises(Superseded, match=r"is held by epoch \d+, got \d+"):
            await serve()


async def test_a_registry_without_leases_is_told_on_its_own_wire() -> None:
    memory = Memory()
    async with (
        scripted(answers(404, "404: Not Found")) as stock,  # then 200 to everything
        prefill_node(settings(stock.url), **memory.pools, seat=FIRST, shape=SHAPE) as prefill,
    ):
        await until_registered(prefill)
    (_, first, _), (method, second, body) = stock.asked[:2]
    assert first == "/v1/instances/default/ranks/dp0-cp0-tp0-pp0"
    assert (method, second, body["attn_tp_size"]) == ("PUT", "/route", 1)
    assert all(path == "/route" for _, path, _ in stock.asked[1:])


async def test_a_decode_that_is_given_a_registry_is_listed_with_its_session_and_leaves_it_when_it_closes() -> None:
    async with sidecar(settings()) as registry:
        async with (
            prefill_node(settings(registry.url), **memory_pools(), seat=FIRST, shape=SHAPE) as prefill,
            decode_node(settings(), **memory_pools(), shape=SHAPE, registry=registry.url) as decode,
        ):
            for node in (prefill, decode):
                await until_registered(node)
            assert await readiness(decode.metrics_url) == (200, [])
            for name, role, node in (("default", "prefill", prefill), ("decode", "decode", decode)):
                view = registry.registrar.view(name)
                assert view
                assert (view.role, view.ready, view.alive[FIRST].ttl_s) == (role, True, NodeSettings().ttl_s)
                assert view.alive[FIRST].claim.metadata == {
                    SESSION_KEY: node.engine.session,
                    HTTP_KEY: node.metrics_url.removesuffix("/metrics"),
                }
        view = registry.registrar.view("decode")
        assert view
        assert not view.alive


async def test_a_decode_is_not_ready_until_the_registry_that_it_was_given_has_said_yes() -> None:
    async with decode_node(settings(), **memory_pools(), shape=SHAPE, registry="http://127.0.0.1:1") as decode:
        status, reasons = await readiness(decode.metrics_url)
        assert (status, reasons, decode.registered) == (503, ["not registered at http://127.0.0.1:1"], False)


async def test_a_decode_says_nothing_on_the_wire_that_knows_no_roles() -> None:
    async with (
        scripted(answers(404, "404: Not Found")) as stock,  # then 200 to everything
        decode_node(settings(), **memory_pools(), shape=SHAPE, registry=stock.url) as decode,
    ):
        async with asyncio.timeout(SOON_S):
            while (await readiness(decode.metrics_url))[0] != 200:  # noqa: ASYNC110  as in `until_registered`
                await asyncio.sleep(0.01)
        assert not decode.registered
    assert [path for _, path, _ in stock.asked] == ["/v1/instances/decode/ranks/dp0-cp0-tp0-pp0"]


async def test_a_decode_that_drains_is_gone_when_its_rooms_are_over() -> None:
    quick = settings()
    async with fleet() as (url, _, _, _, _), AsyncExitStack() as stack:
        node = NodeSettings(registry=url, decode_instance="decode-b", ttl_s=2.0)
        quick = quick.model_copy(update={"node": node})
        decode = await stack.enter_async_context(decode_node(quick, **memory_pools(), shape=SHAPE, registry=url))
        await until_registered(decode)
        at = await decode.pair(url, room=7)
        async with aiohttp.ClientSession() as http:
            async with decode.receiver.open(7, at, [5], 1):
                async with http.post(f"{url}/v1/instances/decode-b/drain") as answer:
                    assert answer.status == 200
                await asyncio.sleep(2.0)  # several renewals
                assert decode.registered
            async with asyncio.timeout(SOON_S):
                while decode.registered:  # noqa: ASYNC110  as in `until_registered`
                    await asyncio.sleep(0.01)


async def test_a_room_is_sought_where_the_instance_says_that_its_rooms_are() -> None:
    """Two DP ranks: by the room's number where the instance follows it, by what the prefill announced where not."""
    async with AsyncExitStack() as stack:
        decode = await stack.enter_async_context(decode_node(settings(), **memory_pools(), shape=SHAPE))
        for follows in (True, False):
            registry = await stack.enter_async_context(sidecar(settings()))
            shape = replace(SHAPE, dp_size=2, follow_bootstrap_room=follows)
            ranks = [
                await stack.enter_async_context(
                    prefill_node(settings(registry.url), **memory_pools(), seat=Seat(dp, 0, 0, 0), shape=shape)
                )
                for dp in (0, 1)
            ]
            for rank in ranks:
                await until_registered(rank)
            if follows:
                assert await decode.pair(registry.url, room=4) != await decode.pair(registry.url, room=5)
                continue
            with pytest.raises(NotReady, match="no DP rank has announced room 4"):
                await decode.pair(registry.url, room=4)
            await ranks[1].client.announce_room(4, 1)
            first = await decode.pair(registry.url, room=4)
            await ranks[0].client.announce_room(4, 0)
            assert await decode.pair(registry.url, room=4) != first


async def forever() -> None:
    await asyncio.Event().wait()


async def test_the_loops_run_while_the_body_does_and_are_gone_after_it() -> None:
    async with beside(heart=forever()):
        assert "heart" in {task.get_name() for task in asyncio.all_tasks()}
    assert "heart" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_a_loop_that_dies_ends_the_body_with_its_own_error() -> None:
    async def dies() -> None:
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        async with beside(journal=dies(), heart=forever()):
            await forever()


async def test_a_loop_that_returns_ends_the_body_too() -> None:
    async def returns() -> None:
        return

    with pytest.raises(LoopEnded, match="prober") as caught:
        async with beside(prober=returns()):
            await forever()
    assert caught.value.name == "prober"


async def test_the_bodys_own_error_comes_out_bare_and_first() -> None:
    async def fails_when_stopped() -> None:
        try:
            await forever()
        finally:
            raise OSError("late symptom")

    error = ValueError("the first cause")

    async def body() -> None:
        async with beside(link=fails_when_stopped()):
            await asyncio.sleep(0)
            raise error

    with pytest.raises(ValueError, match="the first cause") as caught:
        await body()
    assert caught.value is error


async def test_cancelling_the_body_cancels_the_loops_and_nothing_else() -> None:
    running, cleaned = asyncio.Event(), asyncio.Event()

    async def loop() -> None:
        try:
            running.set()
            await forever()
        finally:
            cleaned.set()

    async def body() -> None:
        async with beside(loop=loop()):
            await forever()

    task = asyncio.create_task(body())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()


def test_the_rows_outlive_a_service_unless_somebody_said_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    assert journal_url(ServeSettings(port=9000)) == f"sqlite:{tmp_path}/state/registry-9000.journal"
    assert (tmp_path / "state").is_dir()
    assert journal_url(ServeSettings(port=9000, journal="memory:")) == "memory:"
    assert journal_url(ServeSettings(port=0)) == "memory:"  # nothing would find them again


def test_a_service_that_would_forget_without_being_told_to_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "file" / "state"))
    with pytest.raises(ConfigError, match="give --journal sqlite:PATH, or --journal memory:"):
        journal_url(ServeSettings(port=9000))
