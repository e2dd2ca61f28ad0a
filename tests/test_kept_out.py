"""Whoever is kept out of a real registry is an event there: by its door, its turnstile, another's key, a full table."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp

from pdctl.config import Settings
from pdctl.core.admission import AdmissionPolicy
from pdctl.core.findings import Culprit, Scope
from pdctl.credentials import AccessSettings, Credentials
from pdctl.explaining import why
from pdctl.sections import NodeSettings, ServeSettings
from pdctl.serving import sidecar
from tests.dialects.test_native import body

RANK = "/v1/instances/short/ranks/tp0"
GOOD, BAD = "a" * 20, "not-the-token-that-it-should-be"


class Caller:
    """Asks from an address of its own."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url, self._http = url, http

    async def ask(self, method: str, path: str, token: str = "", **more: Any) -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self._http.request(method, self.url + path, headers=headers, **more) as answer:
            await answer.read()
            return answer.status

    async def events(self, token: str = "", **wanted: str) -> list[dict[str, Any]]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self._http.get(f"{self.url}/v1/events", params=wanted, headers=headers) as answer:
            assert answer.status == 200
            found: list[dict[str, Any]] = (await answer.json())["events"]
            return found


@asynccontextmanager
async def calling(url: str, come_from: str = "127.0.0.1") -> AsyncIterator[Caller]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(come_from, 0))) as http:
        yield Caller(url, http)


def settings(**more: Any) -> Settings:
    return Settings(**{"serve": ServeSettings(port=0, grace_s=0.5), **more})


async def test_a_wrong_token_and_none_are_events_that_tell_no_token_and_explain_names_them(tmp_path: Path) -> None:
    tokens, own = tmp_path / "tokens", tmp_path / "own"
    tokens.write_text(f"a:{GOOD}\n")
    own.write_text(GOOD)
    async with sidecar(settings(access=AccessSettings(token_file=tokens))) as service, calling(service.url) as caller:
        for _ in range(3):
            assert await caller.ask("PUT", RANK, BAD, json=body(0, 1)) == 401
        assert await caller.ask("GET", "/v1/instances") == 401
        wrong, none = await caller.events(GOOD, kind="denied")
        assert (wrong["reason"], wrong["count"], wrong["peer"]) == ("bad_token", 3, "127.0.0.1")
        assert (wrong["instance"], wrong["rank"], wrong["offered"]) == ("short", "tp0", f"PUT {RANK}")
        assert (none["reason"], none["instance"]) == ("no_token", None)
        assert BAD not in str(await caller.events(GOOD))
        asked = Settings(node=NodeSettings(registry=service.url), client=Credentials(token_file=own))
        first, *others = (await why(asked, Scope.parse(["short"]))).findings
        assert (first.what, first.who) == (Culprit.ACCESS_REFUSED, "short/tp0")
        assert "the token is not known here" in first.why
        assert "--token-file" in first.do
        assert others == [], "that it never came is told by the same finding; that somebody looked is none"
        assert await caller.ask("PUT", RANK, GOOD, json=body(0, 1)) == 200
        told = (await why(asked, Scope.parse(["short"]))).findings
        assert Culprit.ACCESS_REFUSED not in [each.what for each in told]


async def test_who_comes_from_outside_is_an_event_and_no_more_of_them_than_may_be() -> None:
    access = AccessSettings(trust="127.0.0.1")
    async with sidecar(settings(access=access)) as service, calling(service.url) as inside:
        for number in range(2, 30):
            async with calling(service.url, f"127.0.1.{number}") as outside:
                assert await outside.ask("PUT", "/route", json={}) == 403
        told = await inside.events(kind="denied")
        assert [event["peer"] for event in told[:2]] == ["127.0.1.2", "127.0.1.3"]
        assert len(told) == 17
        assert (told[-1]["peer"], told[-1]["count"]) == (None, 12)
        assert "come from inside of them" in told[0]["sentence"]


async def test_who_has_to_come_again_is_an_event() -> None:
    slow = AdmissionPolicy(per_s=1.0, burst=1)
    async with sidecar(settings(admission=slow)) as service, calling(service.url) as caller:
        answers = [await caller.ask("PUT", f"/v1/instances/p/ranks/tp{tp}", json=body(tp, 8)) for tp in range(6)]
        assert answers.count(503) >= 3
        (event,) = await caller.events(kind="put_off")
        assert (event["peer"], event["count"]) == ("127.0.0.1", answers.count(503))
        assert "comes again by itself" in event["sentence"]


async def test_what_belongs_to_another_and_what_does_not_fit_any_more_are_events() -> None:
    few = settings(serve=ServeSettings(port=0, grace_s=0.5, max_rooms=1))
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as lives,
        closing(socket.create_server(("127.0.0.1", 0))) as other,
    ):
        async with sidecar(few) as service, calling(service.url) as caller:
            key = "/metadata?key=mooncake/rpc_meta/engine"
            at = [{"ip_or_host_name": "127.0.0.1", "rpc_port": each.getsockname()[1]} for each in (lives, other)]
            assert [await caller.ask("PUT", key, json=each) for each in at] == [200, 409]
            rooms = [{"bootstrap_room": room, "dp_rank": 0} for room in (1, 2)]
            assert [await caller.ask("POST", "/register_dp_rank", json=each) for each in rooms] == [200, 429]
            worker = {"engine_id": "e", "addr": f"tcp://127.0.0.1:{lives.getsockname()[1]}"}
            ranks = {f"{axis}_rank": 0 for axis in ("dp", "tp", "pp")}
            assert await caller.ask("POST", "/register", json=worker | ranks) == 200
            async with calling(service.url, "127.0.0.2") as stranger:
                assert await stranger.ask("DELETE", "/v1/engines/e") == 409
            told = [(event["reason"], event["peer"]) for event in await caller.events(kind="refused")]
            assert told == [("occupied", "127.0.0.1"), ("limit", "127.0.0.1"), ("occupied", "127.0.0.2")]


async def test_a_flood_of_denials_costs_events_nothing_but_a_count() -> None:
    own = settings(access=AccessSettings(trust="127.0.0.1"))
    async with sidecar(own) as at, calling(at.url) as inside, calling(at.url, "127.0.0.2") as outside:
        await asyncio.gather(*(outside.ask("GET", f"/v1/instances/{'x' * n}") for n in range(1, 300)))
        told = await inside.events(kind="denied")
        assert sum(event["count"] for event in told) == 299
        assert len(told) <= 17
