"""The sidecar with several instances and several wires: told apart by listener and by host, kept across a restart."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pdctl import config, serving
from pdctl.errors import AddressTaken, JournalUnusable
from pdctl.metrics import Metrics
from pdctl.persistence.memory import MemoryJournal
from pdctl.server import bind, bound
from pdctl.wires import OtherWires

TOPOLOGY = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
RANK = "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0"


class Service:
    """`pdctl serve`, and one session to it. `at(name)` is the URL of a listener."""

    def __init__(self, sidecar: serving.Sidecar, session: aiohttp.ClientSession) -> None:
        self.url = sidecar.url
        self.session = session
        self._listeners = dict(sidecar.listeners)

    def at(self, name: str) -> str:
        return self._listeners[name]

    async def ask(
        self, method: str, url: str, body: object = None, host: str | None = None, **how: Any
    ) -> tuple[int, Any]:
        headers = {} if host is None else {"Host": host}
        data = None if body is None else json.dumps(body)
        async with self.session.request(method, url, data=data, headers=headers, **how) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if text[:1] in "{[" and text else text

    async def put_rank(self, url: str, port: int, host: str | None = None, size: int = 1) -> None:
        body = {
            "attn_tp_size": size, "attn_tp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dp_size": 1,
            "attn_dp_rank": 0, "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0,
            "rank_ip": "127.0.0.1", "rank_port": port, "page_size": 16, "kv_cache_dtype": "auto",
        }  # fmt: skip
        assert await self.ask("PUT", f"{url}/route", body, host) == (200, "OK")

    async def port(self, url: str, host: str | None = None) -> int | None:
        """Of the rank that answers there; None while there is none."""
        status, body = await self.ask("GET", url + RANK, host=host)
        return body["rank_port"] if status == 200 else None


@asynccontextmanager
async def service(**sections: dict[str, Any]) -> AsyncIterator[Service]:
    serve = {"port": 0, "journal": "memory:", **sections.pop("serve", {})}
    flags = {f"{section}.{name}": value for section, values in {"serve": serve, **sections}.items()
             for name, value in values.items()}  # fmt: skip
    async with serving.sidecar(config.load(flags)) as sidecar, aiohttp.ClientSession() as session:
        yield Service(sidecar, session)


async def test_each_listener_is_a_registry_of_its_own() -> None:
    """Two prefills on one stock server overwrite each other silently."""
    async with service(serve={"listen": ["a=127.0.0.1:0", "b=127.0.0.1:0"]}) as it:
        await it.put_rank(it.at("a"), 1111)
        assert (await it.port(it.at("a")), await it.port(it.at("b")), await it.port(it.url)) == (1111, None, None)
        await it.put_rank(it.at("b"), 2222, size=1)
        await it.put_rank(it.url, 3333)
        assert (await it.port(it.at("a")), await it.port(it.at("b")), await it.port(it.url)) == (1111, 2222, 3333)
        _, body = await it.ask("GET", f"{it.url}/v1/instances")
        assert sorted(each["name"] for each in body["instances"]) == ["a", "b", "default"]


async def test_a_mapped_host_names_its_instance_and_every_other_is_the_default_one() -> None:
    async with service(serve={"map_host": ["a=prefill-a.svc", "*.pdctl.svc"]}) as it:
        await it.put_rank(it.url, 1111, host="prefill-a.svc:8998")
        await it.put_rank(it.url, 2222, host="b.pdctl.svc")
        await it.put_rank(it.url, 3333)
        assert await it.port(it.url, host="PREFILL-A.svc") == 1111
        assert await it.port(it.url, host="b.pdctl.svc:1") == 2222
        for unknown in ("localhost", "node-7:8998", "c.d.pdctl.svc", "prefill-a"):
            assert await it.port(it.url, host=unknown) == 3333
        assert await it.port(it.url, host="never-seen.pdctl.svc") is None
        assert (await it.ask("GET", it.url + TOPOLOGY, host="never-seen.pdctl.svc"))[0] == 503


async def test_at_a_named_listener_the_host_header_says_nothing() -> None:
    """A client writes it; an operator wrote the listener."""
    async with service(serve={"listen": ["a=127.0.0.1:0"], "map_host": ["b=b.svc"]}) as it:
        await it.put_rank(it.at("a"), 1111, host="b.svc")
        assert await it.port(it.at("a")) == 1111
        assert await it.port(it.url, host="b.svc") is None


@pytest.mark.parametrize("where", ["[::1]:0", "0.0.0.0:0", "[::]:0"])
async def test_listeners_at_every_kind_of_address(where: str) -> None:
    async with service(serve={"listen": [f"a={where}"]}) as it:
        url = it.at("a").replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
        await it.put_rank(url, 1111)
        assert await it.port(url) == 1111
        assert await it.port(it.url) is None


async def test_rooms_are_found_at_whatever_name_they_are_asked_for() -> None:
    async with service(serve={"listen": ["a=127.0.0.1:0"]}) as it:
        announced = {"bootstrap_room": 7, "dp_rank": 3}
        assert (await it.ask("POST", f"{it.at('a')}/register_dp_rank", announced))[0] == 200
        assert await it.ask("POST", f"{it.url}/query_dp_ranks", {"bootstrap_rooms": [7]}) == (200, {"7": 3})


async def test_a_listener_that_is_taken_is_said_before_anything_serves() -> None:
    with bind("127.0.0.1", 0) as sock, pytest.raises(AddressTaken, match=str(bound(sock).port)):
        async with service(serve={"listen": [f"a={bound(sock)}"]}):
            pass


def worker(tp: int, engine: str = "p", port: int = 4000) -> dict[str, Any]:
    return {"engine_id": engine, "dp_rank": 0, "tp_rank": tp, "pp_rank": 0, "addr": f"tcp://127.0.0.1:{port + tp}"}


async def test_vllms_prefills_have_a_map_each_where_they_have_a_name_each() -> None:
    async with service(serve={"listen": ["a=127.0.0.1:0"]}, vllm={"sizes": "dp=1,tp=1,pp=1"}) as it:
        assert (await it.ask("POST", f"{it.at('a')}/register", worker(0, "one")))[0] == 200
        assert (await it.ask("POST", f"{it.url}/register", worker(0, "two", 5000)))[0] == 200
        assert [each["engine_id"] for each in (await it.ask("GET", f"{it.at('a')}/query"))[1].values()] == ["one"]
        for path, engine in (("/query", "two"), ("/e/one/query", "one"), ("/e/two/query", "two")):
            status, shown = await it.ask("GET", it.url + path)
            assert (status, shown["0"]["engine_id"], len(shown)) == (200, engine, 1)


async def test_what_vllm_and_mooncake_were_promised_outlives_the_service(tmp_path: Path) -> None:
    journal = {"journal": f"sqlite:{tmp_path / 'journal'}"}
    key = {"key": "mooncake/ram/node"}
    async with service(serve=journal, vllm={"sizes": "dp=1,tp=2,pp=1"}) as it:
        for tp in (0, 1):
            await it.ask("POST", f"{it.url}/register", worker(tp))
        assert (await it.ask("PUT", f"{it.url}/metadata", {"buffers": []}, params=key))[0] == 200
        shown = await it.ask("GET", f"{it.url}/query")
    async with service(serve=journal, vllm={"sizes": "dp=1,tp=2,pp=1"}) as it:
        assert await it.ask("GET", f"{it.url}/query") == shown
        assert await it.ask("GET", f"{it.url}/metadata", params=key) == (200, {"buffers": []})
        assert (await it.ask("DELETE", f"{it.url}/metadata", params=key))[0] == 200
        assert (await it.ask("DELETE", f"{it.url}/v1/engines/p"))[0] == 200
    async with service(serve=journal) as it:
        assert await it.ask("GET", f"{it.url}/query") == (200, {})
        assert (await it.ask("GET", f"{it.url}/metadata", params=key))[0] == 404


async def test_rows_of_another_version_are_said_and_left_alone(metrics: Metrics) -> None:
    notes = [("vllm", "dp0/tp0/pp0/p", json.dumps({"engine_id": "p", "novelty": 1}).encode())]
    with pytest.raises(JournalUnusable, match="another version"):
        OtherWires.open(config.load(), MemoryJournal(), notes, metrics)
