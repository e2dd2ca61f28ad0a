"""A rank's reports: what real nodes tell a real registry, and that nothing which befalls a report befalls the rank."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import aiohttp
import numpy as np
import pytest
from pydantic import TypeAdapter

from pdctl.beside import beside
from pdctl.core.course import Course
from pdctl.core.course import Ended as EndedRoom
from pdctl.core.exchange import Exchange
from pdctl.core.kinds import State
from pdctl.core.native import Grant
from pdctl.core.report import MAX_LINKS, FailedRoom, LinkSeen, OpenRoom, Report, StoreSeen, Wanted
from pdctl.core.standing import Standing
from pdctl.core.transfer import Event, Phase, Quarantined, Side
from pdctl.dialects.overview import BODY_LIMIT
from pdctl.dialects.strict import as_body
from pdctl.errors import Cause, PdctlError, PutOff, RegistryRefused, RoomFailed, Unreachable
from pdctl.metrics import Metrics
from pdctl.node import DecodeNode, PrefillNode, decode_node, prefill_node
from pdctl.reporting import LEAST_S, Rank, Reporter, to_body
from pdctl.serving import sidecar
from pdctl.telling import Telling
from tests.node_rig import FIRST, SHAPE, memory_pools
from tests.patience import until
from tests.test_node import settings, until_registered

SOON_S = 60.0
NOBODY = "127.0.0.1:1"
"""No engine answers there, so that whoever is asked says so at once: a peer that lives is back before it is told of."""


# Real nodes, a real registry


class Watch:
    """What the registry shows of its fleet."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session

    async def get(self, path: str) -> Any:
        async with self._session.get(self._url + path) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def report(self, instance: str, where: Callable[[Any], bool]) -> Any:
        """The report of its one rank, as soon as `where` holds of it."""
        async with asyncio.timeout(SOON_S):
            while True:
                for found in (await self.get("/v1/overview"))["reports"]:
                    if found["instance"] == instance and where(found):
                        return found
                await asyncio.sleep(0.02)

    async def event(self, kind: str) -> Any:
        async with asyncio.timeout(SOON_S):
            while True:
                if found := (await self.get(f"/v1/events?kind={kind}"))["events"]:
                    return found[-1]
                await asyncio.sleep(0.02)


@asynccontextmanager
async def fleet() -> AsyncIterator[tuple[Watch, str, PrefillNode, DecodeNode]]:
    """A registry that a prefill and a decode are registered at; both report at every change, else after an hour."""
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(sidecar(settings()))
        usual = settings(registry.url)
        how = usual.model_copy(update={"node": replace(usual.node, report_every_s=3600.0)})
        prefill = await stack.enter_async_context(prefill_node(how, **memory_pools(), seat=FIRST, shape=SHAPE))
        opening = decode_node(how, **memory_pools(), shape=SHAPE, registry=registry.url)
        decode = await stack.enter_async_context(opening)
        await until_registered(prefill)
        await until_registered(decode)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Watch(registry.url, session), registry.url, prefill, decode


async def test_both_ranks_of_a_pair_say_who_they_are_what_they_moved_and_whom_they_trust() -> None:
    async with fleet() as (watch, registry, prefill, decode):
        first = await watch.report("default", lambda report: report["unready"] == [])
        assert (first["role"], first["seat"], first["session"]) == ("prefill", "tp0", prefill.engine.session)
        assert (await watch.report("decode", bool))["role"] == "decode"
        at = await decode.pair(registry, room=7)
        async with prefill.sender.open(7) as sending, decode.receiver.open(7, at, [5, 6], 1) as arriving:
            await sending.peers_ready()
            await sending.send([3, 4])
            await sending.finish(2)
            await arriving.arrived()
        prefill.prober.failed(NOBODY, Cause.REFUSED, "nobody listens")  # turns, so that it is told of
        sent = await watch.report("default", lambda report: any(link["cause"] for link in report["links"]))
        assert sent["ended"] == {"success": 1, "failed": 0}
        assert sent["bytes"] == 2 * 2 * 4096 + 64
        link, well = sent["links"]
        assert (link["session"], link["state"], link["cause"]) == (NOBODY, "blocked", "refused")
        assert "nobody listens" in link["sentence"]
        assert (well["session"], well["state"]) == (decode.engine.session, "trusted")


async def test_a_link_that_goes_out_and_comes_back_is_told_within_a_moment_by_who_saw_it() -> None:
    async with fleet() as (watch, _, prefill, _):
        await watch.report("default", bool)
        began = time.monotonic()
        prefill.prober.failed(NOBODY, Cause.REFUSED, "nobody listens")
        told = await watch.event("ejected")
        took_s = time.monotonic() - began
        assert (told["instance"], told["rank"], told["session"]) == ("default", "tp0", NOBODY)
        assert told["cause"] == "refused"
        prefill.prober.registered(NOBODY)
        assert (await watch.event("readmitted"))["session"] == NOBODY
        assert took_s < 60.0, "an hour is how often it reports otherwise"


async def test_a_room_that_fails_is_told_by_both_sides_with_its_cause() -> None:
    async with fleet() as (watch, registry, prefill, decode):
        at = await decode.pair(registry, room=9)
        with pytest.raises(RoomFailed):  # noqa: PT012  from whichever line it comes
            async with prefill.sender.open(9) as sending, decode.receiver.open(9, at, [5], 1) as arriving:
                await sending.peers_ready()
                opened = await asyncio.wait_for(_open_room(watch, prefill, decode), SOON_S)
                assert opened == {"waiting_for_input": 1}
                decode.receiver.gone(decode.receiver.contacts.told[0], "it is said to be")
                await arriving.arrived()
        failed = (await watch.report("decode", lambda report: bool(report["failed"])))["failed"][0]
        assert (failed["room"], failed["side"], failed["cause"]) == (9, "receiver", "peer_failed")
        assert failed["peer"] == str(at.senders[0])
        event = await watch.event("room_failed")
        assert event["room"] == 9
        report = await watch.report("default", lambda report: bool(report["failed"]))
        assert report["ended"] == {"success": 0, "failed": 1}


async def _open_room(watch: Watch, prefill: PrefillNode, decode: DecodeNode) -> dict[str, int]:
    prefill.prober.failed(NOBODY, Cause.REFUSED, "nobody listens")  # a change, so that a report goes out now
    report = await watch.report("default", lambda report: bool(report["open"]))
    assert report["open"][0]["peer"] == str(decode.receiver.reply)
    rooms = report["rooms"]["sender"]
    assert isinstance(rooms, dict)
    return rooms


async def test_a_rank_that_leaves_takes_its_report_along() -> None:
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(sidecar(settings()))
        watch = Watch(registry.url, await stack.enter_async_context(aiohttp.ClientSession()))
        async with prefill_node(settings(registry.url), **memory_pools(), seat=FIRST, shape=SHAPE):
            await watch.report("default", bool)
        assert (await watch.get("/v1/overview"))["reports"] == []
        assert (await watch.event("left"))["rank"] == "tp0"


# The loop, with a registry that does as it is told


class Link:
    """A rank that has as many links as it is told, and no rooms."""

    def __init__(self, n_links: int = 0, n_out: int = 0) -> None:
        self.open_rooms = MappingProxyType[int, Any]({})
        self.quarantine: tuple[Quarantined, ...] = ()
        self.panicking, self.doubting = ("group",), True
        self._out = {f"10.0.0.{n}:1" for n in range(n_out)}
        self._names = [f"10.1.0.{n}:1" for n in range(n_links - n_out)] + sorted(self._out)

    def sessions(self) -> list[str]:
        return self._names

    def standing(self, session: str) -> Standing:
        if session not in self._out:
            return Standing(session)
        return Standing(session, State.BLOCKED, cause=Cause.TIMED_OUT, detail="two\nlines", held_s=2.0, since_s=1.0)


class Registry:
    """Answers what it is told to, and remembers when it was asked."""

    def __init__(self, answer: PdctlError | Exception | None = None) -> None:
        self.answer, self.grant = answer, Grant("p", "tp0", 1, 10.0, "alive", 1)
        self.granted: Grant | None = self.grant
        self.again_s = 0.1
        self.asked: list[float] = []
        self.bodies: list[Any] = []

    async def tell(self, exchange: Exchange[Wanted]) -> Wanted:
        self.asked.append(time.monotonic())
        self.bodies.append(exchange.body)
        if self.answer is not None:
            raise self.answer
        return Wanted(self.again_s)


def reporter(registry: Registry, link: Link | None = None, every_s: float = 3600.0) -> Reporter:
    link = Link() if link is None else link
    rank = Rank("prefill", "/v1/instances/p/ranks/tp0", "10.0.0.1:1", Side.SENDER, link, Telling(), list, link)
    return Reporter(registry.tell, rank, lambda: registry.granted, every_s, Metrics().reports, time.monotonic)


async def test_a_rank_whose_links_turn_all_the_time_reports_four_times_a_second_at_most() -> None:
    registry = Registry()
    own = reporter(registry)
    async with beside(reports=own.run()):
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            own.changed()
            await asyncio.sleep(0.01)
    gaps = np.diff(registry.asked)
    assert 2 <= len(registry.asked) <= 6
    assert (gaps >= LEAST_S * 0.95).all()


@pytest.mark.parametrize(
    "error",
    [
        Unreachable("nobody answers"),
        PutOff("not now", status=503, text="no", retry_after_s=0.1),
        RuntimeError("a defect"),
    ],
    ids=["unreachable", "not-now", "a-defect"],
)
async def test_whatever_befalls_a_report_the_rank_goes_on_and_reports_again(error: Exception) -> None:
    registry = Registry(error)
    own = reporter(registry, every_s=0.3)
    async with beside(reports=own.run()):
        await until(lambda: len(registry.asked) >= 1)
        registry.answer = None
        own.changed()
        await until(lambda: len(registry.asked) >= 3)


@pytest.mark.parametrize("status", [404, 405, 400])
async def test_a_registry_that_takes_none_is_left_alone_until_it_grants_another_life(status: int) -> None:
    registry = Registry(RegistryRefused("no", status=status, text="404: Not Found"))
    own = reporter(registry, every_s=0.05)
    async with beside(reports=own.run()):
        await until(lambda: len(registry.asked) == 1)
        for _ in range(60):
            own.changed()
            await asyncio.sleep(0.01)
        assert len(registry.asked) == 1
        registry.granted = replace(registry.grant, epoch=2)
        await until(lambda: len(registry.asked) >= 2)


async def test_who_holds_no_lease_tells_nobody_and_who_gets_one_tells_at_once() -> None:
    registry = Registry()
    registry.granted = None
    own = reporter(registry)
    async with beside(reports=own.run()):
        await asyncio.sleep(0.6)
        assert registry.asked == []
        registry.granted = registry.grant
        await until(lambda: len(registry.asked) == 1)


async def test_a_registry_of_a_crowd_is_told_less_often_than_the_rank_would() -> None:
    registry = Registry()
    registry.again_s = 3600.0
    async with beside(reports=reporter(registry, every_s=0.05).run()):
        await asyncio.sleep(0.8)
    assert len(registry.asked) == 1


async def test_a_rank_that_is_told_to_reports_never() -> None:
    registry = Registry()
    async with beside(reports=reporter(registry, every_s=0.0).run()):
        await asyncio.sleep(0.4)
    assert registry.asked == []


async def test_links_in_trouble_are_named_however_many_there_are_and_in_words_that_a_line_bears() -> None:
    report = await reporter(Registry(), Link(n_links=5000, n_out=3)).report(1)
    assert len(report.links) == MAX_LINKS
    assert [link.state for link in report.links[:4]] == [State.BLOCKED] * 3 + [State.TRUSTED]
    assert "two lines" in report.links[0].sentence
    assert report.links[0].again_in_s == 2.0
    assert (report.doubt, report.panicking) == (True, ("group",))


async def test_a_rank_whose_every_link_is_in_trouble_can_still_say_so() -> None:
    report = await reporter(Registry(), Link(n_links=5000, n_out=5000)).report(1)
    assert len(report.links) == MAX_LINKS
    assert len(json.dumps(to_body(report))) < BODY_LIMIT / 2


async def test_the_last_rooms_that_failed_are_kept_the_newest_at_the_end() -> None:
    own = reporter(Registry())
    for room in range(70):
        course = Course(Phase.BOOTSTRAPPING, 1.0)
        course.step(Phase.FAILED, 2.5)
        ended = EndedRoom(
            Side.SENDER, room, Phase.FAILED, Event.TIMED_OUT, None, "late\n", 0, 0, ("a:1 (b:1)",), course
        )
        own._rank.telling.ended(Phase.FAILED, course, lambda ended=ended: ended)  # type: ignore[misc]
    report = await own.report(None)
    assert [room.room for room in report.failed] == list(range(6, 70))
    last = report.failed[-1]
    assert (last.cause, last.sentence, last.peer, last.seconds) == ("timed_out", "late ", "a:1", 1.5)
    assert report.ended.failed == 70


def test_what_is_written_is_what_is_read() -> None:
    report = Report(
        role="prefill",
        epoch=7,
        session="10.0.0.1:1",
        unready=("not registered",),
        links=(LinkSeen("a:1"), LinkSeen("b:1", State.BLOCKED, Cause.TIMED_OUT, "no answer", 1.0, 2.0)),
        rooms={"sender": {"transferring": 1}},
        bytes=1 << 40,
        open=(OpenRoom(1 << 64, Side.SENDER, "transferring", 1.0, None),),
        failed=(FailedRoom(3, Side.RECEIVER, 1.0, 2.0, "timed_out", "late", "a:1"),),
        panicking=("",),
        store=StoreSeen(False, "it is away"),
    )
    adapter = TypeAdapter(Report)
    body = aiohttp.JsonPayload(to_body(report))._value
    assert as_body(adapter, body) == report
    assert as_body(adapter, adapter.dump_json(report)) == report
