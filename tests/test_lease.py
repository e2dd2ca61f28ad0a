"""A rank's lease: against a registry that does as scripted, and against ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Any

import pytest
import structlog

from pdctl.client import Exhaustion, RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.lives import Claim, Owner
from pdctl.core.native import Grant, Registration
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import ConfigError, RegistrationGaveUp, RegistryRefused, Superseded
from pdctl.lease import Lease, LeaseTerms, NoLeases
from pdctl.registrar import Registrar
from pdctl.retry import RetryPolicy
from tests.conftest import Clock
from tests.scripted import Act, Scripted, answers, answers_json, hangs, scripted

SHAPE = Shape(attn_tp_size=1, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
ROW = Announcement(Seat(0, 0, 0, 0), SHAPE, Endpoint("10.0.0.1", 40123), prefill_http_port=30000)
QUICK = RetryPolicy(first_wait_s=0.01, max_wait_s=0.02)
TTL_S = 0.3
PATH = "/v1/instances/default/ranks/dp0-cp0-tp0-pp0"


def granted(epoch: int = 1, standing: str = "alive", ttl_s: float = TTL_S) -> Act:
    said = {"instance": "default", "seat": str(ROW.seat), "epoch": epoch, "ttl_s": ttl_s, "standing": standing}
    return answers_json(said | {"revision": 1, "and": "what a later registry says besides"})


def says(status: int, message: str, fix: str = "") -> Act:
    return answers_json({"error": {"message": message, "fix": fix}}, status)


FORGOTTEN = says(404, "epoch 1 is not known here any more: register again")
REPLACED = says(409, "seat dp0/cp0/tp0/pp0 is held by epoch 3, got 1: this process was replaced; exit")


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


class Turns:
    """A `sleep` that only lets the others run; what was slept is kept."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


def lease(client: RegistryClient, exhaustion: Exhaustion = Exhaustion.RAISE, **more: Any) -> Lease:
    terms = LeaseTerms("default", ROW, TTL_S, rooms=more.pop("rooms", None))
    policy = more.pop("policy", QUICK)
    return Lease(client.tell, partial(client.insist, ROW, exhaustion=exhaustion), terms, policy, **more)


@asynccontextmanager
async def held(url: str, **more: Any) -> AsyncIterator[tuple[RegistryClient, asyncio.Task[None], Lease]]:
    """A lease held at `url` beside the test; it says goodbye at the end, unless it has ended by itself."""
    async with RegistryClient(url, policy=QUICK) as client:
        one = lease(client, **more)
        holding = asyncio.create_task(one.hold())
        try:
            yield client, holding, one
        finally:
            holding.cancel()
            await asyncio.wait({holding})


async def soon(what: Callable[[], object]) -> None:
    """Wait for what can only be looked at."""
    async with asyncio.timeout(60):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def until_asked(registry: Scripted, n: int) -> None:
    await soon(lambda: len(registry.asked) >= n)


def methods(registry: Scripted) -> list[str]:
    return [f"{method} {path.removeprefix(PATH)}".strip() for method, path, _ in registry.asked]


# What is said


async def test_a_lease_is_taken_renewed_and_given_back() -> None:
    async with scripted(granted(7), otherwise=granted(7)) as registry:
        async with held(registry.url, rooms=lambda: 4) as (client, _, one):
            await until_asked(registry, 3)
            assert client.registered
            assert one.granted == Grant("default", "dp0/cp0/tp0/pp0", 7, TTL_S, "alive", 1)
        asked = registry.asked
    assert methods(registry)[:3] == ["PUT", "POST /renew", "POST /renew"]
    assert methods(registry)[-1] == "DELETE ?epoch=7"
    assert asked[0][2] == json.loads(json.dumps(Registration.of(ROW, TTL_S).to_body()))
    assert asked[1][2] == {"epoch": 7, "rooms": 4}


async def test_renewals_come_every_third_of_what_was_granted_and_a_little_sooner() -> None:
    turns = Turns()
    async with (
        scripted(otherwise=granted(ttl_s=60.0)) as registry,  # more than was asked for
        held(registry.url, sleep=turns, random=Random(1)),
    ):
        await until_asked(registry, 40)
    assert all(16.0 <= each <= 20.0 for each in turns.slept)
    assert max(turns.slept) - min(turns.slept) > 2.0


# When the registry says no


async def test_a_registry_that_forgot_is_told_again_at_once() -> None:
    async with (
        scripted(granted(1), granted(1), FORGOTTEN, granted(2), otherwise=granted(2)) as registry,
        held(registry.url) as (client, _, one),
    ):
        await until_asked(registry, 5)
        assert client.registered
        assert one.granted
        assert one.granted.epoch == 2
    assert methods(registry)[:5] == ["PUT", "POST /renew", "POST /renew", "PUT", "POST /renew"]
    assert registry.asked[4][2]["epoch"] == 2


async def test_a_replaced_rank_ends_loudly_and_says_no_goodbye() -> None:
    async with (
        scripted(granted(1), REPLACED, otherwise=granted(9)) as registry,
        held(registry.url) as (client, holding, _),
    ):
        with pytest.raises(Superseded, match="held by epoch 3, got 1: this process was replaced"):
            await holding
        assert not client.registered
    assert methods(registry) == ["PUT", "POST /renew"]


async def test_a_seat_that_another_host_holds_is_asked_for_until_it_is_free(lines: list[Any]) -> None:
    occupied = says(409, "seat dp0/cp0/tp0/pp0 is held by 10.9.9.9, which lives: stop one of the two")
    async with (
        scripted(occupied, occupied, granted(2), otherwise=granted(2)) as registry,
        held(registry.url) as (client, _, _),
    ):
        await until_asked(registry, 4)
        assert client.registered
    warned = [line for line in lines if line["event"] == "registration attempt failed"]
    assert ["10.9.9.9" in line["cause"] for line in warned] == [True, True]


async def test_a_refused_claim_ends_loudly() -> None:
    async with (
        scripted(otherwise=says(400, "page_size is 64: start every rank with the same")) as registry,
        held(registry.url) as (_, holding, _),
    ):
        with pytest.raises(RegistryRefused, match="page_size is 64"):
            await holding
    assert methods(registry) == ["PUT"]


@pytest.mark.parametrize("status", [404, 405])
async def test_a_registry_without_leases_is_named_as_such(status: int) -> None:
    async with (
        scripted(otherwise=answers(status, "404: Not Found")) as registry,
        held(registry.url) as (_, holding, _),
    ):
        with pytest.raises(NoLeases):
            await holding
    assert methods(registry) == ["PUT"]


async def test_a_rank_that_was_drained_stays_away(lines: list[Any]) -> None:
    gone = says(409, "epoch 1 was drained: exit, or start anew to serve again")
    async with (
        scripted(granted(), granted(standing="draining"), gone, otherwise=granted(2)) as registry,
        held(registry.url) as (client, holding, _),
    ):
        await until_asked(registry, 3)
        await soon(lambda: not client.registered)
        await asyncio.sleep(TTL_S)
        assert not holding.done()
    assert methods(registry) == ["PUT", "POST /renew", "POST /renew"]
    assert [line["event"].partition(":")[0] for line in lines if "drain" in line["event"]] == ["draining", "drained"]


async def test_what_answers_no_grant_is_no_registry(lines: list[Any]) -> None:
    async with (
        scripted(answers(200, "hello"), answers_json({"epoch": "x"}), otherwise=granted()) as registry,
        held(registry.url) as (client, _, _),
    ):
        await until_asked(registry, 4)
        assert client.registered
    warned = [line["cause"] for line in lines if line["event"] == "registration attempt failed"]
    assert len(warned) == 2


# When it does not answer


async def test_a_renewal_that_is_lost_is_repeated_and_the_rank_is_not_registered_meanwhile() -> None:
    busy = says(503, "the journal takes no rows")
    async with (
        scripted(granted(), busy, busy, otherwise=granted()) as registry,
        held(registry.url) as (client, _, _),
    ):
        await until_asked(registry, 1)
        await soon(lambda: client.registered)
        await soon(lambda: not client.registered)
        await soon(lambda: client.registered)
    assert methods(registry)[:4] == ["PUT", "POST /renew", "POST /renew", "POST /renew"]


async def test_who_lost_the_registry_returns_within_a_third_of_the_lease() -> None:
    """Later, and a registry that came back with the lease journalled would let it end."""
    turns, busy = Turns(), says(503, "starting")
    async with (
        scripted(granted(ttl_s=60.0), *[busy] * 30, otherwise=granted(ttl_s=60.0)) as registry,
        RegistryClient(registry.url, policy=RetryPolicy(), sleep=turns) as client,
    ):
        holding = asyncio.create_task(lease(client, sleep=Turns(), policy=RetryPolicy()).hold())
        await until_asked(registry, 32)
        holding.cancel()
        await asyncio.wait({holding})
    assert len(turns.slept) >= 30
    assert max(turns.slept) <= 10.0
    assert min(turns.slept[1:]) >= 5.0  # the first has full jitter, from 0 on
    assert len(set(turns.slept)) == len(turns.slept)


async def test_the_end_of_all_attempts_means_what_was_chosen() -> None:
    policy = RetryPolicy(first_wait_s=0.01, max_wait_s=0.01, max_attempts=2)
    async with scripted(otherwise=says(503, "no")) as registry, RegistryClient(registry.url) as client:
        one = Lease(client.tell, partial(client.insist, ROW), LeaseTerms("default", ROW, TTL_S), policy)
        with pytest.raises(RegistrationGaveUp):
            await one.hold()
    assert methods(registry) == ["PUT", "PUT"]


async def test_a_registry_that_hangs_does_not_hold_up_who_stops() -> None:
    async with scripted(granted(), otherwise=hangs()) as registry, RegistryClient(registry.url) as client:
        holding = asyncio.create_task(lease(client).hold())
        await until_asked(registry, 2)
        async with asyncio.timeout(30.0):
            holding.cancel()
            await asyncio.wait({holding})
    assert methods(registry) == ["PUT", "POST /renew", "DELETE ?epoch=1"]


async def test_who_was_never_granted_anything_says_no_goodbye() -> None:
    async with scripted(otherwise=hangs()) as registry, RegistryClient(registry.url) as client:
        holding = asyncio.create_task(lease(client).hold())
        await until_asked(registry, 1)
        holding.cancel()
        await asyncio.wait({holding})
    assert methods(registry) == ["PUT"]


def test_a_lease_of_no_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="ttl_s is 0"):
        LeaseTerms("default", ROW, 0.0)


# With our registry


async def test_our_registry_grants_keeps_and_takes_back(registry_url: str, registrar: Registrar, clock: Clock) -> None:
    async with held(registry_url) as (client, holding, one):
        await soon(lambda: client.registered)
        view = registrar.view("default")
        assert view
        assert view.alive[ROW.seat].ttl_s == TTL_S
        clock.forward(1.0)  # three leases
        sweeping = asyncio.create_task(registrar.sweep())
        await soon(lambda: one.granted and one.granted.epoch == 2)  # forgotten, and back by itself
        sweeping.cancel()
        assert not holding.done()
    view = registrar.view("default")
    assert view
    assert not view.alive


async def test_our_registry_ends_a_rank_that_was_replaced(registry_url: str, registrar: Registrar) -> None:
    async with held(registry_url) as (client, holding, _):
        await soon(lambda: client.registered)
        moved = Announcement(ROW.seat, SHAPE, Endpoint("10.0.0.1", 40999))
        await registrar.register(Claim("default", moved, Owner("127.0.0.1"), ttl_s=60.0))
        with pytest.raises(Superseded, match="held by epoch 2, got 1"):
            await holding
    view = registrar.view("default")
    assert view
    assert view.alive[ROW.seat].epoch == 2
