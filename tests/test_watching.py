"""A watch that goes on: against a registry that does as scripted, and against `pdctl serve`, killed and stopped."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
import structlog

from pdctl.client import RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.lives import Claim, Owner
from pdctl.core.native import Registration
from pdctl.core.news import Changed, Listed, News, Picture
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import RegistryRefused, TooLarge
from pdctl.registrar import Registrar
from pdctl.retry import RetryPolicy
from pdctl.watching import MAX_EVENT_NBYTES, WATCH
from tests.core.test_news import change, event, instance, row
from tests.scripted import Act, answers, answers_json, hangs, scripted, streams
from tests.service import Service, service
from tests.test_lease import Turns

QUICK = RetryPolicy(first_wait_s=0.01, max_wait_s=0.05, full_jitter=True)
SOON_S = 60.0


def wire(*events: Any) -> bytes:
    """As the registry writes them."""
    said = (f"id: {each.id}\n" * (each.id is not None) + f"event: {each.kind}\n" for each in events)
    return b"".join(head.encode() + b"data: " + each.data + b"\n\n" for head, each in zip(said, events, strict=True))


LIST = wire(event("reset", {"revision": 2}), event("instance", instance(row(1))), event("synced", {"revision": 2}, 2))


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


class Watched:
    """A watch under test: what it has told, and the picture of it."""

    def __init__(self, news: Any) -> None:
        self._news = news
        self.picture = Picture()

    async def next(self) -> News:
        async with asyncio.timeout(SOON_S):
            news: News = await anext(self._news)
        self.picture.take(news)
        return news

    async def until(self, revision: int) -> None:
        while self.picture.revision < revision:
            await self.next()


@asynccontextmanager
async def watched(url: str, since: str | None = None, **more: Any) -> AsyncIterator[Watched]:
    of_watch = {"policy": more.pop("policy", QUICK), "silent_after_s": more.pop("silent_after_s", 30.0)}
    async with (
        RegistryClient(url, **more) as client,
        aclosing(client.watch(since, **of_watch)) as news,
    ):
        yield Watched(news)


def asked(registry: Any) -> list[str]:
    return [path.removeprefix("/v1/watch") for _, path, _ in registry.asked]


# A stream that breaks


async def test_a_stream_that_ends_is_taken_up_where_it_ended(lines: list[Any]) -> None:
    forever = asyncio.Event()
    first = streams(b"retry: 5\n\n", LIST, wire(change(3, row(2, tp=1))))
    async with (
        scripted(first, otherwise=streams(wire(change(4, gone=(1,))), then=forever)) as registry,
        watched(registry.url) as watch,
    ):
        told = [await watch.next() for _ in range(3)]
        forever.set()
    assert [type(news) for news in told] == [Listed, Changed, Changed]
    assert [news.cursor for news in told] == ["x-2", "x-3", "x-4"]
    assert list(watch.picture.instances["a"].ranks) == [2]
    assert asked(registry)[:2] == ["", "?since=x-3"]
    assert [line["cause"] for line in lines] == [f"registry {registry.url} has ended the stream"]


@pytest.mark.parametrize("cut", [len(LIST) - 1, len(LIST) - 40, 60, 3, 0])
async def test_a_list_that_breaks_off_is_told_whole_the_next_time(cut: int) -> None:
    async with scripted(streams(LIST[:cut]), otherwise=streams(LIST)) as registry, watched(registry.url) as watch:
        news = await watch.next()
    assert isinstance(news, Listed)
    assert list(news.instances["a"].ranks) == [1]
    assert asked(registry)[:2] == ["", ""]


async def test_a_change_that_breaks_off_is_not_told_by_half() -> None:
    both = wire(change(3, row(2, tp=1)), change(4, gone=(2,)))
    async with (
        scripted(streams(both[:-30]), otherwise=streams(wire(change(4, gone=(2,)), change(5)))) as registry,
        watched(registry.url, since="x-2") as watch,
    ):
        assert [(await watch.next()).revision for _ in range(3)] == [3, 4, 5]
    assert asked(registry)[:2] == ["?since=x-2", "?since=x-3"]


async def test_a_goodbye_is_no_end_and_its_words_are_logged(lines: list[Any]) -> None:
    bye = wire(event("bye", {"error": {"message": "this registry stops: connect again"}}))
    async with scripted(streams(LIST, bye), otherwise=streams(LIST)) as registry, watched(registry.url) as watch:
        for _ in range(2):
            assert isinstance(await watch.next(), Listed)
    assert "this registry stops" in lines[0]["cause"]


async def test_what_a_registry_does_not_have_any_more_comes_as_a_list() -> None:
    async with scripted(otherwise=streams(LIST)) as registry, watched(registry.url, since="old-1") as watch:
        assert isinstance(await watch.next(), Listed)
    assert asked(registry)[0] == "?since=old-1"


async def test_a_stream_that_says_nothing_is_dead_and_one_that_says_that_it_lives_is_not(lines: list[Any]) -> None:
    async def alive(request: Any) -> Any:
        response = await streams(LIST)(request)
        for _ in range(10):
            await asyncio.sleep(0.1)
            await response.write(b": alive\n\n")
        await response.write(wire(change(3)))
        return await hangs()(request)

    forever = asyncio.Event()
    silent = streams(wire(change(4)), then=forever)
    async with (
        scripted(alive, silent, otherwise=streams(wire(change(5)), then=forever)) as registry,
        watched(registry.url, silent_after_s=0.5) as watch,
    ):
        assert [(await watch.next()).revision for _ in range(4)] == [2, 3, 4, 5]
        forever.set()
    assert [line["cause"] for line in lines] == ["timed out: it has said nothing for 0.5 s"] * 2


async def test_a_registry_that_takes_the_connection_and_nothing_else_is_asked_again() -> None:
    async with (
        scripted(hangs(), otherwise=streams(LIST)) as registry,
        watched(registry.url, attempt_timeout_s=0.2) as watch,
    ):
        assert isinstance(await watch.next(), Listed)
    assert len(registry.asked) >= 2


async def test_waits_are_drawn_and_grow_while_nobody_answers_and_begin_anew_when_somebody_has() -> None:
    turns, busy = Turns(), answers(503, "starting")
    acts: list[Act] = [*[busy] * 12, streams(LIST), *[busy] * 3, streams(LIST)]
    async with (
        scripted(*acts) as registry,
        watched(registry.url, policy=WATCH, sleep=turns, random=Random(3)) as watch,
    ):
        for _ in range(2):
            await watch.next()
    ceilings = [1.0, 2.0, 4.0, 8.0, *[10.0] * 8, 1.0, 2.0, 4.0, 8.0]
    assert len(turns.slept) == len(ceilings)
    assert all(0 <= wait <= ceiling for wait, ceiling in zip(turns.slept, ceilings, strict=True))
    assert max(turns.slept) > 5.0
    assert min(turns.slept[4:12]) < 5.0


async def test_a_registry_that_is_full_of_watchers_is_left_alone_as_long_as_it_says() -> None:
    full = answers(429, "1000 watchers are connected", {"Retry-After": "7"})
    turns = Turns()
    async with (
        scripted(full, otherwise=streams(LIST)) as registry,
        watched(registry.url, policy=WATCH, sleep=turns) as watch,
    ):
        await watch.next()
    assert 7.0 <= turns.slept[0] <= 8.0


# A stream that is none


@pytest.mark.parametrize(("status", "words"), [(404, "Not Found"), (400, "since: 'x' is no cursor"), (403, "outside")])
async def test_a_registry_that_refuses_ends_the_watch_with_its_words(status: int, words: str) -> None:
    refusal = answers_json({"error": {"message": words}}, status)
    async with scripted(otherwise=refusal) as registry, watched(registry.url) as watch:
        with pytest.raises(RegistryRefused, match=words):
            await watch.next()
    assert len(registry.asked) == 1


@pytest.mark.parametrize(
    "act",
    [
        answers(200, "<html>"),
        streams(b"data: x\n\n", content_type="text/plain"),
        streams(wire(event("synced", {}, 2))),
        streams(b"event: change\ndata: {\n\n"),
    ],
    ids=["page", "text", "no list", "no JSON"],
)
async def test_what_is_no_registrys_stream_is_named_and_tried_again(act: Act, lines: list[Any]) -> None:
    async with scripted(act, otherwise=streams(LIST)) as registry, watched(registry.url) as watch:
        assert isinstance(await watch.next(), Listed)
    assert "is no registry" in lines[0]["cause"]


async def test_a_line_without_end_ends_the_watch_and_fills_no_memory() -> None:
    piece, n = b"x" * (1 << 20), (MAX_EVENT_NBYTES >> 20) + 1
    async with scripted(streams(b"data: ", *[piece] * n)) as registry, watched(registry.url) as watch:
        with pytest.raises(TooLarge, match="an event of the stream"):
            await watch.next()


async def test_a_watch_that_is_left_lets_its_connection_go() -> None:
    left = asyncio.Event()

    async def stays(request: Any) -> Any:
        await streams(LIST)(request)
        return await hangs(left)(request)

    async with scripted(otherwise=stays) as registry, RegistryClient(registry.url) as client:
        async with aclosing(client.watch()) as news:
            await anext(news)
        async with asyncio.timeout(SOON_S):
            await left.wait()


# Our registry

SHAPE = Shape(attn_tp_size=2, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype=None)


def announced(tp: int, port: int = 40000, shape: Shape = SHAPE) -> Announcement:
    return Announcement(Seat(0, 0, tp, 0), shape, Endpoint("10.0.0.1", port + tp))


async def test_a_picture_comes_to_what_the_registry_lists(registry_url: str, registrar: Registrar) -> None:
    here = Owner("10.0.0.1")
    more: dict[str, Any] = {"labels": {"zone": "a"}, "metadata": {"mooncake_session": "10.0.0.1:15000"}}
    await registrar.register(Claim("early", announced(0), here, **more))
    async with watched(registry_url) as watch:
        await watch.next()
        for port in (40000, 41000):
            for tp in range(2):
                await registrar.register(Claim("a", announced(tp, port), here, "decode", ttl_s=60.0, **more))
        await registrar.leave("a", Seat(0, 0, 1, 0))
        await registrar.register(Claim("early", announced(0, 42000, replace(SHAPE, attn_tp_size=1)), here))
        await registrar.drain("a", None, 60.0)
        await watch.until(registrar.revision)
        async with watched(registry_url) as again:
            await again.next()
            assert watch.picture.instances == again.picture.instances
    assert {name: len(each.served) for name, each in watch.picture.instances.items()} == {"early": 1, "a": 1}
    (rank,) = watch.picture.ranks("decode")
    assert (rank.address, rank.standing, rank.metadata) == (Endpoint("10.0.0.1", 41000), "draining", more["metadata"])


async def put(running: Service, tp: int, instance: str = "a") -> None:
    body = Registration.of(Announcement(Seat(0, 0, tp, 0), SHAPE, Endpoint("127.0.0.1", 40000 + tp)), 60.0).to_body()
    url = f"{running.url}/v1/instances/{instance}/ranks/tp{tp}"
    async with aiohttp.ClientSession() as http, http.put(url, json=body) as answer:
        assert answer.status == 200, await answer.text()


async def test_a_registry_that_is_killed_and_comes_back_tells_all_and_goes_on(tmp_path: Path) -> None:
    args = ("--journal", f"sqlite:{tmp_path}/rows")
    with service(tmp_path / "first", *args) as first:
        async with watched(first.url) as watch:
            assert isinstance(await watch.next(), Listed)
            await put(first, 0)
            assert isinstance(await watch.next(), Changed)
            first.kill()
            with service(tmp_path / "second", *args, "--port", str(first.port)) as second:
                listed = await watch.next()
                assert isinstance(listed, Listed)
                assert [rank.seat.tp for rank in listed.instances["a"].served] == [0]
                await put(second, 1)
                while not watch.picture.instances["a"].summary.ready:
                    await watch.next()
                assert [rank.seat.tp for rank in watch.picture.ranks()] == [0, 1]
                cursor = watch.picture.cursor
                second.kill()
            # the rows of a later life of the registry begin where this one ended: what was before is too old to be had
            with service(tmp_path / "third", *args) as third:
                async with watched(third.url) as fresh:
                    await fresh.next()
                    lineage = str(fresh.picture.cursor).partition("-")[0]
                for since in (cursor, f"{lineage}-0"):
                    async with watched(third.url, since=since) as late:
                        assert isinstance(await late.next(), Listed)
                        assert [rank.seat.tp for rank in late.picture.ranks()] == [0, 1]


async def test_a_registry_that_stands_still_is_noticed_and_nothing_is_missed_or_told_again(
    tmp_path: Path, lines: list[Any]
) -> None:
    with service(tmp_path / "log", PDCTL_WATCH__HEARTBEAT_S="0.2") as running:
        how: dict[str, Any] = {"silent_after_s": 1.0, "attempt_timeout_s": 0.5}
        async with watched(running.url, **how) as watch:
            await watch.next()
            for tp in (0, 1):
                await put(running, tp, f"before-{tp}")
                assert isinstance(await watch.next(), Changed)
            before = watch.picture.revision
            lines.clear()  # a busy machine may have lost the connection before
            os.kill(running.pid, signal.SIGSTOP)
            try:
                nobody = asyncio.ensure_future(watch.next())
                async with asyncio.timeout(SOON_S):
                    while not any("timed out after 0.5 s" in line["cause"] for line in lines):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                assert not nobody.done()
            finally:
                os.kill(running.pid, signal.SIGCONT)
            await put(running, 0, "after")
            news = await nobody
            assert isinstance(news, Changed)
            assert (news.instance, news.revision) == ("after", before + 1)
    assert "timed out: it has said nothing for 1 s" in [line["cause"] for line in lines]
