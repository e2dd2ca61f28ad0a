"""What a registry makes of neighbours that are slow, strange or liars; real ones: tests/faults/test_overviews.py."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from pdctl.beside import beside
from pdctl.core.address import Endpoint
from pdctl.core.elsewhere import Elsewhere
from pdctl.core.overview import Place
from pdctl.core.route import Seat
from pdctl.credentials import Credentials
from pdctl.errors import ConfigError
from pdctl.persistence.etcd_place import EtcdSettings
from pdctl.replicas import Replicas, own_url
from tests.small_server import listening

TP0 = Seat(0, 0, 0, 0)
ROW = {"instance": "p", "seat": "tp0", "epoch": 3, "age_s": 1.5}
REPORT = b'{"role":"prefill"}'


class Neighbour:
    """Another registry that says what it is told to; `asked` has the queries that came in."""

    def __init__(self) -> None:
        self.head: Any = {"registry": "b", "next": 7, "whole": True}
        self.lines = [json.dumps(ROW).encode() + b"\t" + REPORT]
        self.events: Any = {"events": [], "next": 1, "oldest": 1}
        self.hangs = asyncio.Event()
        self.hangs.set()
        self.asked: list[str] = []

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request.path_qs)
        await self.hangs.wait()
        if request.path == "/v1/events":
            return web.json_response(self.events)
        return web.Response(body=b"\n".join([json.dumps(self.head).encode(), *self.lines, b""]))


class Stage:
    """A registry's end of it."""

    def __init__(self, url: str, other: Neighbour, look_s: float) -> None:
        self.url, self.other = url, other
        self.others = {"b": url}
        self.changed: list[Place] = []
        self.heard: list[dict[str, Any]] = []
        self.replicas = Replicas(
            "a",
            lambda: self.others,
            Elsewhere(),
            Credentials(),
            time.monotonic,
            is_watched=lambda: False,
            changed=self.changed.append,
            hear=lambda _, rows: self.heard.extend(rows),
            look_s=look_s,
        )

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not what():  # noqa: ASYNC110  another server's doing
                await asyncio.sleep(0.01)

    async def look(self) -> dict[str, Any]:
        """How the neighbour is shown after a look."""
        await asyncio.sleep(0.3)  # two at one moment are one
        await self.replicas.look()
        (row,) = self.replicas.shown()
        return row


@asynccontextmanager
async def staged(look_s: float = 30.0) -> AsyncIterator[Stage]:
    other = Neighbour()
    async with listening(web.ServerRunner(web.Server(other.handle), shutdown_timeout=0.1)) as url:
        stage = Stage(url, other, look_s)
        async with beside(replicas=stage.replicas.run()):
            await stage.until(lambda: bool(stage.replicas.shown()))
            yield stage
            other.hangs.set()


async def test_a_report_is_copied_with_its_age_and_asked_for_again_from_where_it_was() -> None:
    async with staged() as stage:
        row = await stage.look()
        assert (row["answers"], row["reports"], row["why"]) == (True, 1, None)
        found = stage.replicas.elsewhere.freshest(("p", TP0))
        assert found is not None
        assert (found[0], found[1].epoch, found[1].body) == ("b", 3, REPORT)
        assert 1.5 <= time.monotonic() - found[1].at < 30.0
        stage.other.head = {"registry": "b", "next": 8, "whole": False}
        stage.other.lines = [json.dumps({"instance": "p", "seat": "tp0"}).encode() + b"\t"]
        await stage.look()
        assert "/v1/reports?since=7" in stage.other.asked
        assert len(stage.replicas.elsewhere) == 0
        assert stage.changed == [("p", TP0)] * 2


async def test_all_that_is_not_in_a_whole_list_is_gone() -> None:
    async with staged() as stage:
        await stage.look()
        stage.other.lines = []
        row = await stage.look()
        assert (row["answers"], row["reports"]) == (True, 0)


@pytest.mark.parametrize(
    ("head", "lines", "why"),
    [
        ({"registry": "c", "next": 1, "whole": True}, [], "another registry"),
        ({"registry": "b"}, [], "whole"),
        ("no object", [], "str"),
        (None, [json.dumps(ROW).encode() + b'\t{"role":"prefill"'], "EOF"),
        (None, [b"not JSON\t{}"], "xpecting value"),
        (None, [json.dumps(ROW | {"seat": "first"}).encode() + b"\t{}"], "seat"),
        (None, [json.dumps(ROW | {"age_s": None}).encode() + b"\t{}"], "float"),
    ],
    ids=str,
)
async def test_what_no_registry_of_ours_says_is_not_shown_and_named(head: Any, lines: list[bytes], why: str) -> None:
    async with staged() as stage:
        stage.other.head = head or stage.other.head
        stage.other.lines = lines
        row = await stage.look()
        assert not row["answers"]
        assert why in row["why"]
        assert row["reports"] == 0


async def test_one_that_hangs_costs_one_look_and_none_after_it() -> None:
    async with staged(look_s=2.0) as stage:
        await stage.until(lambda: bool(stage.replicas.shown()[0]["answers"]))
        stage.other.hangs.clear()
        assert (await stage.look())["why"] == "no answer within 2 s"
        began = time.monotonic()
        for _ in range(20):
            assert not (await stage.look())["answers"]
        assert time.monotonic() - began < 20 * 2.0
        stage.other.hangs.set()
        await stage.until(lambda: bool(stage.replicas.shown()[0]["answers"]))


async def test_one_that_has_gone_takes_what_it_was_told_along() -> None:
    async with staged() as stage:
        await stage.look()
        stage.others = {}
        await stage.until(lambda: stage.replicas.shown() == [])
        assert len(stage.replicas.elsewhere) == 0
        assert stage.changed[-1] == ("p", TP0)


async def test_events_are_heard_once_and_none_that_it_was_told_itself() -> None:
    own, told = {"id": 1, "kind": "refused", "registry": None}, {"id": 2, "kind": "refused", "registry": "http://c"}
    async with staged() as stage:
        stage.other.events = {"events": [own, told], "next": 3, "oldest": 1}
        await stage.until(lambda: bool(stage.heard))
        stage.other.events = {"events": [], "next": 3, "oldest": 1}
        await stage.until(lambda: any("since=3" in path for path in stage.other.asked))
        assert stage.heard == [own]


@pytest.mark.parametrize(
    ("at", "advertise", "url"),
    [
        ("10.0.0.7:8998", None, "http://10.0.0.7:8998"),
        ("[fd00::7]:8998", None, "http://[fd00::7]:8998"),
        ("0.0.0.0:8998", None, "http://127.0.0.1:8998"),
        ("0.0.0.0:8998", "https://registry-a:443", "https://registry-a:443"),
    ],
)
async def test_it_gives_the_others_an_address_that_they_can_use(at: str, advertise: str | None, url: str) -> None:
    settings = EtcdSettings(advertise=advertise)
    assert await own_url("http", Endpoint.parse(at), "etcd://127.0.0.1:2379", settings) == url


async def test_where_nobody_can_say_none_is_given() -> None:
    nowhere = "etcd://no-such-host.invalid:2379"
    assert await own_url("http", Endpoint.parse("0.0.0.0:8998"), nowhere, EtcdSettings()) is None
    with pytest.raises(ConfigError, match="http://host:port"):
        EtcdSettings(advertise="registry-a:8998")
