"""The stream of changes: nobody gets a gap, nobody holds the service up. Real HTTP; what is told is made up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import aiohttp
import pytest
from fastapi import APIRouter, Request
from fastapi.responses import Response

from pdctl.core.address import Endpoint
from pdctl.core.feed import Feed, WatchLimits
from pdctl.dialects.watch import Broadcast
from pdctl.errors import BadField
from pdctl.metrics import Metrics
from pdctl.server import app, bind, bound, serve


@dataclass
class Told:
    """One event as it came."""

    kind: str = ""
    cursor: str | None = None
    data: object = None
    comment: str | None = None


async def read(lines: aiohttp.StreamReader) -> AsyncGenerator[Told, None]:
    """Server-sent events, by the letter of the standard as far as we use it."""
    told = Told()
    async for raw in lines:
        name, _, value = raw.decode().rstrip("\n").partition(": ")
        match name:
            case "event":
                told.kind = value
            case "id":
                told.cursor = value
            case "data":
                told.data = json.loads(value)
            case "retry":
                told.kind, told.data = "retry", int(value)
            case "":
                if value:
                    told.kind, told.comment = "comment", value
                else:
                    yield told
                    told = Told()


class House:
    """A made-up registry: instances are numbers, and each change counts one of them up."""

    def __init__(self, metrics: Metrics, n_instances: int = 2, **more: object) -> None:
        self.values = {f"i{n}": 0 for n in range(n_instances)}
        self.news = Broadcast(self.names, self.detail, metrics, **more)  # type: ignore[arg-type]
        self.revision = self.news.revision
        self.url = ""

    def names(self) -> Iterable[str]:
        return self.values

    def detail(self, name: str) -> bytes | None:
        return json.dumps({"name": name, "value": self.values[name]}).encode()

    def change(self, name: str = "i0", padding: int = 0) -> None:
        self.values[name] += 1
        self.revision += 1
        body = {"name": name, "value": self.values[name], "padding": "x" * padding}
        self.news.publish(self.revision, name, json.dumps(body).encode())

    def router(self) -> APIRouter:
        api = APIRouter()

        @api.get("/v1/watch")
        async def watch(request: Request, since: str = "") -> Response:
            return self.news.response(self.news.read_cursor(since) if since else -1, "reader")

        return api


@asynccontextmanager
async def served(house: House, metrics: Metrics) -> AsyncIterator[House]:
    with bind("127.0.0.1", 0) as sock:
        where: Endpoint = bound(sock)
        house.url = f"http://{where}/v1/watch"
        tasks = {
            asyncio.create_task(serve(app([house.router()], metrics, unready=list), sock, grace_s=5.0)),
            asyncio.create_task(house.news.run()),
        }
        try:
            yield house
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


@pytest.fixture
async def house(metrics: Metrics) -> AsyncIterator[House]:
    async with served(House(metrics, lineage="here"), metrics) as house:
        yield house


@asynccontextmanager
async def watching(house: House, since: str = "") -> AsyncIterator[AsyncIterator[Told]]:
    timeout = aiohttp.ClientTimeout(total=60.0)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(house.url, params={"since": since} if since else None) as answer,
    ):
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        async with aclosing(read(answer.content)) as events:
            yield events


async def until(events: AsyncIterator[Told], kind: str) -> list[Told]:
    """Everything up to the first event of `kind`, that one included."""
    got = []
    async with asyncio.timeout(60):
        async for told in events:
            got.append(told)
            if told.kind == kind:
                return got
    raise AssertionError(f"the stream ended before {kind}: {got}")


async def test_a_new_reader_is_told_everything_and_then_what_changes(house: House) -> None:
    house.change("i1")
    async with watching(house) as events:
        retry, reset, first, second, synced = await until(events, "synced")
        assert isinstance(retry.data, int)
        assert 1000 <= retry.data <= 3000
        assert (reset.kind, reset.cursor) == ("reset", None)  # a list that breaks off is asked for again, not gone on
        assert [first.data, second.data] == [{"name": "i0", "value": 0}, {"name": "i1", "value": 1}]
        assert (synced.cursor, synced.data) == ("here-1", {"revision": 1})
        house.change("i0")
        (change,) = await until(events, "change")
        assert (change.cursor, change.data) == ("here-2", {"name": "i0", "value": 1, "padding": ""})


async def test_what_changes_while_it_is_listed_is_told_before_it_is_called_whole(metrics: Metrics) -> None:
    class Busy(House):
        def detail(self, name: str) -> bytes | None:
            if name == "i1" and not self.revision:
                self.change("i0")  # which has been told already
            return super().detail(name)

    async with served(Busy(metrics), metrics) as house, watching(house) as events:
        told = await until(events, "synced")
    assert [(each.kind, each.data) for each in told[2:]] == [
        ("instance", {"name": "i0", "value": 0}),
        ("instance", {"name": "i1", "value": 0}),
        ("change", {"name": "i0", "value": 1, "padding": ""}),
        ("synced", {"revision": 1}),
    ]


@pytest.mark.parametrize("since", ["here-1", "1"])
async def test_a_reader_who_comes_back_gets_what_it_missed_and_nothing_else(house: House, since: str) -> None:
    for _ in range(3):
        house.change()
    async with watching(house, since) as events:
        told = [*await until(events, "change"), *await until(events, "change")]
    assert [(each.kind, each.cursor) for each in told] == [
        ("retry", None),
        ("change", "here-2"),
        ("change", "here-3"),
    ]


@pytest.mark.parametrize("since", ["elsewhere-1", "here-7"], ids=["another process", "a revision to come"])
async def test_a_reader_of_another_registry_starts_anew(house: House, since: str) -> None:
    house.change()
    async with watching(house, since) as events:
        told = await until(events, "synced")
    assert [each.kind for each in told] == ["retry", "reset", "instance", "instance", "synced"]


async def test_a_reader_who_was_away_too_long_starts_anew(metrics: Metrics) -> None:
    async with served(House(metrics, lineage="here", feed=Feed(max_entries=2)), metrics) as house:
        for _ in range(5):
            house.change()
        async with watching(house, "here-2") as events:
            assert (await until(events, "synced"))[-1].cursor == "here-5"
        async with watching(house, "here-3") as events:
            assert (await until(events, "change"))[-1].cursor == "here-4"


@pytest.mark.parametrize("since", ["x", "here-", "-1", "here-1-2x", "9" * 40, "1\u0660"])
def test_what_is_no_cursor_is_refused(metrics: Metrics, since: str) -> None:
    with pytest.raises(BadField, match="since"):
        House(metrics).news.read_cursor(since)


async def test_a_quiet_stream_says_that_it_lives(metrics: Metrics) -> None:
    house = House(metrics, limits=WatchLimits(heartbeat_s=0.05))
    async with served(house, metrics), watching(house) as events:
        await until(events, "synced")
        assert [each.comment for each in await until(events, "comment")] == ["alive"]


async def test_one_reader_too_many_is_refused_and_a_place_that_is_left_is_free(metrics: Metrics) -> None:
    async with served(House(metrics, limits=WatchLimits(max_watchers=1)), metrics) as house:
        async with watching(house) as events:
            await until(events, "synced")
            async with aiohttp.ClientSession() as session, session.get(house.url) as answer:
                assert answer.status == 429
                assert "max_watchers" in (await answer.json())["error"]["message"]
        async with asyncio.timeout(60):
            while open_streams(metrics):  # noqa: ASYNC110 - there is nothing but the gauge to wait for
                await asyncio.sleep(0)
        async with watching(house) as events:
            await until(events, "synced")


async def test_a_reader_who_falls_behind_is_told_so_and_comes_back(metrics: Metrics) -> None:
    async with served(House(metrics, feed=Feed(max_entries=3)), metrics) as house:
        async with watching(house) as events:
            await until(events, "synced")
            for _ in range(10):  # in one step of the loop: no reader can follow
                house.change()
            (bye,) = await until(events, "bye")
            assert "so far behind" in json.dumps(bye.data)
            assert [each async for each in events] == []
        async with watching(house) as events:
            told = await until(events, "synced")
    assert {"name": "i0", "value": 10} in [each.data for each in told]
    assert ended(metrics)["behind"] == 1


async def test_a_reader_who_takes_nothing_is_cut_off_and_the_others_go_on(metrics: Metrics) -> None:
    limits = WatchLimits(send_within_s=0.2)
    async with served(House(metrics, limits=limits), metrics) as house:
        host, port = house.url.removeprefix("http://").partition("/")[0].split(":")
        _, stuck = await asyncio.open_connection(host, int(port), limit=1024)
        stuck.write(b"GET /v1/watch HTTP/1.1\r\nHost: x\r\n\r\n")
        async with watching(house) as events:
            await until(events, "synced")
            async with asyncio.timeout(60):
                while not ended(metrics)["stuck"]:  # megabytes lie in the buffers of both kernels before anybody waits
                    house.change(padding=100_000)
                    await until(events, "change")
            house.change("i1")
            (last,) = await until(events, "change")
            assert isinstance(last.data, dict)
            assert last.data["name"] == "i1"
            assert open_streams(metrics) == 1
        stuck.transport.abort()


async def test_a_service_that_stops_says_goodbye_instead_of_waiting_for_its_readers(metrics: Metrics) -> None:
    house = House(metrics)
    async with asyncio.timeout(4.0):  # grace is 5 s
        async with asyncio.TaskGroup() as group, served(house, metrics):
            connected = asyncio.Event()

            async def reader() -> list[Told]:
                async with watching(house) as events:
                    await until(events, "synced")
                    connected.set()
                    return [*await until(events, "bye"), *[each async for each in events]]

            reading = group.create_task(reader())
            await connected.wait()
        (bye,) = reading.result()
    assert "stops" in json.dumps(bye.data)


async def test_a_hundred_readers_follow_and_all_see_the_same(metrics: Metrics) -> None:
    async with served(House(metrics, n_instances=50), metrics) as house:
        ready = asyncio.Semaphore(0)

        async def reader() -> tuple[dict[str, int], list[str | None]]:
            known, order = dict[str, int](), list[str | None]()
            async with watching(house) as events:
                async for told in events:
                    match told:
                        case Told("instance" | "change", cursor, {"name": str(name), "value": int(value)}):
                            known[name] = value
                            order += [cursor] if cursor else []
                        case Told("synced"):
                            ready.release()
                    if sum(known.values()) == 1000:
                        break
            return known, order

        async with asyncio.timeout(60.0), asyncio.TaskGroup() as group:
            readers = [group.create_task(reader()) for _ in range(100)]
            for _ in readers:
                await ready.acquire()
            assert open_streams(metrics) == 100
            for n in range(1000):
                house.change(f"i{n % 50}")
                if n % 100 == 0:
                    await asyncio.sleep(0)
    assert all(reader.result()[0] == house.values for reader in readers)
    assert all(reader.result()[1] == [house.news.cursor_at(n + 1) for n in range(1000)] for reader in readers)


def open_streams(metrics: Metrics) -> float:
    return _samples(metrics)["pdctl_watch_streams_open"]


def ended(metrics: Metrics) -> dict[str, float]:
    prefix = 'pdctl_watch_streams_ended_total{reason="'
    return {
        name.removeprefix(prefix).removesuffix('"}'): value
        for name, value in _samples(metrics).items()
        if name.startswith(prefix)
    }


def _samples(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.exposition()[0].decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
