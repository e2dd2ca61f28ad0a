"""The fleet over real HTTP: what ranks tell of themselves, what is shown of it, and what has happened."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pdctl.beside import beside
from pdctl.config import Settings
from pdctl.core.capacity import ReportLimits
from pdctl.core.feed import WatchLimits
from pdctl.core.latest import Latest
from pdctl.core.naming import SESSION_KEY
from pdctl.credentials import AccessSettings
from pdctl.dialects.board import SHARE, Board
from pdctl.dialects.overview import BODY_LIMIT
from pdctl.errors import LimitReached
from pdctl.looking import Looking
from pdctl.lookout import Lookout
from pdctl.metrics import Metrics
from pdctl.registrar import Registrar
from pdctl.sections import ServeSettings
from pdctl.serving import sidecar
from tests.conftest import Clock
from tests.dialects.test_native import Wire, body, claim

RANK = "/instances/default/ranks/tp0"


def said(**more: Any) -> dict[str, Any]:
    return {"role": "prefill", "session": "10.0.0.7:15001"} | more


def link(session: str, state: str = "blocked", **more: Any) -> dict[str, Any]:
    return {"session": session, "state": state, "cause": "timed_out", "sentence": "no answer", "since_s": 1.0} | more


@pytest.fixture
async def wire(registry_url: str) -> AsyncIterator[Wire]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60.0)) as session:
        yield Wire(registry_url, session)


async def test_an_empty_registry_says_so(wire: Wire) -> None:
    told = await wire.get("/overview")
    assert (told["instances"], told["reports"], told["sessions"]) == ([], [], [])
    assert told["revision"] == 0
    assert told["reports_from"] == "here"
    assert told["events"] == {"next": 1, "oldest": 1}
    assert told["service"]["journal"] == "memory"
    assert told["service"]["counts"] == {"instances": 0, "ready": 0, "seats": 0, "alive": 0, "rooms": 0}


async def test_what_a_rank_reports_is_shown_with_its_age_until_it_expires(wire: Wire, clock: Clock) -> None:
    granted = await wire.register()
    status, told = await wire.ask("PUT", f"{RANK}/report", said(epoch=granted["epoch"], bytes=7, links=[link("a:1")]))
    assert (status, told) == (200, {"again_s": 5.0})
    clock.forward(2.0)
    overview = await wire.get("/overview")
    (report,) = overview["reports"]
    assert (report["instance"], report["seat"], report["age_s"], report["bytes"]) == ("default", "tp0", 2.0, 7)
    assert report["links"] == [link("a:1", again_in_s=None)]
    (instance,) = overview["instances"]
    assert instance == await wire.get("/instances/default")


async def test_a_report_for_nobody_is_refused(wire: Wire) -> None:
    status, told = await wire.ask("PUT", f"{RANK}/report", said())
    assert status == 404
    assert "register first" in told["error"]["message"]
    granted = await wire.register()
    status, _ = await wire.ask("PUT", "/instances/default/ranks/tp1/report", said())
    assert status == 404
    await wire.register(port=41000)
    status, told = await wire.ask("PUT", f"{RANK}/report", said(epoch=granted["epoch"]))
    assert status == 409, told


async def test_a_report_goes_with_its_life(wire: Wire) -> None:
    await wire.register()
    await wire.ask("PUT", f"{RANK}/report", said())
    await wire.register(port=41000)
    assert (await wire.get("/overview"))["reports"] == []


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("role", {"role": "not a name"}),
        ("colour", {"colour": "red"}),
        ("bytes", {"bytes": -1}),
        ("bytes", {"bytes": "7"}),
        ("links", {"links": [link(f"a:{n}") for n in range(4097)]}),
        ("links.sentence", {"links": [link("a:1", sentence="two\nlines")]}),
        ("links.since_s", {"links": [link("a:1", since_s=-1.0)]}),
        ("rooms", {"rooms": {"nobody": {}}}),
        ("rooms.sender", {"rooms": {"sender": {"success": 1}}}),
        ("unready", {"unready": [""]}),
    ],
)
async def test_what_cannot_be_used_is_named(wire: Wire, field: str, wrong: dict[str, Any]) -> None:
    await wire.register()
    status, told = await wire.ask("PUT", f"{RANK}/report", said(**wrong))
    assert status == 400
    assert told["error"]["field"] == field
    assert (await wire.get("/overview"))["reports"] == []


# What has happened


async def events(wire: Wire, **asked: object) -> list[dict[str, Any]]:
    query = "&".join(f"{name}={value}" for name, value in asked.items())
    found = (await wire.get(f"/events?{query}"))["events"]
    assert isinstance(found, list)
    return found


async def test_lives_that_come_and_go_are_events(wire: Wire) -> None:
    granted = await wire.register()
    await wire.ask("DELETE", f"{RANK}?epoch={granted['epoch']}")
    first, last = await events(wire)
    assert (first["kind"], first["instance"], first["rank"], first["id"]) == ("seated", "default", "tp0", 1)
    assert first["peer"] == "[fd00::7]:40000"
    assert first["at"].endswith("Z")
    assert (last["kind"], last["sentence"]) == ("left", "default tp0: rank has left (said goodbye)")
    assert await events(wire, since=2) == [last]
    assert await events(wire, kind="seated") == [first]
    assert await events(wire, instance="another") == []
    assert await events(wire, since=99) == [first, last], "another registry's number: all there is"


@pytest.mark.parametrize(("ends", "told"), [("DELETE", ["left"]), ("PUT", ["replaced", "dropped"])])
async def test_a_goodbye_is_one_event_and_its_session_is_named_in_it(wire: Wire, ends: str, told: list[str]) -> None:
    session = "10.0.0.7:15001"
    granted = await wire.register(metadata={SESSION_KEY: session})
    (row,) = (await wire.get("/overview"))["sessions"]
    assert row["session"] == session
    if ends == "DELETE":
        await wire.ask("DELETE", f"{RANK}?epoch={granted['epoch']}")
    else:  # another process in its seat: that the session of the first one is out is news
        await wire.register(port=41000)
    after = await events(wire, since=2)
    assert sorted(event["kind"] for event in after) == sorted(told)
    assert [event["session"] for event in after if event["kind"] in ("left", "dropped")] == [session]
    rows = (await wire.get("/overview"))["sessions"]
    assert [row["state"] for row in rows] == ["dropped"], "it is dropped all the same"


async def test_a_crowd_that_comes_at_once_is_one_event(wire: Wire, registrar: Registrar) -> None:
    await asyncio.gather(*(registrar.register(claim(tp, size=40)) for tp in range(40)))
    seated = await events(wire, kind="seated")
    assert sum(event["count"] for event in seated) == 40
    assert len(seated) <= 2
    assert seated[-1]["sentence"].endswith("seats of default: seat taken")


async def test_a_refused_claim_is_one_event_however_often_it_is_tried(wire: Wire, clock: Clock) -> None:
    await wire.register(tp=0)
    for _ in range(3):
        status, _ = await wire.ask("PUT", "/instances/default/ranks/tp1", body(1, 4))
        assert status == 400
    (event,) = await events(wire, kind="refused")
    assert (event["count"], event["instance"], event["rank"], event["peer"]) == (3, "default", "tp1", "127.0.0.1")
    assert (event["reason"], event["field"]) == ("contradiction", "attn_tp_size")
    assert (event["held"], event["offered"]) == ("2", "4")
    assert "start every rank with the same" in event["sentence"]
    clock.forward(10.0)
    await wire.ask("PUT", "/instances/default/ranks/tp1", body(1, 4))
    assert len(await events(wire, kind="refused")) == 2


async def test_a_refusal_on_the_plain_paths_names_the_instance(wire: Wire, registry_url: str) -> None:
    async with aiohttp.ClientSession() as session, session.put(f"{registry_url}/route", json={"rank_ip": 7}) as answer:
        assert answer.status == 400
    (event,) = await events(wire, kind="refused")
    assert (event["instance"], event["reason"]) == ("default", "malformed")


async def test_what_a_rank_sees_of_its_peers_is_told_when_it_turns(wire: Wire) -> None:
    await wire.register()
    for links in (
        [link("a:1", "trusted"), link("b:1", "trusted")],
        [link("a:1"), link("b:1", "trusted")],
        [link("a:1"), link("b:1", "dropped", cause="peer_changed")],
        [link("a:1", "trial"), link("b:1", "dropped")],
        [link("a:1", "trusted")],
    ):
        await wire.ask("PUT", f"{RANK}/report", said(links=links))
    told = [(e["kind"], e["session"], e["rank"]) for e in await events(wire, since=2)]
    assert told == [
        ("ejected", "a:1", "tp0"),
        ("dropped", "b:1", "tp0"),
        ("on_trial", "a:1", "tp0"),
        ("readmitted", "a:1", "tp0"),
        ("readmitted", "b:1", "tp0"),
    ]
    (event,) = await events(wire, kind="ejected")
    assert event["cause"] == "timed_out"
    assert event["sentence"].startswith("default tp0 sees session a:1 ejected")


async def test_rooms_that_fail_are_told_once_and_old_ones_not_at_all(wire: Wire) -> None:
    def failed(*rooms: int, age_s: float = 1.0) -> list[dict[str, Any]]:
        row = {"side": "sender", "age_s": age_s, "seconds": 1.5, "cause": "timed_out", "sentence": "it took long"}
        return [row | {"room": room, "peer": "10.0.0.9:5000"} for room in rooms]

    await wire.register()
    for rooms, total in ((failed(1, age_s=100.0), 1), (failed(1, 2), 2), (failed(1, 2), 2), (failed(3, 4, 5), 70)):
        report = said(failed=rooms, ended={"success": 5, "failed": total})
        status, _ = await wire.ask("PUT", f"{RANK}/report", report)
        assert status == 200
    told = await events(wire, kind="room_failed")
    assert [(e["room"], e["count"]) for e in told] == [(2, 1), (3, 1), (4, 1), (5, 1), (None, 65)]
    assert (told[0]["peer"], told[0]["cause"]) == ("10.0.0.9:5000", "timed_out")


async def test_a_rank_that_stops_telling_is_lost_to_the_lookout_and_an_event(
    wire: Wire, looking: Looking, clock: Clock
) -> None:
    await wire.register(ttl_s=None)
    await wire.ask("PUT", f"{RANK}/report", said())
    clock.forward(14.9)
    looking.lookout.tick()
    assert len((await wire.get("/overview"))["reports"]) == 1
    clock.forward(0.2)
    looking.lookout.tick()
    assert (await wire.get("/overview"))["reports"] == []
    (event,) = await events(wire, kind="report_lost")
    assert (event["instance"], event["rank"]) == ("default", "tp0")


async def test_what_the_services_own_table_decides_is_told(wire: Wire) -> None:
    await wire.ask("PUT", "/sessions/10.0.0.9:5000", {})
    await wire.ask("POST", "/sessions/10.0.0.9:5000/failures", {"cause": "refused", "detail": "nobody listens"})
    (event,) = await events(wire)
    assert (event["kind"], event["session"], event["cause"]) == ("ejected", "10.0.0.9:5000", "refused")
    (row,) = (await wire.get("/overview"))["sessions"]
    assert (row["session"], row["state"]) == ("10.0.0.9:5000", "blocked")
    await wire.ask("DELETE", "/sessions/10.0.0.9:5000")
    assert (await events(wire))[-1]["kind"] == "readmitted"


# Watching


class Reader:
    """A stream of the overview, event by event."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._lines = answer.content

    async def next(self, *kinds: str) -> tuple[str, Any]:
        kind = ""
        async with asyncio.timeout(60):
            async for line in self._lines:
                name, _, value = line.decode().strip().partition(": ")
                kind = value if name == "event" else kind
                if name == "data" and (not kinds or kind in kinds):
                    return kind, json.loads(value)
        raise AssertionError("the stream has ended")


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[Reader]:
    session = aiohttp.ClientSession(read_bufsize=1 << 20)
    async with session, session.get(f"{url}/v1/overview/watch") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        yield Reader(answer)


async def test_a_watcher_is_told_everything_and_then_what_changes(wire: Wire, registry_url: str) -> None:
    granted = await wire.register()
    async with watching(registry_url) as reader:
        kind, first = await reader.next()
        assert kind == "overview"
        assert [each["name"] for each in first["instances"]] == ["default"]
        await wire.ask("PUT", f"{RANK}/report", said(bytes=1, links=[link("a:1")]))
        assert (await reader.next("report"))[1]["bytes"] == 1
        assert (await reader.next("event"))[1]["session"] == "a:1"
        await wire.ask("PUT", "/sessions/10.0.0.9:5000", {})
        await wire.ask("POST", "/sessions/10.0.0.9:5000/failures")
        assert (await reader.next("session"))[1]["state"] == "blocked"
        await wire.ask("DELETE", f"{RANK}?epoch={granted['epoch']}")
        told = dict([await reader.next("instance", "report"), await reader.next("instance", "report")])
        assert told["report"] == {"instance": "default", "seat": "tp0", "gone": True}
        assert told["instance"]["alive"] == 0


async def test_what_changes_often_is_told_four_times_a_second_at_most(wire: Wire, registry_url: str) -> None:
    await wire.register()
    async with watching(registry_url) as reader:
        await reader.next("overview")
        heard = 0
        for nbytes in range(60):
            await wire.ask("PUT", f"{RANK}/report", said(bytes=nbytes))
            await asyncio.sleep(0.01)
        last = -1
        while last < 59:
            last = (await reader.next("report"))[1]["bytes"]
            heard += 1
        assert 2 <= heard <= 30


async def test_who_is_too_far_behind_is_told_everything_again(looking: Looking, registry_url: str, wire: Wire) -> None:
    async with watching(registry_url) as reader:
        await reader.next("overview")
        for number in range(70_000):
            looking.lookout._changed("session", str(number))
        assert (await reader.next())[0] == "overview"


async def test_a_stopping_service_says_goodbye_to_watchers(looking: Looking, registry_url: str) -> None:
    async with watching(registry_url) as reader:
        async with beside(**looking.loops):
            await reader.next("overview")
            assert (await reader.next("service"))[1]["journal"] == "memory"
        assert "this registry stops" in (await reader.next("bye"))[1]["error"]["message"]


def board(metrics: Metrics, **limits: Any) -> Board:
    """One that has a single thing, of which nothing needs to be known."""

    async def whole() -> AsyncIterator[bytes]:
        yield b"{}"

    return Board(Latest(), {"thing": lambda name: b'"%d"' % name}, frozenset(), whole, metrics, WatchLimits(**limits))


async def test_a_reader_who_takes_nothing_is_cut_off(metrics: Metrics) -> None:
    own, sent = board(metrics, send_within_s=0.2), list[Any]()

    async def send(message: Any) -> None:
        if len(sent) == 3:
            await asyncio.Event().wait()
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async with asyncio.timeout(60):
        await own.response("10.0.0.9")({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
    counted = metrics.exposition()[0].decode()
    assert 'pdctl_watch_streams_ended_total{reason="stuck"} 1.0' in counted
    assert "pdctl_watch_streams_open 0.0" in counted


async def test_a_stream_that_has_nothing_to_say_says_that_it_lives(metrics: Metrics) -> None:
    told = board(metrics, heartbeat_s=0.05).response("10.0.0.9").body_iterator
    async with asyncio.timeout(60):
        async for piece in told:
            if piece == b": alive\n\n":
                break


async def test_what_takes_long_to_say_is_said_less_often(metrics: Metrics) -> None:
    own, told = board(metrics), list[float]()

    def slow(name: object) -> bytes:
        told.append(time.monotonic())
        time.sleep(0.03)
        return b"0"

    own._kinds = {"thing": slow}
    async with asyncio.timeout(60):
        async for _ in own.response("10.0.0.9").body_iterator:
            own.changed("thing", 1)
            if len(told) == 3:
                break
    assert told[2] - told[1] >= 0.03 / SHARE


async def test_more_watchers_than_may_be_are_told_so(metrics: Metrics) -> None:
    with pytest.raises(LimitReached, match="max_watchers"):
        board(metrics, max_watchers=0).response("10.0.0.9")


class House:
    """A registry that knows nobody, and whose journal can be had or not."""

    trouble: str | None = None

    def view(self, instance: str) -> None: ...


def test_a_journal_that_takes_nothing_is_an_event_and_so_is_its_return(metrics: Metrics, clock: Clock) -> None:
    house = House()
    lookout = Lookout(house, ReportLimits(), metrics, clock, clock)
    for trouble in (None, "the disk is full", "the disk is full", None, None):
        house.trouble = trouble
        lookout.tick()
    told = lookout.events.since(0, 9)[0]
    assert [event.kind for event in told] == ["journal_trouble", "journal_well"]
    assert "the disk is full" in told[0].sentence


async def test_a_report_comes_by_the_usual_way_as_well(wire: Wire, registry_url: str) -> None:
    """Its body in two pieces, for one."""
    await wire.register()

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"role":'
        await asyncio.sleep(0.05)
        yield b'"prefill","bytes":5}'

    async with aiohttp.ClientSession() as http, http.put(f"{registry_url}/v1{RANK}/report", data=pieces()) as answer:
        assert (answer.status, await answer.json()) == (200, {"again_s": 5.0})
    assert (await wire.get("/overview"))["reports"][0]["bytes"] == 5


async def test_its_schema_is_whole_in_the_openapi(registry_url: str) -> None:
    async with aiohttp.ClientSession() as http, http.get(f"{registry_url}/openapi.json") as answer:
        told = await answer.json()
    assert "#/$defs/" not in json.dumps(told)
    body = told["paths"]["/v1/instances/{instance}/ranks/{seat}/report"]["put"]["requestBody"]
    links = body["content"]["application/json"]["schema"]["properties"]["links"]
    assert links["items"]["properties"]["state"]["enum"] == ["trusted", "trial", "blocked", "dropped"]


async def test_a_report_over_the_limit_is_refused(wire: Wire, registry_url: str) -> None:
    await wire.register()
    long = BytesIO(json.dumps(said(unready=["x" * BODY_LIMIT])).encode())
    async with aiohttp.ClientSession() as http, http.put(f"{registry_url}/v1{RANK}/report", data=long) as answer:
        assert answer.status == 413


async def test_what_is_counted_of_reports(wire: Wire, metrics: Metrics) -> None:
    await wire.register()
    await wire.ask("PUT", f"{RANK}/report", said())
    await wire.ask("PUT", "/instances/nobody/ranks/tp0/report", said())
    counted = metrics.exposition()[0].decode()
    assert "pdctl_reports_taken_total 1.0" in counted
    assert "pdctl_reports_refused_total 1.0" in counted
    assert "pdctl_reports_held 1.0" in counted


async def test_a_report_needs_the_token_of_who_registered_the_rank(tmp_path: Path) -> None:
    """The whole service: its guard stands before the short way too."""
    (tmp_path / "tokens").write_text("a:aaaaaaaaaaaaaaaaaaaa\nb:bbbbbbbbbbbbbbbbbbbb\n")
    access = AccessSettings(token_file=tmp_path / "tokens")
    settings = Settings(serve=ServeSettings(port=0, grace_s=0.5), access=access)
    async with sidecar(settings) as service, aiohttp.ClientSession() as http:

        async def put(path: str, what: object, token: str) -> int:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with http.put(f"{service.url}/v1{path}", json=what, headers=headers) as answer:
                return answer.status

        assert await put(RANK, body(0, 1), "a" * 20) == 200
        assert await put(f"{RANK}/report", said(), "") == 401
        assert await put(f"{RANK}/report", said(), "b" * 20) == 409
        assert await put(f"{RANK}/report", said(), "a" * 20) == 200
        async with http.get(f"{service.url}/v1/overview") as answer:
            assert answer.status == 401
