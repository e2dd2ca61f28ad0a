"""
Who holds a seat when several want it, told from outside: a real `pdctl serve` with its journal on disk, and clients
that come from different addresses of this host, which the registry can only take for different hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.scripted import reserve_port
from tests.service import Service, service
from tests.test_cli import pdctl

HERE, THERE = "127.0.0.1", "127.0.0.2"
TTL_S = 3.0
SLACK_S = 8.0
"""A lease that is over is seen to be within this."""
DEADLINE_S = 60.0
WHERE = "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank={}&target_pp_rank=0"
TOPOLOGY = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"

Answer = tuple[int, Any]


class Party:
    """A client that comes from one address, and advertises it."""

    def __init__(self, url: str, host: str, http: aiohttp.ClientSession) -> None:
        self.url, self.host, self.http = url, host, http

    async def claim(self, port: int, *, ttl_s: float | None = TTL_S, tp: int = 0, size: int = 1, **more: Any) -> Answer:
        """Register in `instance`, "default" unless another is given."""
        shape = {"attn_tp_size": size, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 16}
        body = {"host": self.host, "port": port, "shape": shape | {"kv_cache_dtype": "bfloat16"}, "ttl_s": ttl_s}
        return await self._ask("PUT", path(tp, more.pop("instance", "default")), json=body | more)

    async def renew(self, epoch: int, *, tp: int = 0, rooms: int | None = None) -> Answer:
        return await self._ask("POST", f"{path(tp)}/renew", json={"epoch": epoch, "rooms": rooms})

    async def leave(self, epoch: int, *, tp: int = 0) -> Answer:
        return await self._ask("DELETE", path(tp), params={"epoch": str(epoch)})

    async def drain(self, grace_s: float, *, tp: int | None = None) -> Answer:
        return await self._ask("POST", f"{path(tp)}/drain", json={"grace_s": grace_s})

    async def where(self, tp: int = 0) -> Answer:
        """As a stock decode asks."""
        return await self._ask("GET", WHERE.format(tp))

    async def topology(self) -> Answer:
        return await self._ask("GET", TOPOLOGY)

    async def _ask(self, method: str, path: str, **more: Any) -> Answer:
        async with self.http.request(method, self.url + path, **more) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text


def path(tp: int | None, instance: str = "default") -> str:
    return f"/v1/instances/{instance}" + ("" if tp is None else f"/ranks/tp{tp}")


@asynccontextmanager
async def party(url: str, host: str = HERE) -> AsyncIterator[Party]:
    connector = aiohttp.TCPConnector(local_addr=(host, 0), limit=0)
    timeout = aiohttp.ClientTimeout(total=60.0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        yield Party(url, host, http)


@asynccontextmanager
async def two_hosts(url: str) -> AsyncIterator[tuple[Party, Party]]:
    async with party(url, HERE) as one, party(url, THERE) as other:
        yield one, other


def serving(place: Path, *args: str, **more: Any) -> AbstractContextManager[Service]:
    return service(place / "log", "--journal", f"sqlite:{place / 'journal'}", *args, **more)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path, PDCTL_ADMISSION__PER_S="0") as running:  # one client here is quicker than 400 a second
        yield running
        assert running.complaints() == []


@asynccontextmanager
async def renewing(who: Party, epoch: int, ttl_s: float = TTL_S, **more: Any) -> AsyncIterator[list[Answer]]:
    """Renew every third of the lease while the block runs; what was answered."""
    answers: list[Answer] = []

    async def go_on() -> None:
        while True:
            answers.append(await who.renew(epoch, **more))
            await asyncio.sleep(ttl_s / 3)

    task = asyncio.create_task(go_on())
    try:
        yield answers
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(what: Callable[[], Awaitable[bool]], deadline_s: float = DEADLINE_S) -> float:
    """Seconds until it held."""
    began = time.monotonic()
    async with asyncio.timeout(deadline_s):
        while not await what():  # noqa: ASYNC110 - the registry is asked: nothing else tells
            await asyncio.sleep(0.01)
    return time.monotonic() - began


def granted(answer: Answer) -> int:
    """The epoch."""
    assert answer[0] == 200, answer
    return int(answer[1]["epoch"])


def message(answer: Answer) -> str:
    return str(answer[1]["error"]["message"])


# --- two that want one seat


async def test_of_two_hosts_that_claim_a_seat_at_once_one_holds_it_and_the_other_is_told_of_both(
    registry: Service,
) -> None:
    async with two_hosts(registry.url) as both:
        for number in range(20):
            instance = f"fought-{number}"
            answers = await asyncio.gather(*(who.claim(40_000, instance=instance, ttl_s=30.0) for who in both))
            assert sorted(status for status, _ in answers) == [200, 409]
            told = next(message(answer) for answer in answers if answer[0] == 409)
            assert HERE in told
            assert THERE in told


async def test_the_other_host_gets_the_seat_when_its_holder_falls_silent_and_not_before(registry: Service) -> None:
    async with two_hosts(registry.url) as (holder, rival):
        first = granted(await holder.claim(40_001))
        async with renewing(holder, first) as renewals:
            tries = [await rival.claim(40_002) for _ in range(60) if await asyncio.sleep(TTL_S / 30, True)]
        assert {status for status, _ in tries} == {409}
        assert {status for status, _ in renewals} == {200}
        assert (await holder.where())[1] == {"rank_ip": HERE, "rank_port": 40_001}

        async def wins() -> bool:
            tries.append(await rival.claim(40_002))
            return tries[-1][0] == 200

        assert await until(wins) < TTL_S + SLACK_S
        assert granted(tries[-1]) > first
        assert (await holder.renew(first))[0] == 409
        assert (await holder.where())[1] == {"rank_ip": THERE, "rank_port": 40_002}


async def test_a_restart_on_the_same_host_wins_at_once_and_its_past_is_refused_everything(registry: Service) -> None:
    async with party(registry.url) as who:
        old = granted(await who.claim(40_001, ttl_s=30.0))
        new = granted(await who.claim(40_002, ttl_s=30.0))
        assert new > old
        for late in (await who.renew(old), await who.leave(old)):
            assert late[0] == 409
            assert str(new) in message(late)
            assert str(old) in message(late)
        assert (await who.where())[1]["rank_port"] == 40_002
        assert granted(await who.renew(new)) == new


async def test_of_many_claims_at_once_the_one_with_the_highest_epoch_holds_the_seat(registry: Service) -> None:
    async with party(registry.url) as who:
        epochs: dict[int, int] = {}

        async def fight(port: int) -> None:
            answer = await who.claim(port, ttl_s=30.0)
            while answer[0] == 503:  # so many at once are let in one after the other
                await asyncio.sleep(0.05)
                answer = await who.claim(port, ttl_s=30.0)
            epochs[port] = granted(answer)

        for fifty in range(3):
            await asyncio.gather(*(fight(40_000 + 100 * fifty + n) for n in range(50)))
            assert len(set(epochs.values())) == len(epochs)
            winner = max(epochs, key=lambda port: epochs[port])
            assert (await who.where())[1]["rank_port"] == winner
            statuses = [(await who.renew(epoch))[0] for port, epoch in epochs.items() if port != winner]
            assert set(statuses) == {409}


async def test_of_two_processes_in_one_seat_the_older_leaves_and_says_why(registry: Service) -> None:
    """`pdctl register --hold` twice on one host: the second is a restart of the first, which nobody stopped."""
    held = ("register", "--registry", registry.url, "--rank-host", HERE, "--hold", "--rank-port")
    quick = {"PDCTL_NODE__TTL_S": "3.0"}
    async with party(registry.url) as who, pdctl(*held, "40001", **quick) as older:
        await until(lambda: serves(who, 40_001))
        async with pdctl(*held, "40002", **quick) as younger:
            _, told = await asyncio.wait_for(older.communicate(), DEADLINE_S)
            assert older.returncode not in (0, None)
            assert re.search(r"pdctl: .*epoch \d+.*", told.decode())
            assert await serves(who, 40_002)
            assert younger.returncode is None


async def serves(who: Party, port: int) -> bool:
    return bool((await who.where())[1] == {"rank_ip": HERE, "rank_port": port})


# --- time


async def test_epochs_and_revisions_never_go_back_whatever_kills_the_registry(tmp_path: Path) -> None:
    """Each life of the registry is killed with claims under way; what it acknowledged is older than what follows."""
    highest = (0, 0)
    with reserve_port() as reserved:
        for life in range(4):
            with serving(tmp_path, "--port", str(reserved.getsockname()[1])) as registry:
                async with party(registry.url) as who:
                    acknowledged: list[tuple[int, int]] = []
                    claims = [asyncio.create_task(once(who, 41_000 + 100 * life + n, acknowledged)) for n in range(40)]
                    await until(lambda: enough(acknowledged, 8))  # noqa: B023
                    assert min(epoch for epoch, _ in acknowledged) > highest[0]
                    assert min(at for _, at in acknowledged) > highest[1]
                    highest = max(epoch for epoch, _ in acknowledged), max(at for _, at in acknowledged)
                    signalled(registry, signal.SIGKILL)
                    await asyncio.gather(*claims, return_exceptions=True)
                    highest = max(epoch for epoch, _ in acknowledged), max(at for _, at in acknowledged)


async def once(who: Party, port: int, acknowledged: list[tuple[int, int]]) -> None:
    status, grant = await who.claim(port, ttl_s=30.0)
    assert status == 200
    acknowledged.append((grant["epoch"], grant["revision"]))


async def enough(what: list[Any], n: int) -> bool:
    return len(what) >= n


def signalled(registry: Service, what: signal.Signals) -> None:
    os.kill(registry.pid, what)


WILD_CLOCK = """
import datetime, itertools, time
true, jumps = time.time, itertools.cycle((0.0, 3.2e8, -3.2e8, 86_400.0, -1e6))
time.time = lambda: true() + next(jumps)
time.time_ns = lambda: int(time.time() * 1e9)
class Wild(datetime.datetime):
    @classmethod
    def now(cls, tz=None): return cls.fromtimestamp(time.time(), tz)
    @classmethod
    def utcnow(cls): return cls.utcfromtimestamp(time.time())
datetime.datetime = Wild
"""
"""Each look at the wall clock of the process is years away from the last."""


async def test_a_wall_clock_that_jumps_by_years_ends_no_lease_and_keeps_none(tmp_path: Path) -> None:
    with serving(tmp_path, preload=WILD_CLOCK) as registry:
        years = {line.partition("timestamp=")[2][:4] for line in registry.log().splitlines() if "timestamp=" in line}
        async with party(registry.url) as who:
            stock = granted(await who.claim(40_000, ttl_s=None, tp=1, size=2))
            epoch = granted(await who.claim(40_001, size=2))
            await announce(who, 7)
            async with renewing(who, epoch) as renewals:
                held = [(await who.where())[0] for _ in range(40) if await asyncio.sleep(TTL_S / 20, True)]
            assert set(held) == {200}
            assert [granted(answer) for answer in renewals] == [epoch] * len(renewals)
            assert await room(who, 7) == {"7": 0}
            assert granted(await who.renew(epoch)) == epoch
            silent_s = await until(lambda: is_status(who.where, 503))
            assert TTL_S / 2 < silent_s < TTL_S + SLACK_S
            assert granted(await who.claim(40_000, ttl_s=None, tp=1, size=2)) == stock
        years |= {line.partition("timestamp=")[2][:4] for line in registry.log().splitlines() if "timestamp=" in line}
        assert len(years) > 1, "the clock did not jump"
        assert registry.complaints() == []


@pytest.mark.parametrize("ttl_s", [1.5, 3.5])
async def test_a_registry_that_stood_still_for_longer_than_the_leases_takes_everybody_back(
    registry: Service, ttl_s: float
) -> None:
    """A paused machine: nobody could renew, so that the silence proves nothing of the ranks."""
    async with party(registry.url) as who:
        epochs = [granted(await who.claim(40_000 + tp, tp=tp, size=3, ttl_s=ttl_s)) for tp in range(3)]
        signalled(registry, signal.SIGSTOP)
        await asyncio.sleep(1.6 * ttl_s)
        pending = [asyncio.create_task(who.renew(epoch, tp=tp)) for tp, epoch in enumerate(epochs)]
        signalled(registry, signal.SIGCONT)
        assert [(await answer)[0] for answer in pending] == [200, 200, 200]
        assert (await who.topology())[0] == 200


async def test_who_was_known_to_be_dead_is_known_to_be_dead_after_a_restart_until_it_comes_again(
    tmp_path: Path,
) -> None:
    with reserve_port() as reserved:
        port = ("--port", str(reserved.getsockname()[1]))
        with serving(tmp_path, *port) as registry:
            async with party(registry.url) as who:
                granted(await who.claim(40_000, ttl_s=0.5))
                granted(await who.claim(40_100, instance="other", ttl_s=60.0))
                await until(lambda: is_status(lambda: who._ask("GET", "/health"), 503))
                granted(await who.claim(40_200, instance="later", ttl_s=60.0))  # what was seen before it is written too
                signalled(registry, signal.SIGKILL)
        with serving(tmp_path, *port) as registry:
            async with party(registry.url) as who:
                status, why = await who._ask("GET", "/health")
                assert (status, "was silent for its whole lease" in why) == (503, True)
                granted(await who.claim(40_001, ttl_s=60.0))
                assert (await who._ask("GET", "/health"))[0] == 200


async def announce(who: Party, number: int) -> None:
    assert await who._ask("POST", "/register_dp_rank", json={"bootstrap_room": number, "dp_rank": 0}) == (200, "OK")


async def room(who: Party, number: int) -> Any:
    return (await who._ask("POST", "/query_dp_ranks", json={"bootstrap_rooms": [number]}))[1]


async def is_status(ask: Callable[[], Awaitable[Answer]], status: int) -> bool:
    return (await ask())[0] == status


# --- drain


async def test_a_drained_instance_takes_nothing_new_while_its_rooms_go_on_and_is_gone_when_they_are_done(
    registry: Service,
) -> None:
    async with party(registry.url) as who:
        epochs = [granted(await who.claim(40_000 + tp, tp=tp, size=2, ttl_s=30.0)) for tp in range(2)]
        for tp, epoch in enumerate(epochs):
            granted(await who.renew(epoch, tp=tp, rooms=3))
        await announce(who, 7)
        status, _ = await who.drain(60.0)
        assert status == 200
        for ask in (who.topology, who.where):
            assert (await ask())[0] == 503
        _, listed = await who._ask("GET", "/v1/instances")
        assert listed["instances"][0]["draining"] is True
        assert await room(who, 7) == {"7": 0}
        for tp, epoch in enumerate(epochs):
            status, grant = await who.renew(epoch, tp=tp, rooms=1)
            assert (status, grant["standing"]) == (200, "draining")
        await asyncio.gather(*(who.renew(epoch, tp=tp, rooms=0) for tp, epoch in enumerate(epochs)))
        await until(lambda: is_gone(who))
        for tp, epoch in enumerate(epochs):
            told = await who.renew(epoch, tp=tp)
            assert (told[0], "was drained" in message(told)) == (409, True)


async def test_a_drain_ends_with_its_grace_though_a_room_hangs(registry: Service) -> None:
    async with party(registry.url) as who:
        epoch = granted(await who.claim(40_000, ttl_s=30.0))
        began = time.monotonic()
        assert (await who.drain(2.0))[0] == 200
        async with renewing(who, epoch, rooms=1):
            await until(lambda: is_gone(who))
        assert 1.8 < time.monotonic() - began < 2.0 + SLACK_S


async def test_a_restart_after_a_drain_serves_again(registry: Service) -> None:
    async with party(registry.url) as who:
        granted(await who.claim(40_000, ttl_s=30.0))
        await who.drain(60.0)
        assert (await who.where())[0] == 503
        granted(await who.claim(40_001, ttl_s=30.0))
        assert (await who.where())[1]["rank_port"] == 40_001


async def is_gone(who: Party) -> bool:
    status, body = await who._ask("GET", "/v1/instances/default")
    return status == 404 or body["alive"] == 0


async def test_who_was_known_to_a_registry_that_forgets_is_told_to_register_again(tmp_path: Path) -> None:
    """And not that it was replaced, whoever comes first afterwards: a client that hears 409 ends its rank."""
    with reserve_port() as reserved:
        forgetful = ("--journal", "memory:", "--port", str(reserved.getsockname()[1]))
        with service(tmp_path / "log", *forgetful) as registry:
            async with party(registry.url) as who:
                before = [granted(await who.claim(40_000 + tp, tp=tp, size=2, ttl_s=30.0)) for tp in (0, 1)]
        with service(tmp_path / "log", *forgetful) as registry:
            async with party(registry.url) as who:
                for n in range(3):
                    granted(await who.claim(41_000 + n, instance=f"other-{n}", ttl_s=30.0))
                granted(await who.claim(40_001, tp=1, size=2, ttl_s=30.0))
                for tp, epoch in enumerate(before):
                    answer = await who.renew(epoch, tp=tp)
                    assert (answer[0], "register again" in message(answer)) == (404, True)
