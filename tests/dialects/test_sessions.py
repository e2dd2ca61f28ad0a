"""The session table over real HTTP: what engines report, what operators see and lift, what watchers hear."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from pdctl.beside import beside
from pdctl.config import Settings
from pdctl.core.address import Endpoint
from pdctl.core.ejection import ProbePolicy
from pdctl.core.lives import Claim, Owner
from pdctl.core.naming import SESSION_KEY
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.engine.asking import Asking
from pdctl.errors import PdctlError
from pdctl.links import Links
from pdctl.metrics import Metrics
from pdctl.registrar import Registrar
from pdctl.server import app, bind, bound, listen, serve
from tests.dialects.test_native import Watcher
from tests.test_prober import Peer, hung, listening

QUICK = ProbePolicy(interval_s=0.02, max_interval_s=0.1, deadline_s=0.5, jitter=0.0, trial_s=60.0)


@dataclass
class Wire:
    """Requests under /v1/sessions, and the links behind them."""

    url: str
    http: aiohttp.ClientSession
    links: Links
    refusals: list[str]

    async def ask(self, method: str, path: str = "", body: object = None) -> tuple[int, Any]:
        async with self.http.request(method, f"{self.url}/v1/sessions{path}", json=body) as answer:
            assert answer.content_type == "application/json"
            return answer.status, await answer.json()

    async def told(self, method: str, path: str = "", body: object = None) -> Any:
        status, told = await self.ask(method, path, body)
        assert status == 200, told
        return told

    async def until(self, session: str, state: str) -> Any:
        async with asyncio.timeout(60):
            while (told := await self.told("GET", f"/{session}"))["state"] != state:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            return told


@asynccontextmanager
async def wired(policy: ProbePolicy = QUICK) -> AsyncIterator[Wire]:
    refusals: list[str] = []

    def refused(error: PdctlError, path: str, _: str) -> PdctlError:
        refusals.append(path)
        return error

    metrics = Metrics()
    links = Links.open(Settings(probe=policy), Asking(), metrics, refused)
    with bind("127.0.0.1", 0) as sock:
        listen(sock)
        service = serve(app([links.router], metrics, unready=list), sock, grace_s=1.0)
        async with beside(http=service, **links.loops), aiohttp.ClientSession() as http:
            yield Wire(f"http://{bound(sock)}", http, links, refusals)


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with wired() as wire:
        yield wire


async def test_a_session_that_nobody_has_heard_of_is_trusted_and_not_listed(wire: Wire) -> None:
    told = await wire.told("GET", "/10.0.0.9:16000")
    assert (told["state"], told["served"], told["sentence"]) == ("trusted", True, "trusted")
    listed = await wire.told("GET")
    assert (listed["sessions"], listed["panicking"], listed["doubting"]) == ([], [], False)


async def test_a_reported_failure_blocks_and_the_same_life_is_let_back_by_itself(wire: Wire) -> None:
    async with listening(Peer()) as peer:
        await wire.told("PUT", f"/{peer.session}", {"group": "decode-a"})
        await wire.links.prober.ask_now(peer.session)  # it has shown itself
        told = await wire.told("POST", f"/{peer.session}/failures", {"cause": "timed_out", "detail": "no ack in 5 s"})
        assert (told["state"], told["cause"], told["served"], told["group"]) == (
            "blocked",
            "timed_out",
            False,
            "decode-a",
        )
        assert "timed out (no ack in 5 s)" in told["sentence"]
        back = await wire.until(peer.session, "trial")
        assert (back["served"], back["depth"]) == (True, "identity")
        assert (await wire.told("POST", f"/{peer.session}/successes"))["state"] == "trusted"


async def test_another_process_on_that_port_is_never_let_back_until_a_link_is_made_anew(wire: Wire) -> None:
    async with listening(Peer(regions=[0x100000])) as peer:
        await wire.told("PUT", f"/{peer.session}", {"pointers": [0x100800]})
        await wire.until(peer.session, "trusted")
        peer.regions = [0x900000]
        await wire.told("POST", f"/{peer.session}/failures")
        told = await wire.until(peer.session, "dropped")
        assert told["cause"] == "peer_changed"
        assert (await wire.told("PUT", f"/{peer.session}"))["state"] == "trusted"


async def test_a_cause_that_does_not_speak_of_the_peer_blocks_nobody(wire: Wire) -> None:
    told = await wire.told("POST", "/127.0.0.1:16000/failures", {"cause": "layout", "detail": "page sizes differ"})
    assert told["state"] == "trusted"


async def test_a_hand_lifts_what_nothing_else_would(wire: Wire) -> None:
    with hung() as session:
        await wire.told("POST", f"/{session}/failures")
        assert (await wire.told("GET", "?state=blocked"))["sessions"][0]["session"] == session
        assert (await wire.told("DELETE", f"/{session}"))["state"] == "trusted"
        assert (await wire.told("GET", "?state=blocked"))["sessions"] == []


async def test_many_sessions_are_told_page_by_page(wire: Wire) -> None:
    names = [f"10.0.0.{n}:16000" for n in range(10, 17)]
    for name in names:
        await wire.told("PUT", f"/{name}", {"group": "odd" if int(name.split(".")[3][:2]) % 2 else "even"})
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = await wire.told("GET", f"?limit=2&group=even&after={after}")
        assert len(page["sessions"]) <= 2
        seen += [row["session"] for row in page["sessions"]]
        after = page["next"]
    assert seen == names[::2]
    assert (await wire.ask("GET", "?limit=0"))[0] == 422


async def test_asking_now_says_what_came_of_it(wire: Wire) -> None:
    async with listening(Peer()) as peer:
        told = await wire.told("POST", f"/{peer.session}/probe")
        assert (told["works"], told["depth"], told["cause"]) == (True, "identity", None)
    told = await wire.told("POST", f"/{peer.session}/probe")
    assert (told["works"], told["depth"], told["cause"]) == (False, None, "refused")
    with hung() as session:
        told = await wire.told("POST", f"/{session}/probe")
        assert (told["works"], told["cause"]) == (False, "timed_out")
        assert told["seconds"] < 5


async def test_a_group_that_is_mostly_blocked_is_served_and_says_so(wire: Wire) -> None:
    with hung() as a, hung() as b, hung() as c:
        for session in (a, b, c):
            await wire.told("PUT", f"/{session}", {"group": "rack"})
        for session in (a, b):
            told = await wire.told("POST", f"/{session}/failures")
        assert (told["state"], told["served"]) == ("blocked", True)
        assert (await wire.told("GET"))["panicking"] == ["rack"]


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("PUT", "/127.0.0.1:16000", {"gruop": "x"}, "gruop"),
        ("PUT", "/127.0.0.1:16000", {"pointers": [0]}, "pointers"),
        ("PUT", "/127.0.0.1:16000", {"group": "\n"}, "group"),
        ("POST", "/127.0.0.1:16000/failures", {"cause": "bad luck"}, "cause"),
        ("POST", "/127.0.0.1:16000/failures", {"detail": ""}, "detail"),
        ("POST", "/127.0.0.1:16000/failures", {"detail": "x" * 501}, "detail"),
        ("DELETE", "/a%20b", None, "session"),
        ("GET", f"/{'x' * 300}", None, "session"),
        ("POST", "/127.0.0.1:16000/failures", [], "body"),
    ],
)
async def test_what_is_wrong_is_refused_by_name_and_changes_nothing(
    wire: Wire, method: str, path: str, body: object, field: str
) -> None:
    status, told = await wire.ask(method, path, body)
    assert (status, told["error"]["field"].split(".")[0]) == (400, field)
    assert told["error"]["fix"]
    assert len(wire.refusals) == 1
    assert (await wire.told("GET"))["sessions"] == []


async def test_a_body_over_the_limit_is_refused(wire: Wire) -> None:
    status, told = await wire.ask("POST", "/127.0.0.1:16000/failures", {"detail": "x" * 70_000})
    assert (status, "limit" in told["error"]["message"]) == (413, True)


async def test_watchers_hear_of_a_failure_and_of_the_recovery_and_resume_without_a_gap(wire: Wire) -> None:
    async with listening(Peer()) as peer:
        await wire.links.prober.ask_now(peer.session)
        await wire.told("PUT", f"/{peer.session}")
        await wire.links.prober.ask_now(peer.session)
        async with wire.http.get(f"{wire.url}/v1/sessions/watch") as stream:
            watcher = Watcher(stream)
            assert (await watcher.next("session"))["session"] == peer.session
            await watcher.next("synced")
            await wire.told("POST", f"/{peer.session}/failures", {"detail": "reset"})
            told = await watcher.next("change")
            assert (told["kind"], told["detail"], told["session"]["session"]) == ("blocked", "reset", peer.session)
        await wire.until(peer.session, "trial")
        async with wire.http.get(f"{wire.url}/v1/sessions/watch?since={watcher.cursor}") as stream:
            assert (await Watcher(stream).next("change", "reset"))["kind"] == "recovered"


async def test_a_cursor_that_is_none_is_refused(wire: Wire) -> None:
    status, told = await wire.ask("GET", "/watch?since=yesterday")
    assert (status, told["error"]["field"]) == (400, "since")


async def test_the_schema_has_every_path(wire: Wire) -> None:
    async with wire.http.get(f"{wire.url}/openapi.json") as answer:
        paths = json.loads(await answer.text())["paths"]
    assert set(paths["/v1/sessions/{session}"]) == {"get", "put", "delete"}
    assert {f"/v1/sessions/{{session}}/{what}" for what in ("failures", "successes", "probe")} <= set(paths)


# What the registry knows

SHAPE = Shape(attn_tp_size=1, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype=None)


def claim(port: int, session: str) -> Claim:
    announcement = Announcement(Seat(0, 0, 0, 0), SHAPE, Endpoint("127.0.0.1", port))
    return Claim("d", announcement, Owner("127.0.0.1"), "decode", metadata={SESSION_KEY: session}, ttl_s=10.0)


async def test_a_rank_that_another_has_replaced_takes_its_session_with_it(wire: Wire, registrar: Registrar) -> None:
    registrar.herald.subscribe(wire.links.heard)
    await registrar.register(claim(40000, "127.0.0.1:16000"))
    await registrar.register(claim(40001, "127.0.0.1:16001"))
    old, new = [await wire.told("GET", f"/127.0.0.1:{port}") for port in (16000, 16001)]
    assert (old["state"], new["state"], new["group"]) == ("dropped", "trusted", "d")
    assert "epoch 2 holds its seat" in old["detail"]


async def test_a_new_life_under_the_same_session_is_trusted_as_a_new_life(wire: Wire, registrar: Registrar) -> None:
    registrar.herald.subscribe(wire.links.heard)
    await registrar.register(claim(40000, "127.0.0.1:16000"))
    await wire.told("POST", "/127.0.0.1:16000/failures")
    await registrar.register(claim(40001, "127.0.0.1:16000"))
    assert (await wire.told("GET", "/127.0.0.1:16000"))["state"] == "trusted"


async def test_a_rank_that_says_goodbye_takes_its_session_with_it(wire: Wire, registrar: Registrar) -> None:
    registrar.herald.subscribe(wire.links.heard)
    life = await registrar.register(claim(40000, "127.0.0.1:16000"))
    await registrar.leave("d", life.seat, life.epoch, Owner("127.0.0.1"))
    assert (await wire.told("GET", "/127.0.0.1:16000"))["state"] == "dropped"


async def test_what_is_no_session_in_a_lease_is_nobodys(wire: Wire, registrar: Registrar) -> None:
    registrar.herald.subscribe(wire.links.heard)
    await registrar.register(claim(40000, "not a session"))
    assert (await wire.told("GET"))["sessions"] == []
