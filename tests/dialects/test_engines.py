"""vLLM's prefills among the instances of /v1: listed, shown and watched as ranks that speak our own wire are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from pdctl.client import RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.native import Registration
from pdctl.core.news import Changed, News, Picture
from pdctl.core.route import Announcement, Seat, Shape
from tests.scripted import reserve_port
from tests.service import Service, service

SIZES = ("--vllm-sizes", "dp=1,tp=2,pp=1")
SHAPE = Shape(attn_tp_size=1, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype=None)


class Seen:
    """A watch, its picture, and requests besides."""

    def __init__(self, running: Service, http: aiohttp.ClientSession, news: Any) -> None:
        self.url = running.url
        self.http = http
        self.news = news
        self.picture = Picture()

    async def next(self) -> News:
        async with asyncio.timeout(60):
            news: News = await anext(self.news)
        self.picture.take(news)
        return news

    async def kinds(self, n: int) -> list[str]:
        told = [await self.next() for _ in range(n)]
        return [news.kind for news in told if isinstance(news, Changed)]

    async def register(self, tp: int, port: int, engine: str = "p", **more: Any) -> None:
        row = {"engine_id": engine, "dp_rank": 0, "tp_rank": tp, "pp_rank": 0, "addr": f"tcp://127.0.0.1:{port}"}
        async with self.http.post(f"{self.url}/register", json=row | more) as answer:
            assert answer.status == 200, await answer.text()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(f"{self.url}/v1{path}") as answer:
            return answer.status, await answer.json()


@asynccontextmanager
async def seen(running: Service) -> AsyncIterator[Seen]:
    async with (
        aiohttp.ClientSession() as http,
        RegistryClient(running.url) as client,
        aclosing(client.watch()) as news,
    ):
        made = Seen(running, http, news)
        await made.next()
        yield made


async def test_a_prefill_of_vllms_is_listed_shown_and_watched(tmp_path: Path) -> None:
    with service(tmp_path / "log", *SIZES) as running:
        async with seen(running) as watch:
            await watch.register(1, 4001)
            assert await watch.kinds(1) == ["seated"]
            assert not watch.picture.instances["vllm:p"].summary.ready
            _, one = await watch.get("/instances/vllm:p")
            assert [seat["tp"] for seat in one["missing_seats"]] == [0]
            await watch.register(0, 4000)
            assert await watch.kinds(2) == ["seated", "completed"]
            instance = watch.picture.instances["vllm:p"]
            assert (instance.summary.ready, instance.summary.role, instance.shape) == (True, "prefill", None)
            assert [(rank.seat.tp, rank.address, rank.metadata["engine_id"]) for rank in instance.served] == [
                (tp, Endpoint("127.0.0.1", 4000 + tp), "p") for tp in range(2)
            ]
            _, listed = await watch.get("/instances?role=prefill")
            _, one = await watch.get("/instances/vllm:p")
            (summary,) = listed["instances"]
            assert {"name": "vllm:p", "wire": "vllm", "serves": "default", "missing": 0}.items() <= summary.items()
            assert summary["revision"] == watch.picture.revision
            assert {**one, **summary} == one
            assert (await watch.get("/instances?role=decode"))[1]["instances"] == []
            async with seen(running) as again:
                assert again.picture.instances == watch.picture.instances


async def test_a_restart_and_a_goodbye_of_vllms_are_watched(tmp_path: Path) -> None:
    with service(tmp_path / "log", *SIZES) as running, reserve_port() as old, reserve_port() as other:
        async with seen(running) as watch:
            for tp, sock in enumerate((old, other)):
                await watch.register(tp, sock.getsockname()[1])
            assert await watch.kinds(3) == ["seated", "seated", "completed"]
            first = [rank.epoch for rank in watch.picture.ranks()]
            await watch.register(0, 4000)  # nobody listens where the old ones were
            assert sorted(await watch.kinds(2)) == ["left", "replaced"]
            assert [rank.address.port for rank in watch.picture.ranks()] == [4000]
            assert not watch.picture.instances["vllm:p"].summary.ready
            await watch.register(1, 4001)
            assert await watch.kinds(2) == ["seated", "completed"]
            assert min(rank.epoch for rank in watch.picture.ranks()) > max(first)
            async with watch.http.delete(f"{watch.url}/v1/engines/p") as answer:
                assert answer.status == 200
            assert await watch.kinds(2) == ["left", "left"]
            assert "vllm:p" not in watch.picture.instances
            assert (await watch.get("/instances/vllm:p"))[0] != 200


async def test_a_prefill_that_nobody_joins_any_more_is_told_of_when_it_is_complete(tmp_path: Path) -> None:
    with service(tmp_path / "log", PDCTL_VLLM__SETTLE_S="0.5") as running:
        async with seen(running) as watch:
            await watch.register(0, 4000)
            assert await watch.kinds(1) == ["seated"]
            assert not watch.picture.instances["vllm:p"].summary.ready
            assert await watch.kinds(1) == ["completed"]
            assert watch.picture.instances["vllm:p"].summary.ready


async def test_an_id_that_no_path_bears_is_found_by_its_name_in_the_list(tmp_path: Path) -> None:
    with service(tmp_path / "log", *SIZES) as running:
        async with seen(running) as watch:
            await watch.register(0, 4000, engine="a/b c%2F:é")
            await watch.next()
            (name,) = watch.picture.instances
            assert name == "vllm:a%2Fb%20c%252F%3A%C3%A9"
            path = name.replace("%", "%25")
            url = f"{watch.url}/v1/instances/{path}"
            async with watch.http.get(URL(url, encoded=True)) as answer:
                assert (answer.status, (await answer.json())["name"]) == (200, name)


async def test_no_rank_of_ours_can_take_such_a_name(tmp_path: Path) -> None:
    with service(tmp_path / "log") as running:
        async with aiohttp.ClientSession() as http:
            body = Registration.of(Announcement(Seat(0, 0, 0, 0), SHAPE, Endpoint("127.0.0.1", 4000)), 60.0).to_body()
            async with http.put(f"{running.url}/v1/instances/vllm:p/ranks/tp0", json=body) as answer:
                assert answer.status == 400


async def test_the_same_workers_have_the_same_epochs_after_a_restart_of_the_registry(tmp_path: Path) -> None:
    args = (*SIZES, "--journal", f"sqlite:{tmp_path}/rows")
    with service(tmp_path / "first", *args) as running:
        async with seen(running) as watch:
            for tp in (1, 0):
                await watch.register(tp, 4000 + tp)
            await watch.kinds(3)
            before = list(watch.picture.ranks())
        running.kill()
    with service(tmp_path / "second", *args) as running:
        async with seen(running) as watch:
            assert list(watch.picture.ranks()) == before
            await watch.register(0, 5000, engine="q")
            await watch.next()
            (newest,) = watch.picture.instances["vllm:q"].ranks
            assert newest > max(rank.epoch for rank in before)


async def test_changes_of_both_wires_come_in_one_order(tmp_path: Path) -> None:
    """To a journal on the disk, so that writes of one are under way when the other has something to tell."""
    n = 100
    journal = ("--journal", f"sqlite:{tmp_path}/rows")
    with service(tmp_path / "log", *SIZES, *journal, PDCTL_ADMISSION__PER_S="0") as running:
        async with seen(running) as watch:

            async def ours(at: int) -> None:
                rank = Announcement(Seat(0, 0, 0, 0), SHAPE, Endpoint("127.0.0.1", 6000 + at))
                url = f"{watch.url}/v1/instances/ours-{at}/ranks/tp0"
                async with watch.http.put(url, json=Registration.of(rank, 60.0).to_body()) as answer:
                    assert answer.status == 200, await answer.text()

            theirs = [watch.register(tp, 4000 + 2 * at + tp, f"e{at}") for at in range(n) for tp in range(2)]
            await asyncio.gather(*(each for at in range(n) for each in (ours(at), theirs[2 * at], theirs[2 * at + 1])))
            told = [await watch.next() for _ in range(2 * n + 3 * n)]  # seated, completed; seated, seated, completed
            revisions = [news.revision for news in told]
            assert revisions == sorted(set(revisions))
            assert all(instance.summary.ready for instance in watch.picture.instances.values())
            assert len(watch.picture.instances) == 2 * n
            async with seen(running) as again:
                assert again.picture.instances == watch.picture.instances
