"""Mooncake's metadata server: the stock answers, whose a key is, and the real engine that is killed and comes again."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from pdctl.core.address import Endpoint
from pdctl.core.metadata import KeyBook, KeyLimits, KeyWitness, Row
from pdctl.counts.wires import KeyChange
from pdctl.dialects import mooncake
from pdctl.errors import LimitReached, PdctlError
from pdctl.keyring import Keyring
from pdctl.metrics import Metrics
from pdctl.server import app, bind, bound, serve
from tests.engine.named import ENVIRON
from tests.engine.processes import Child

META, RAM = "mooncake/rpc_meta/node", "mooncake/ram/node"
Answer = tuple[int, str]


def meta(port: int = 15000, host: str = "127.0.0.1") -> bytes:
    return json.dumps({"ip_or_host_name": host, "rpc_port": port}).encode()


@dataclass
class Stage:
    """A metadata server, and who of its engines would answer."""

    url: str
    session: aiohttp.ClientSession
    keyring: Keyring
    living: set[int]
    journal: list[Row] = field(default_factory=list)
    refused: list[PdctlError] = field(default_factory=list)
    full: bool = False

    async def ask(self, method: str, key: str | None, value: bytes | None = None) -> Answer:
        query = "" if key is None else f"?key={quote(key, safe='')}"  # as libcurl writes it
        sent = None if value is None else io.BytesIO(value)
        async with self.session.request(method, f"{self.url}/metadata{query}", data=sent) as answer:
            return answer.status, await answer.text()

    async def keep(self, rows: Sequence[Row]) -> None:
        if self.full:
            raise LimitReached("no space: make some")
        self.journal += rows


@asynccontextmanager
async def staged(
    metrics: Metrics, limits: KeyLimits | None = None, host: str = "127.0.0.1", **how: Any
) -> AsyncIterator[Stage]:
    living: set[int] = set()

    async def answers(address: Endpoint) -> bool:
        return address.port in living

    async def keep(rows: Sequence[Row]) -> None:
        await made.keep(rows)

    keyring = Keyring(KeyBook(limits), keep, how.pop("answers", answers), metrics, KeyWitness(**how))
    service = app([mooncake.router(keyring, lambda error, *_: made.refused.append(error))], metrics, unready=list)
    with bind(host, 0) as sock:
        async with aiohttp.ClientSession() as session:
            made = Stage(f"http://{bound(sock)}", session, keyring, living)
            server = asyncio.create_task(serve(service, sock, grace_s=1.0))
            yield made
            server.cancel()
            await asyncio.wait({server})


@pytest.fixture
async def stage(metrics: Metrics) -> AsyncIterator[Stage]:
    async with staged(metrics) as made:
        yield made


async def test_the_stock_answers(stage: Stage) -> None:
    assert await stage.ask("GET", RAM) == (404, "metadata not found")
    assert await stage.ask("PUT", RAM, b'{"a": 1}') == (200, "metadata updated")
    assert await stage.ask("GET", RAM) == (200, '{"a": 1}')
    assert await stage.ask("DELETE", RAM) == (200, "metadata deleted")
    assert await stage.ask("DELETE", RAM) == (404, "metadata not found")
    assert await stage.ask("POST", RAM, b"{}") == (405, "Method not allowed")
    for method in ("GET", "PUT", "DELETE", "POST"):
        for no_key in (None, "", "  "):
            assert await stage.ask(method, no_key) == (400, "metadata key is required")


async def test_a_value_comes_back_byte_for_byte_as_json(stage: Stage) -> None:
    value = bytes(range(256)) * 40
    await stage.ask("PUT", RAM, value)
    async with stage.session.get(f"{stage.url}/metadata", params={"key": RAM}) as answer:
        assert await answer.read() == value
        assert answer.content_type == "application/json"


async def test_an_identical_second_put_is_fine_and_writes_nothing(stage: Stage) -> None:
    for key, value in ((META, meta()), (RAM, b"{}")):
        for _ in range(3):
            assert await stage.ask("PUT", key, value) == (200, "metadata updated")
    assert [row.key for row in stage.journal] == [META, RAM]


async def test_a_restart_under_the_same_name_is_accepted_and_the_old_memory_is_gone(
    stage: Stage, metrics: Metrics
) -> None:
    await stage.ask("PUT", META, meta(15000))
    await stage.ask("PUT", RAM, b"{old}")
    assert await stage.ask("PUT", META, meta(15001)) == (200, "metadata updated")
    assert await stage.ask("GET", META) == (200, meta(15001).decode())
    assert await stage.ask("GET", RAM) == (404, "metadata not found")
    body = metrics.exposition()[0].decode()
    assert f'pdctl_metadata_changes_total{{kind="{KeyChange.TAKEN_OVER}"}} 1.0' in body
    assert "pdctl_metadata_keys 1.0" in body


async def test_a_living_engine_keeps_its_name_and_the_answer_says_whose_it_is(stage: Stage) -> None:
    await stage.ask("PUT", META, meta(15000))
    stage.living.add(15000)
    status, text = await stage.ask("PUT", META, meta(15001))
    assert status == 409
    assert "127.0.0.1:15000" in text
    assert [str(error) for error in stage.refused] == [json.loads(text)["error"]["message"]]
    assert await stage.ask("GET", META) == (200, meta(15000).decode())


async def test_another_host_can_neither_write_nor_delete_what_is_a_living_engines(stage: Stage) -> None:
    stage.keyring.restore([Row(META, meta(15000, "10.0.0.9"), "10.0.0.9"), Row(RAM, b"{theirs}", "10.0.0.9")])
    stage.living.add(15000)
    assert (await stage.ask("PUT", RAM, b"{mine}"))[0] == 409
    assert (await stage.ask("DELETE", RAM))[0] == 409
    assert await stage.ask("GET", RAM) == (200, "{theirs}")
    stage.living.clear()
    assert await stage.ask("PUT", META, meta(15001)) == (200, "metadata updated")
    assert (await stage.ask("GET", RAM))[0] == 404


async def test_of_two_heirs_at_once_one_gets_the_name(metrics: Metrics) -> None:
    """Both find the holder gone; the second has to ask after the first, who lives."""

    async def answers(address: Endpoint) -> bool:
        await asyncio.sleep(0.01)
        return address.port != 15000

    async with staged(metrics, answers=answers) as stage:
        await stage.ask("PUT", META, meta(15000))
        results = await asyncio.gather(*(stage.ask("PUT", META, meta(port)) for port in (15001, 15002)))
    assert sorted(status for status, _ in results) == [200, 409]


async def test_what_the_journal_refuses_has_not_happened(stage: Stage) -> None:
    await stage.ask("PUT", META, meta(15000))
    stage.full = True
    assert (await stage.ask("PUT", META, meta(15001)))[0] == 429
    assert (await stage.ask("DELETE", META))[0] == 429
    assert await stage.ask("GET", META) == (200, meta(15000).decode())
    stage.full = False
    assert await stage.ask("PUT", META, meta(15001)) == (200, "metadata updated")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
async def test_an_address_that_no_peer_can_use_is_refused(stage: Stage, host: str) -> None:
    status, text = await stage.ask("PUT", META, meta(host=host))
    assert (status, json.loads(text)["error"]["field"]) == (400, "ip_or_host_name")


async def test_a_value_that_says_no_address_is_kept_as_with_stock(stage: Stage) -> None:
    for value in (b"not even JSON", b"{}", b""):
        assert await stage.ask("PUT", META, value) == (200, "metadata updated")
        assert await stage.ask("GET", META) == (200, value.decode())


async def test_limits_are_named(metrics: Metrics) -> None:
    async with staged(metrics, KeyLimits(max_keys=1)) as stage:
        assert (await stage.ask("PUT", RAM, b"x" * ((1 << 20) + 1)))[0] == 413
        assert (await stage.ask("PUT", f"mooncake/ram/{'x' * 1025}", b"x"))[0] == 413
        assert (await stage.ask("PUT", RAM, b"x"))[0] == 200
        status, text = await stage.ask("PUT", META, meta())
        assert status == 429
        assert "max_keys" in text


async def test_ipv6_engines_are_told_apart_as_others_are(metrics: Metrics) -> None:
    async with staged(metrics, host="::1") as stage:
        assert (await stage.ask("PUT", META, meta(host="[::1]")))[0] == 200
        stage.living.add(15000)
        assert (await stage.ask("PUT", META, meta(15001, host="::1")))[0] == 409


async def test_the_witness_drops_what_is_gone_for_good_and_nothing_else(metrics: Metrics) -> None:
    async with staged(metrics, misses=2) as stage:
        for n in range(4):
            await stage.ask("PUT", f"mooncake/rpc_meta/n{n}", meta(15000 + n))
            await stage.ask("PUT", f"mooncake/ram/n{n}", b"{}")
        stage.living.update({15000, 15001, 15002})
        await stage.keyring.look()
        assert (await stage.ask("GET", "mooncake/ram/n3"))[0] == 200
        await stage.keyring.look()
        assert (await stage.ask("GET", "mooncake/ram/n3"))[0] == 404
        assert (await stage.ask("GET", "mooncake/ram/n0"))[0] == 200


async def test_the_witness_that_finds_nobody_doubts_itself(metrics: Metrics) -> None:
    async with staged(metrics, misses=1) as stage:
        for n in range(4):
            await stage.ask("PUT", f"mooncake/rpc_meta/n{n}", meta(15000 + n))
        await stage.keyring.look()
        assert [(await stage.ask("GET", f"mooncake/rpc_meta/n{n}"))[0] for n in range(4)] == [200] * 4


# --- who answers


async def test_nobody_listens_there() -> None:
    with bind("127.0.0.1", 0) as sock:
        address = bound(sock)
    assert not await mooncake.engine_answers(address)


async def test_a_process_that_accepts_and_says_nothing_is_taken_for_living() -> None:
    with bind("127.0.0.1", 0) as sock:
        assert await mooncake.engine_answers(bound(sock))


async def test_a_stranger_who_has_the_port_now_is_no_engine(registry_url: str) -> None:
    assert not await mooncake.engine_answers(Endpoint.parse(registry_url.removeprefix("http://")))


# --- the real engine


@pytest.fixture
async def url(metrics: Metrics) -> AsyncIterator[str]:
    """A metadata server that asks real engines."""
    async with staged(metrics, answers=mooncake.engine_answers) as stage:
        yield f"{stage.url}/metadata"


async def engine(name: str, url: str) -> Child:
    return await asyncio.to_thread(Child, "tests.engine.named", name, url, environ=ENVIRON)


async def test_two_engines_find_each_other_and_a_killed_one_comes_back_under_its_name(url: str) -> None:
    """The stock server refuses the second start (400, Duplicate rpc_meta key), until somebody deletes the key."""
    with await engine("writer", url) as writer, await engine("node", url) as first:
        assert (writer.hello["code"], first.hello["code"]) == (0, 0)
        assert (await writer.ask("write", peer="node", value=7))["code"] == 0
        assert (await first.ask("first"))["value"] == 7
        first.kill()
        with await engine("node", url) as heir, await engine("second writer", url) as other:
            assert (heir.hello["code"], other.hello["code"]) == (0, 0)
            wrote = await other.ask("write", peer="node", value=9)
            assert wrote == {"code": 0, "to": heir.hello["pointer"]}
            assert (await heir.ask("first"))["value"] == 9


async def test_a_second_engine_under_the_name_of_a_living_one_is_refused_as_with_stock(url: str) -> None:
    with await engine("node", url) as first, await engine("node", url) as second:
        assert (first.hello["code"], second.hello["code"]) == (0, -1)
        with await engine("writer", url) as writer:
            assert (await writer.ask("write", peer="node", value=5))["to"] == first.hello["pointer"]


async def test_an_engine_that_leaves_takes_its_keys_with_it(url: str) -> None:
    with await engine("node", url) as leaving:
        await leaving.ask("leave")
        async with aiohttp.ClientSession() as session:
            for key in (META, RAM):
                async with session.get(url, params={"key": key}) as answer:
                    assert answer.status == 404
