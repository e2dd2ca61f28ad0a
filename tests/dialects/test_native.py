"""pdctl's own wire over real HTTP: leases, drains, what operators see, and what watchers hear of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from pdctl.client import RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.lives import Claim, Owner
from pdctl.core.naming import SESSION_KEY
from pdctl.core.native import Registration
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.dialects.native import MISSING_SHOWN
from pdctl.errors import NotReady
from pdctl.registrar import Registrar
from tests.conftest import Clock

HERE = Owner("127.0.0.1")
ELSEWHERE = Owner("10.9.9.9")


def announced(tp: int, size: int = 2, port: int = 40000) -> Announcement:
    shape = Shape(attn_tp_size=size, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype=None)
    return Announcement(Seat(0, 0, tp, 0), shape, Endpoint("fd00::7", port + tp))


def claim(tp: int, size: int = 2, owner: Owner = HERE, ttl_s: float | None = None, port: int = 40000) -> Claim:
    return Claim("default", announced(tp, size, port), owner, ttl_s=ttl_s)


def body(tp: int = 0, size: int = 2, ttl_s: float | None = 10.0, port: int = 40000, **more: Any) -> dict[str, Any]:
    return Registration.of(announced(tp, size, port), ttl_s).to_body() | more


class Wire:
    """Requests under /v1; what is answered is (status, body)."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def ask(self, method: str, path: str, body: object = None, **more: Any) -> tuple[int, Any]:
        async with self._session.request(method, f"{self._url}/v1{path}", json=body, **more) as answer:
            assert answer.content_type == "application/json"
            return answer.status, await answer.json()

    async def get(self, path: str) -> Any:
        status, told = await self.ask("GET", path)
        assert status == 200, told
        return told

    async def register(self, tp: int = 0, **more: Any) -> dict[str, Any]:
        status, told = await self.ask("PUT", f"/instances/default/ranks/tp{tp}", body(tp, **more))
        assert status == 200, told
        assert isinstance(told, dict)
        return told

    @asynccontextmanager
    async def watch(self, since: str = "") -> AsyncIterator[Watcher]:
        params = {"since": since} if since else None
        async with self._session.get(f"{self._url}/v1/watch", params=params) as answer:
            assert answer.status == 200, await answer.text()
            yield Watcher(answer)


class Watcher:
    """What a stream says, event by event."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._lines = answer.content
        self.cursor = ""

    async def next(self, *kinds: str) -> dict[str, Any]:
        """The data of the next event of one of `kinds`."""
        kind = ""
        async with asyncio.timeout(60):
            async for line in self._lines:
                name, _, value = line.decode().strip().partition(": ")
                if name == "event":
                    kind = value
                if name == "id":
                    self.cursor = value
                if name == "data" and kind in kinds:
                    told = json.loads(value)
                    assert isinstance(told, dict)
                    return told
        raise AssertionError("the stream has ended")


@pytest.fixture
async def wire(registry_url: str) -> AsyncIterator[Wire]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60.0)) as session:
        yield Wire(registry_url, session)


# What operators see


async def test_an_empty_registry_lists_nothing_and_knows_nobody(wire: Wire) -> None:
    assert (await wire.get("/instances"))["instances"] == []
    status, told = await wire.ask("GET", "/instances/default")
    assert status == 404
    assert told["error"]["message"].startswith("no rank of 'default' has registered yet")


async def test_the_missing_seat_and_the_age_of_the_others_are_shown(
    wire: Wire, registrar: Registrar, clock: Clock
) -> None:
    await registrar.register(claim(1))
    clock.forward(2.5)
    counts = {"name": "default", "role": "prefill", "ready": False, "seats": 2, "alive": 1, "missing": 1, "epoch": 1}
    summary = counts | {"incarnation": 1, "revision": 1, "draining": False, "dead": False}
    assert (await wire.get("/instances"))["instances"] == [summary]
    shown = await wire.get("/instances/default")
    assert {name: shown[name] for name in summary} == summary
    (held,) = shown["alive_seats"]
    assert held["seat"] == "dp0/cp0/tp1/pp0"
    assert (held["address"], held["epoch"], held["age_s"]) == ("[fd00::7]:40001", 1, 2.5)
    assert (held["standing"], held["ttl_s"]) == ("alive", None)
    assert shown["missing_seats"] == [{"seat": "dp0/cp0/tp0/pp0", "dp": 0, "cp": 0, "tp": 0, "pp": 0}]
    assert shown["shape"]["attn_tp_size"] == 2
    assert shown["health"] is None
    assert shown["forming"] is None


async def test_a_complete_instance_misses_nobody(wire: Wire, registrar: Registrar) -> None:
    for tp in (1, 0):
        await registrar.register(claim(tp))
    shown = await wire.get("/instances/default")
    assert (shown["ready"], shown["missing_seats"]) == (True, [])
    assert [seat["tp"] for seat in shown["alive_seats"]] == [0, 1]


async def test_of_very_many_missing_seats_the_first_are_listed(wire: Wire, registrar: Registrar) -> None:
    await registrar.register(claim(0, size=60_000))
    shown = await wire.get("/instances/default")
    assert shown["missing"] == 59_999
    assert len(shown["missing_seats"]) == MISSING_SHOWN


async def test_a_dead_instance_says_why(wire: Wire, registrar: Registrar) -> None:
    life = await registrar.register(claim(0, size=1))
    await registrar.witnessed("default", life.seat, life.epoch, alive=False, why="refuses connections")
    assert [each["dead"] for each in (await wire.get("/instances"))["instances"]] == [True]
    assert "refuses connections" in (await wire.get("/instances/default"))["health"]


async def test_instances_are_told_apart_by_role(wire: Wire) -> None:
    for name, role in (("p", "prefill"), ("d", "decode")):
        assert (await wire.ask("PUT", f"/instances/{name}/ranks/tp0", body(role=role)))[0] == 200
    names = [each["name"] for each in (await wire.get("/instances?role=decode"))["instances"]]
    assert names == ["d"]


async def test_a_leases_metadata_come_back_in_the_list_and_in_the_watch(wire: Wire) -> None:
    said = {SESSION_KEY: "[fd00::7]:12345", "nested": {"n": [1.5, None, "\u00e9"]}}
    async with wire.watch() as watcher:
        await watcher.next("synced")
        registered = body(size=1, role="decode", metadata=said)
        assert (await wire.ask("PUT", "/instances/d/ranks/tp0", registered))[0] == 200
        told = await watcher.next("change")
        assert (told["summary"]["role"], told["rank"]["metadata"]) == ("decode", said)
    assert [each["role"] for each in (await wire.get("/instances"))["instances"]] == ["decode"]
    assert (await wire.get("/instances/d"))["alive_seats"][0]["metadata"] == said
    async with wire.watch() as watcher:
        assert (await watcher.next("instance"))["alive_seats"][0]["metadata"] == said


async def test_a_decode_is_never_shown_as_a_prefill(wire: Wire, registry_url: str) -> None:
    """Under a name that plain requests stand for."""
    registered = body(size=1, role="decode")
    assert (await wire.ask("PUT", "/instances/default/ranks/tp0", registered))[0] == 200
    ranks = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
    async with RegistryClient(registry_url) as client:
        with pytest.raises(NotReady, match="serves as decode and prefills nothing"):
            await client.topology()
    rank = "&".join(f"{name}=0" for name in ranks)
    async with aiohttp.ClientSession() as http, http.get(f"{registry_url}/route?{rank}") as answer:
        assert answer.status == 503


async def test_the_incarnation_that_is_forming_is_shown_beside_the_served_one(wire: Wire) -> None:
    for tp in (0, 1):
        await wire.register(tp)
    await wire.register(0, size=4, port=50000)
    shown = await wire.get("/instances/default")
    assert (shown["ready"], shown["shape"]["attn_tp_size"]) == (True, 2)
    assert (shown["forming"]["shape"]["attn_tp_size"], len(shown["forming"]["missing_seats"])) == (4, 3)


async def test_an_unknown_path_of_ours_is_told_in_json(wire: Wire) -> None:
    assert await wire.ask("GET", "/nothing") == (404, {"error": {"message": "Not Found"}})


# Leases


async def test_a_lease_is_granted_renewed_and_given_back(wire: Wire) -> None:
    granted = await wire.register(labels={"zone": "a"}, metadata={"model": ["x", 1]}, prefill_http_port=30000)
    assert granted == {
        "instance": "default",
        "seat": "dp0/cp0/tp0/pp0",
        "epoch": 1,
        "ttl_s": 10.0,
        "standing": "alive",
        "revision": 1,
    }
    path = "/instances/default/ranks/dp0-cp0-tp0-pp0"
    assert await wire.ask("POST", f"{path}/renew", {"epoch": 1}) == (200, granted)
    (row,) = (await wire.get("/instances/default"))["alive_seats"]
    assert (row["labels"], row["metadata"]) == ({"zone": "a"}, {"model": ["x", 1]})
    assert (row["ttl_s"], row["prefill_http_port"]) == (10.0, 30000)
    assert (await wire.ask("DELETE", f"{path}?epoch=1"))[0] == 200
    assert (await wire.get("/instances/default"))["alive_seats"] == []


async def test_to_register_again_is_the_same_life(wire: Wire) -> None:
    assert (await wire.register())["epoch"] == (await wire.register())["epoch"] == 1


async def test_a_silent_lease_is_suspected_then_gone_and_is_told_to_register_again(
    wire: Wire, registrar: Registrar, clock: Clock
) -> None:
    await wire.register()
    clock.forward(6.0)
    assert [row["standing"] for row in (await wire.get("/instances/default"))["alive_seats"]] == ["suspect"]
    clock.forward(5.0)
    sweeping = asyncio.create_task(registrar.sweep())
    async with wire.watch() as watcher:
        while (await watcher.next("instance", "change")).get("kind") not in (None, "expired"):
            pass
    sweeping.cancel()
    status, told = await wire.ask("POST", "/instances/default/ranks/tp0/renew", {"epoch": 1})
    assert status == 404
    assert told["error"]["fix"] == "register again"


async def test_an_older_epochs_renewal_and_goodbye_are_refused(wire: Wire) -> None:
    await wire.register()
    assert (await wire.register(port=50000))["epoch"] == 2
    for method, path in (("POST", "/renew"), ("DELETE", "?epoch=1")):
        status, told = await wire.ask(method, f"/instances/default/ranks/tp0{path}", {"epoch": 1})
        assert status == 409
        assert "is held by epoch 2, got 1" in told["error"]["message"]
        assert told["error"]["fix"] == "this process was replaced; exit and let the new one serve"
    assert (await wire.get("/instances/default"))["alive"] == 1


async def test_a_seat_that_another_host_holds_and_renews_is_not_given_away(wire: Wire, registrar: Registrar) -> None:
    await registrar.register(claim(0, owner=ELSEWHERE, ttl_s=10.0))
    status, told = await wire.ask("PUT", "/instances/default/ranks/tp0", body(port=50000))
    assert status == 409
    assert "10.9.9.9" in told["error"]["message"]
    assert "127.0.0.1" in told["error"]["message"]
    for method, path in (("POST", "/renew"), ("DELETE", "?epoch=1")):
        assert (await wire.ask(method, f"/instances/default/ranks/tp0{path}", {"epoch": 1}))[0] == 409


async def test_a_rank_that_contradicts_its_instance_is_refused_with_both_values(wire: Wire) -> None:
    await wire.register(0)
    said = body(1)
    said["shape"]["page_size"] = 64
    status, told = await wire.ask("PUT", "/instances/default/ranks/tp1", said)
    assert status == 400
    assert told["error"]["field"] == "page_size"
    assert "page_size is 16 for this prefill but this rank offers 64" in told["error"]["message"]
    assert told["error"]["fix"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"port": "40000"}, "port"),
    ({"port": 0}, "port"),
    ({"port": 10**30}, "port"),
    ({"host": "0.0.0.0"}, "host"),
    ({"host": ""}, "host"),
    ({"host": "a b"}, "host"),
    ({"tll_s": 3}, "tll_s"),
    ({"ttl_s": -1}, "ttl_s"),
    ({"ttl_s": 0.0}, "ttl_s"),
    ({"role": ""}, "role"),
    ({"labels": {"a": 1}}, "labels.a"),
    ({"labels": {"": "x"}}, "labels.''"),
    ({"labels": {"a": "x\x00"}}, "labels.'a'"),
    ({"metadata": []}, "metadata"),
    ({"shape": {}}, "shape.attn_tp_size"),
    ({"prefill_http_port": 70000}, "prefill_http_port"),
]


@pytest.mark.parametrize(("more", "field"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
async def test_a_field_that_cannot_be_used_is_named_with_a_fix(wire: Wire, more: dict[str, Any], field: str) -> None:
    status, told = await wire.ask("PUT", "/instances/default/ranks/tp0", body() | more)
    assert (status, told["error"]["field"]) == (400, field), told
    assert told["error"]["message"].startswith(field)
    assert told["error"]["fix"]
    assert (await wire.get("/instances"))["instances"] == []


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("attn_tp_size", 0, "shape.attn_tp_size"),
        ("dp_size", 10**9, "shape.dp_size"),
        ("page_size", None, "shape.page_size"),
        ("kv_cache_dtype", "x" * 300, "shape.kv_cache_dtype"),
        ("dsv41_spec_layout", {"a": "\x00"}, "shape.dsv41_spec_layout"),
        ("kv_layuot", "x", "shape.kv_layuot"),
        ("follow_bootstrap_room", "yes", "shape.follow_bootstrap_room"),
    ],
)
async def test_a_shape_that_no_decode_could_read_is_refused(wire: Wire, name: str, value: object, field: str) -> None:
    said = body()
    said["shape"][name] = value
    status, told = await wire.ask("PUT", "/instances/default/ranks/tp0", said)
    assert (status, told["error"]["field"]) == (400, field), told


@pytest.mark.parametrize(
    "path", ["/instances/default/ranks/tp7", "/instances/default/ranks/x", "/instances/-/ranks/tp0"]
)
async def test_a_path_that_names_nothing_is_refused(wire: Wire, path: str) -> None:
    status, told = await wire.ask("PUT", path, body())
    assert status == 400
    assert told["error"]["field"] in ("seat", "instance")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff", b'{"epoch": NaN}', b'{"epoch": 1, "epochs": 2}', b"[" * 10_000]
)
async def test_a_body_that_is_none_is_refused(registry_url: str, raw: bytes) -> None:
    url = f"{registry_url}/v1/instances/default/ranks/tp0/renew"
    async with aiohttp.ClientSession() as session, session.post(url, data=raw) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["field"]


async def test_a_body_over_the_limit_is_refused(wire: Wire) -> None:
    status, told = await wire.ask("PUT", "/instances/default/ranks/tp0", body(metadata={"x": "y" * (1 << 18)}))
    assert status == 413
    assert "limit" in told["error"]["message"]


async def test_metadata_over_the_registrys_limit_is_refused_by_its_name(wire: Wire) -> None:
    status, told = await wire.ask("PUT", "/instances/default/ranks/tp0", body(metadata={"x": "y" * 20_000}))
    assert status == 413
    assert "max_metadata_nbytes" in told["error"]["message"]


# Drains


async def test_a_draining_instance_is_listed_as_such_and_is_gone_when_its_rooms_are(wire: Wire) -> None:
    for tp in (0, 1):
        await wire.register(tp)
    assert (await wire.ask("POST", "/instances/default/drain", {"grace_s": 60}))[0] == 200
    shown = await wire.get("/instances/default")
    assert (shown["draining"], shown["ready"]) == (True, True)
    assert [row["standing"] for row in shown["alive_seats"]] == ["draining", "draining"]
    for tp in (0, 1):
        _, told = await wire.ask("POST", f"/instances/default/ranks/tp{tp}/renew", {"epoch": tp + 1, "rooms": 2})
        assert told["standing"] == "draining"
    for tp in (0, 1):
        await wire.ask("POST", f"/instances/default/ranks/tp{tp}/renew", {"epoch": tp + 1, "rooms": 0})
    assert (await wire.get("/instances/default"))["alive"] == 0
    status, told = await wire.ask("POST", "/instances/default/ranks/tp0/renew", {"epoch": 1})
    assert (status, "drained" in told["error"]["message"]) == (409, True)


async def test_one_rank_drains_with_the_grace_that_is_usual(wire: Wire) -> None:
    await wire.register(1)
    status, told = await wire.ask("POST", "/instances/default/ranks/tp1/drain")
    assert (status, told["grace_s"]) == (200, 300.0)


@pytest.mark.parametrize("path", ["/instances/default/drain", "/instances/default/ranks/tp0/drain"])
async def test_nobody_cannot_be_drained(wire: Wire, path: str) -> None:
    assert (await wire.ask("POST", path))[0] == 404


@pytest.mark.parametrize("grace_s", [-1, 1e12], ids=["before now", "for ever"])
async def test_a_grace_that_cannot_be_is_refused(wire: Wire, grace_s: float) -> None:
    await wire.register()
    status, told = await wire.ask("POST", "/instances/default/drain", {"grace_s": grace_s})
    assert (status, told["error"]["field"]) == (400, "grace_s")


# Watching


async def test_a_watcher_hears_what_each_command_changed(wire: Wire) -> None:
    async with wire.watch() as watcher:
        assert await watcher.next("synced") == {"revision": 0}
        await wire.register(0, size=1, labels={"zone": "a"})
        seated = await watcher.next("change")
        assert (seated["kind"], seated["gone"], seated["instance"]) == ("seated", [], "default")
        assert seated["rank"]["labels"] == {"zone": "a"}
        assert seated["shape"]["attn_tp_size"] == 1
        assert seated["summary"]["ready"] is True
        assert (await watcher.next("change"))["kind"] == "completed"
        await wire.register(0, size=1, port=50000)
        replaced = await watcher.next("change")
        assert (replaced["kind"], replaced["gone"], replaced["rank"]["epoch"]) == ("replaced", [1], 2)
        await wire.ask("POST", "/instances/default/drain")
        draining = await watcher.next("change")
        while draining["kind"] == "completed":
            draining = await watcher.next("change")
        assert (draining["rank"]["standing"], draining["summary"]["draining"]) == ("draining", True)
        await wire.ask("DELETE", "/instances/default/ranks/tp0?epoch=2")
        left = await watcher.next("change")
        assert (left["kind"], left["gone"], left["rank"]) == ("left", [2], None)


async def test_a_watcher_is_told_of_a_silent_lease_when_it_is_noticed_and_not_before(wire: Wire, clock: Clock) -> None:
    """Otherwise it would never hear that the lease was renewed in time after all: nothing has changed by that."""
    await wire.register()
    clock.forward(6.0)
    async with wire.watch() as watcher:
        assert (await watcher.next("instance"))["alive_seats"][0]["standing"] == "alive"


async def test_a_list_gives_the_cursor_from_which_a_watch_goes_on(wire: Wire) -> None:
    await wire.register(0)
    cursor = (await wire.get("/instances"))["cursor"]
    await wire.register(1)
    async with wire.watch(cursor) as watcher:
        told = await watcher.next("change", "reset")
        assert (told["kind"], told["rank"]["tp"]) == ("seated", 1)


async def test_what_is_listed_and_what_is_heard_come_to_the_same(wire: Wire) -> None:
    """Whoever applies the events by their rules knows the rows that GET shows."""
    rows: dict[int, dict[str, Any]] = {}
    async with wire.watch() as watcher:
        await watcher.next("synced")
        for tp in (0, 1):
            await wire.register(tp)
        for tp in range(4):
            last = await wire.register(tp, size=4, port=50000)
        heard = 0
        while heard < last["revision"]:
            told = await watcher.next("change")
            heard = told["revision"]
            if told["rank"]:
                rows[told["rank"]["epoch"]] = told["rank"]
            for epoch in told["gone"]:
                rows.pop(epoch, None)
    shown = await wire.get("/instances/default")
    of_now = ("age_s", "registered_from")
    kept = [{name: value for name, value in row.items() if name not in of_now} for row in shown["alive_seats"]]
    assert sorted(rows.values(), key=lambda row: row["tp"]) == kept
    assert (shown["ready"], len(kept)) == (True, 4)


async def test_a_cursor_that_is_none_is_refused(wire: Wire) -> None:
    status, told = await wire.ask("GET", "/watch?since=soon")
    assert (status, told["error"]["field"]) == (400, "since")


async def test_the_openapi_tells_of_bodies_and_failures(registry_url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{registry_url}/openapi.json") as answer:
        paths = (await answer.json())["paths"]
    put = paths["/v1/instances/{instance}/ranks/{seat}"]["put"]
    schema = put["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["host", "port", "shape"]
    assert "attn_tp_size" in schema["properties"]["shape"]["properties"]
    assert {"200", "400", "409", "413", "429", "503"} <= set(put["responses"])
