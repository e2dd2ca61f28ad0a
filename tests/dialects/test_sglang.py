"""SGLang's registry over real HTTP: what stock clients rely on, and what stock got wrong.

Answer by answer against the stock server: tests/wire/test_golden_http.py. Here stand the promises behind them.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from pdctl.core.lives import Claim, Owner
from pdctl.core.registry import Registry
from pdctl.core.rooms import RoomBook
from pdctl.core.route import Announcement
from pdctl.dialects import sglang, sglang_openapi
from pdctl.metrics import Metrics
from pdctl.persistence.memory import MemoryJournal
from pdctl.registrar import Registrar
from pdctl.server import app, bind, bound, serve
from tests.conftest import Clock

JSON = dict[str, Any]
Answer = tuple[int, str]
TOPOLOGY = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"


def rank(tp: int = 0, size: int = 2, **changes: object) -> JSON:
    """What a rank PUTs; a change to `...` leaves the field out."""
    body: JSON = {
        "attn_tp_size": size, "attn_tp_rank": tp, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dp_size": 1,
        "attn_dp_rank": 0, "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0,
        "rank_ip": "10.0.0.1", "rank_port": 40000 + tp, "page_size": 16, "kv_cache_dtype": "bfloat16",
        "prefill_http_port": 30000,
    }  # fmt: skip
    return {name: value for name, value in (body | changes).items() if value is not ...}


def where(tp: int) -> str:
    return f"/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank={tp}&target_pp_rank=0"


class Client:
    """One keep-alive session, as a decode has it."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self.session = url, session

    async def ask(self, method: str, path: str, body: object = None) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = None if body is None else io.BytesIO(data)
        async with self.session.request(method, self.url + path, data=sent) as answer:
            return answer.status, await answer.text()

    async def put(self, tp: int = 0, **changes: object) -> Answer:
        return await self.ask("PUT", "/route", rank(tp, **changes))  # type: ignore[arg-type]

    async def query(self, *rooms: object) -> JSON:
        status, text = await self.ask("POST", "/query_dp_ranks", {"bootstrap_rooms": rooms})
        assert status == 200, text
        answer: JSON = json.loads(text)
        return answer


@pytest.fixture(params=["in front", "behind FastAPI"])
def service(request: pytest.FixtureRequest, registrar: Registrar, metrics: Metrics) -> ASGIApp:
    """Both ways to these paths: bare, as `pdctl serve` has them, and as FastAPI's own routes."""
    plain = sglang.Plain(registrar)
    api = app([plain.router()], metrics, unready=list)
    return sglang.in_front(plain, api) if request.param == "in front" else api


@pytest.fixture
async def registry_url(service: ASGIApp) -> AsyncIterator[str]:
    with bind("127.0.0.1", 0) as sock:
        server = asyncio.create_task(serve(service, sock, grace_s=1.0))
        yield f"http://{bound(sock)}"
        server.cancel()
        await asyncio.wait({server})


@pytest.fixture
async def client(registry_url: str) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(registry_url, session)


def waiting(workers: int) -> Answer:
    return 503, f"Prefill server not fully registered yet ({workers} workers registered)."


async def test_ready_means_distinct_seats_not_puts(client: Client) -> None:
    assert await client.ask("GET", TOPOLOGY) == waiting(0)
    for _ in range(4):
        assert await client.put(0) == (200, "OK")
    assert await client.ask("GET", TOPOLOGY) == waiting(1)
    assert await client.ask("GET", where(0)) == waiting(1)
    assert await client.put(1) == (200, "OK")
    assert (await client.ask("GET", TOPOLOGY))[0] == 200
    assert json.loads((await client.ask("GET", where(1)))[1]) == {"rank_ip": "10.0.0.1", "rank_port": 40001}


async def test_a_client_that_must_wait_is_told_how_long(client: Client) -> None:
    async with client.session.get(client.url + TOPOLOGY) as answer:
        assert answer.headers["Retry-After"] == "1"


async def test_the_topology_keeps_a_large_page_size_and_null_dtype(client: Client) -> None:
    await client.put(0, size=1, page_size=2**60, kv_cache_dtype=None)
    _, text = await client.ask("GET", TOPOLOGY)
    assert (json.loads(text)["page_size"], json.loads(text)["kv_cache_dtype"]) == (2**60, None)


async def test_a_rank_that_came_back_elsewhere_is_found_there(client: Client) -> None:
    await client.put(0)
    await client.put(1)
    await client.put(1, rank_ip="fd00::7", rank_port=50000)
    assert json.loads((await client.ask("GET", where(1)))[1]) == {"rank_ip": "fd00::7", "rank_port": 50000}


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"size": 4}, ["attn_tp_size", "2", "4"]),
        ({"attn_dp_size": 2}, ["dp_size", "1", "2"]),
        ({"page_size": 64}, ["page_size", "16", "64"]),
        ({"kv_cache_dtype": "fp8_e4m3"}, ["kv_cache_dtype", "'bfloat16'", "'fp8_e4m3'"]),
        ({"kv_layout": "flashmla"}, ["kv_layout", "None", "'flashmla'"]),
        ({"load_balance_method": "round_robin"}, ["load_balance_method", "True", "False"]),
        ({"enable_kv_cache_sharding": True}, ["enable_kv_cache_sharding", "False", "True"]),
        ({"dsv41_spec_layout": {"num_draft_tokens": 5}}, ["DeepSeek-V4.1 DSpark PD layout differs", "None", "5"]),
        ({"decode_allocation_policy": "prefill_complete"}, ["Inconsistent prefill allocation policies", "'early'"]),
    ],
    ids=lambda value: next(iter(value)),
)
async def test_a_contradicting_rank_is_refused_with_both_values(
    client: Client, changes: JSON, texts: list[str]
) -> None:
    await client.put(0)
    status, text = await client.put(1, **changes)
    assert status == 400
    assert all(each in text for each in texts), text
    assert await client.ask("GET", TOPOLOGY) == waiting(1)
    assert await client.put(1) == (200, "OK")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_port", 0),
        ("rank_ip", "0.0.0.0"),
        ("page_size", ...),
        ("kv_layout", 7),
        ("prefill_http_port", 70000),
        ("decode_allocation_policy", None),
    ],
)
async def test_a_malformed_claim_leaves_nothing_behind(client: Client, field: str, value: object) -> None:
    """Stock keeps the sizes of a row that it refused: the good ranks then never become ready."""
    status, text = await client.put(0, size=9, **{field: value})
    assert (status, text.partition(":")[0]) == (400, field)
    await client.put(0)
    await client.put(1)
    assert (await client.ask("GET", TOPOLOGY))[0] == 200


async def test_only_what_a_life_repeats_word_for_word_is_heard_without_being_written(registrar: Registrar) -> None:
    said = Claim("default", Announcement.from_body(rank(0)), Owner("10.0.0.1"))
    assert not registrar.heard(said)
    await registrar.register(said)
    assert registrar.heard(said)
    assert not registrar.heard(replace(said, owner=Owner("10.0.0.2")))
    assert not registrar.heard(replace(said, announcement=Announcement.from_body(rank(0, prefill_http_port=30001))))
    assert not registrar.heard(replace(said, announcement=Announcement.from_body(rank(1))))
    await registrar.drain("default", said.seat, grace_s=60.0)
    assert not registrar.heard(said)


async def test_texts_and_json_are_labelled_as_stock_labels_them(client: Client) -> None:
    async with client.session.put(client.url + "/route", json=rank(0, size=1)) as answer:
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    for path in (TOPOLOGY, where(0)):
        async with client.session.get(client.url + path) as answer:
            assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
            assert "Server" not in answer.headers
    async with client.session.put(client.url + "/route", data=b"{") as answer:
        assert (answer.status, answer.headers["Content-Type"]) == (400, "text/plain; charset=utf-8")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"]
)
async def test_the_content_type_does_not_matter(client: Client, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    async with client.session.put(client.url + "/route", data=json.dumps(rank(0)), headers=headers) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("method", ["POST", "DELETE", "PATCH", "OPTIONS", "TRACE", "PURGE"])
async def test_route_knows_no_other_method(client: Client, method: str) -> None:
    async with client.session.request(method, client.url + "/route") as answer:
        assert (answer.status, await answer.text()) == (405, "Method not allowed")
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"


async def test_health_answers_get_and_head(client: Client) -> None:
    assert await client.ask("GET", "/health") == (200, "OK")
    assert await client.ask("HEAD", "/health") == (200, "")


async def test_health_tells_of_an_instance_that_is_known_to_be_dead(client: Client, registrar: Registrar) -> None:
    await client.ask("PUT", "/route", rank(size=1))
    view = registrar.view("default")
    assert view is not None
    (life,) = view.lives
    await registrar.witnessed("default", life.seat, life.epoch, False, "shows no sign of life")
    status, cause = await client.ask("GET", "/health")
    assert (status, "10.0.0.1:40000 shows no sign of life" in cause) == (503, True)
    assert (await client.ask("HEAD", "/health"))[0] == 503
    assert (await client.ask("GET", "/livez"))[0] == 200
    await registrar.witnessed("default", life.seat, life.epoch, True)
    assert await client.ask("GET", "/health") == (200, "OK")


async def test_rooms_beyond_64_bits_come_back_in_decimal(client: Client) -> None:
    huge = 2**64 + 3
    await client.ask("POST", "/register_dp_rank", {"bootstrap_room": huge, "dp_rank": "3"})
    assert await client.query(huge, str(huge), 5) == {str(huge): 3}


async def test_a_question_for_100_000_rooms_is_answered(client: Client) -> None:
    """Stock refuses a body over 1 MiB, and the decode takes that for "none of them is known"."""
    await client.ask("POST", "/register_dp_rank", {"bootstrap_room": 2**62, "dp_rank": 1})
    assert await client.query(*range(2**62, 2**62 + 100_000)) == {str(2**62): 1}


@pytest.mark.parametrize(
    ("method", "path", "limit"),
    [("PUT", "/route", 1 << 20), ("POST", "/register_dp_rank", 1 << 20), ("POST", "/query_dp_ranks", 8 << 20)],
)
async def test_a_body_over_the_limit_is_413_and_the_connection_goes_on(
    client: Client, method: str, path: str, limit: int
) -> None:
    status, text = await client.ask(method, path, b" " * (limit + 1))
    assert status == 413
    assert str(limit) in text
    assert await client.ask("GET", "/health") == (200, "OK")


async def test_a_client_that_sends_all_before_it_reads_gets_the_413_and_no_reset(registry_url: str) -> None:
    def send() -> int:
        connection = http.client.HTTPConnection(registry_url.removeprefix("http://"), timeout=60)
        connection.request("PUT", "/route", body=b" " * (12 << 20))
        status = connection.getresponse().status
        connection.close()
        return status

    assert await asyncio.to_thread(send) == 413


async def test_a_body_without_a_length_is_bounded_too(client: Client) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * (1 << 16)

    async with client.session.put(client.url + "/route", data=chunks()) as answer:
        assert answer.status == 413


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/register_dp_rank", b"{", "body"),
        ("/register_dp_rank", b"\xff", "body: is not UTF-8"),
        ("/register_dp_rank", b"[" * 100_000, "body: holds a number too long or is nested"),
        ("/register_dp_rank", b'{"bootstrap_room": ' + b"9" * 5000 + b"}", "body: holds a number too long"),
        ("/register_dp_rank", b"null", "body: is null"),
        ("/register_dp_rank", {"dp_rank": 1}, "bootstrap_room: is missing"),
        ("/register_dp_rank", {"bootstrap_room": 1}, "dp_rank: is missing"),
        ("/register_dp_rank", {"bootstrap_room": 1.5, "dp_rank": 0}, "bootstrap_room: is 1.5"),
        ("/register_dp_rank", {"bootstrap_room": 2**200, "dp_rank": 0}, "bootstrap_room: is an integer of 201 bits"),
        ("/register_dp_rank", {"bootstrap_room": 1, "dp_rank": -1}, "dp_rank: is -1"),
        ("/register_dp_rank", {"bootstrap_room": 1, "dp_rank": True}, "dp_rank: is true"),
        ("/query_dp_ranks", {}, "bootstrap_rooms: is missing"),
        ("/query_dp_ranks", {"bootstrap_rooms": "77"}, "bootstrap_rooms: is no array"),
        ("/query_dp_ranks", {"bootstrap_rooms": [1, "x"]}, "bootstrap_rooms[1]: is the text 'x'"),
        ("/query_dp_ranks", {"bootstrap_rooms": [None]}, "bootstrap_rooms[0]: is null"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, bytes) else repr(value[:20]),
)
async def test_bad_room_bodies_are_400_and_name_the_field(client: Client, path: str, body: object, names: str) -> None:
    status, text = await client.ask("POST", path, body)
    assert status == 400
    assert text.startswith(names), text


@pytest.mark.parametrize("value", ["x", "1.5", "--1", "1" * 5000])
@pytest.mark.parametrize("name", ["prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank"])
async def test_a_query_that_is_no_integer_is_400_ready_or_not(client: Client, name: str, value: str) -> None:
    status, text = await client.ask("GET", TOPOLOGY.replace(f"{name}=-1", f"{name}={value}"))
    assert status == 400
    assert text.startswith(f"{name}: is the text")


async def test_an_unknown_rank_is_named_as_it_was_sent(client: Client) -> None:
    await client.put(0, size=1)
    status, text = await client.ask("GET", where(0).replace("tp_rank=0", "tp_rank=%2007"))
    assert (status, text) == (404, "Bootstrap info not found for dp_rank=0 cp_rank=0 tp_rank= 07 pp_rank=0")


async def test_a_lookup_on_an_idle_connection_is_answered_by_it(registry_url: str) -> None:
    """A decode tries once, so a connection closed under it is a failed request. Uvicorn's own limit is 5 s."""
    connection = http.client.HTTPConnection(registry_url.removeprefix("http://"), timeout=60)
    connection.connect()
    kept = connection.sock
    for pause_s in (0.0, 5.5):
        await asyncio.sleep(pause_s)
        assert await asyncio.to_thread(_health, connection) == 200
        assert connection.sock is kept
    connection.close()


def _health(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read()
    return answer.status


async def test_a_full_table_of_rooms_is_429_and_the_rest_goes_on(clock: Clock) -> None:
    registrar = Registrar(Registry(), RoomBook(limit=2), MemoryJournal(), Metrics(), clock)
    sock = bind("127.0.0.1", 0)
    server = asyncio.create_task(serve(app([sglang.router(registrar)], Metrics(), list), sock, grace_s=1.0))
    async with aiohttp.ClientSession() as session:
        client = Client(f"http://{bound(sock)}", session)
        answers = [await client.ask("POST", "/register_dp_rank", {"bootstrap_room": n, "dp_rank": 0}) for n in range(3)]
        assert [status for status, _ in answers] == [200, 200, 429]
        assert "2 rooms are held, the limit" in answers[2][1]
        assert await client.query(0, 1, 2) == {"0": 0, "1": 0}
        assert await client.put(0, size=1) == (200, "OK")
    server.cancel()
    await asyncio.wait({server})


async def test_what_is_refused_and_what_is_looked_up_is_counted(client: Client, metrics: Metrics) -> None:
    await client.put(0)
    await client.put(1, page_size=64)
    await client.ask("PUT", "/route", b"{")
    await client.ask("GET", TOPOLOGY)
    await client.query(1, 2)
    _, text = await client.ask("GET", "/metrics")
    lines = text.splitlines()
    for line in (
        'pdctl_registry_changes_total{kind="seated"} 1.0',
        'pdctl_registry_refusals_total{reason="contradiction"} 1.0',
        'pdctl_registry_refusals_total{reason="malformed"} 1.0',
        'pdctl_registry_lookups_total{result="not_ready",what="topology"} 1.0',
        'pdctl_registry_lookups_total{result="unknown",what="room"} 2.0',
        'pdctl_registry_seats{state="missing"} 1.0',
        'pdctl_registry_instances{ready="false"} 1.0',
    ):
        assert line in lines


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.integers(-2, 3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
PATHS = st.sampled_from([("PUT", "/route"), ("POST", "/register_dp_rank"), ("POST", "/query_dp_ranks")])
KEYS = st.sampled_from([*rank(), "kv_layout", "dsv41_spec_layout", "bootstrap_room", "dp_rank", "bootstrap_rooms"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=PATHS, odd=st.dictionaries(KEYS, VALUES, max_size=4), raw=st.none() | st.binary(max_size=40))
async def test_no_body_makes_an_error_of_ours(
    client: Client, asked: tuple[str, str], odd: JSON, raw: bytes | None
) -> None:
    body = {"bootstrap_room": 1, "dp_rank": 0, "bootstrap_rooms": [1]} | rank(0) | odd
    status, text = await client.ask(*asked, body if raw is None else raw)
    assert status in (200, 400), text
    topology_status, topology = await client.ask("GET", TOPOLOGY)
    assert topology_status in (200, 503), topology


def test_the_documented_requests_are_complete() -> None:
    schema = sglang_openapi.PUT_ROUTE["openapi_extra"]["requestBody"]["content"]["application/json"]
    assert set(schema["schema"]["required"]) == set(rank(prefill_http_port=...))
    assert set(schema["example"]) <= set(schema["schema"]["properties"])


async def test_the_documented_examples_are_answered_as_documented(client: Client) -> None:
    _, text = await client.ask("GET", "/openapi.json")
    paths = json.loads(text)["paths"]
    for method, path in (("put", "/route"), ("post", "/register_dp_rank"), ("post", "/query_dp_ranks")):
        operation = paths[path][method]
        example = operation["requestBody"]["content"]["application/json"]["example"]
        ((kind, documented),) = operation["responses"]["200"]["content"].items()
        status, answer = await client.ask(method.upper(), path, example)
        assert status == 200
        assert (json.loads(answer) if kind == "application/json" else answer) == documented["example"]
    documented = paths["/route"]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    assert json.loads((await client.ask("GET", where(0)))[1]) == documented
    assert (await client.ask("GET", "/docs"))[0] == 200
