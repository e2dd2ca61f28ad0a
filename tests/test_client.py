"""The registration client against real sockets: our registry, and a server that misbehaves as told."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from email.utils import formatdate
from random import Random
from typing import Any

import pytest
import structlog

from pdctl.client import LOST_CONNECTION, ROOMS_A_QUESTION, Exhaustion, Registries, RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.exchange import Exchange
from pdctl.core.route import Announcement, Seat, Shape, topology_body
from pdctl.courier import MAX_ANSWER_BYTES
from pdctl.credentials import Credentials
from pdctl.errors import ConfigError, NotReady, PutOff, RegistrationGaveUp, RegistryRefused, Unreachable
from pdctl.retry import RetryPolicy
from tests.conftest import Clock
from tests.scripted import (
    Act,
    answers,
    answers_json,
    closes,
    hangs,
    never_ends,
    reserve_port,
    resets,
    scripted,
)

SHAPE = Shape(attn_tp_size=1, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
ROW = Announcement(Seat(0, 0, 0, 0), SHAPE, Endpoint("10.0.0.1", 40123), prefill_http_port=30000)
MOVED = replace(ROW, address=Endpoint("10.0.0.2", 40123))
ROW_OF_TWO = replace(ROW, shape=replace(SHAPE, attn_tp_size=2))
TOPOLOGY = answers_json(topology_body(SHAPE, 30000))
QUICK = RetryPolicy(first_wait_s=0.01, max_wait_s=0.05)


class Waits(list[float]):
    """A `sleep` that only turns the clock; what was slept is in the list."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)
        self._clock.forward(seconds)
        await asyncio.sleep(0)


@pytest.fixture
def waits(clock: Clock) -> Waits:
    return Waits(clock)


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@contextlib.asynccontextmanager
async def client(url: str, waits: Waits | None = None, **more: Any) -> AsyncIterator[RegistryClient]:
    """A client whose waits are virtual where `waits` is given."""
    if waits is not None:
        more = {"sleep": waits, "clock": waits._clock, **more}
    async with RegistryClient(url, random=Random(3), **more) as opened:
        yield opened


def is_registered(rank: RegistryClient) -> bool:
    """The property, read anew: mypy remembers what an assert has said of it."""
    return rank.registered


def warnings(lines: list[Any]) -> list[Any]:
    return [line for line in lines if line["log_level"] == "warning"]


# --- registering ---


async def test_a_registered_rank_can_be_looked_up(registry_url: str) -> None:
    async with client(registry_url) as rank:
        assert not is_registered(rank)
        await rank.register(ROW)
        assert is_registered(rank)
        assert await rank.topology() == SHAPE
        assert await rank.rank(ROW.seat) == ROW.address
        assert await rank.healthy()


async def test_a_registry_that_is_asked_again_is_asked_by_the_same_client(registry_url: str) -> None:
    how = RetryPolicy(), Credentials()
    async with Registries(max_idle=1) as registries:
        async with registries.asking(registry_url, *how) as first, registries.asking(registry_url, *how) as second:
            assert second is first
            await first.register(ROW)
        async with registries.asking(registry_url, *how) as third:
            assert third is first
            assert await third.topology() == SHAPE
            async with registries.asking(f"{registry_url}/", *how):
                pass
            assert await third.topology() == SHAPE, "one that is in use is not closed to make room"
        assert len(registries._kept) == 1


async def test_rooms_that_look_up_the_same_at_one_moment_share_the_answers() -> None:
    async with scripted(otherwise=answers_json(topology_body(SHAPE, None))) as registry, client(registry.url) as rank:
        assert await asyncio.gather(*[rank.topology() for _ in range(64)]) == [SHAPE] * 64
        assert len(registry.asked) == 2, "the first, and one that began when all the others had asked"
        assert await rank.topology() == SHAPE
        assert len(registry.asked) == 3, "nothing is kept"
    where = answers_json({"rank_ip": "10.0.0.1", "rank_port": 7000})
    async with scripted(otherwise=where) as registry, client(registry.url) as rank:
        await asyncio.gather(*[rank.rank(Seat(0, 0, n % 2, 0)) for n in range(64)])
        assert len(registry.asked) == 4, "two for each seat"


async def test_a_kept_connection_that_was_lost_does_not_cost_a_topology() -> None:
    shape = answers_json(topology_body(SHAPE, None))
    async with scripted(shape, closes(), resets(), otherwise=shape) as registry, client(registry.url) as rank:
        assert await rank.topology() == SHAPE
        assert await rank.topology(LOST_CONNECTION) == SHAPE
        assert len(registry.asked) == 4
    async with scripted(otherwise=answers(503)) as registry, client(registry.url) as rank:
        with pytest.raises(NotReady):
            await rank.topology(LOST_CONNECTION)
        assert len(registry.asked) == 1, "an answer is an answer"


async def test_what_is_put_is_what_a_stock_rank_puts() -> None:
    async with scripted() as server, client(server.url) as rank:
        await rank.register(ROW)
    assert server.asked == [("PUT", "/route", ROW.to_body())]


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 405, 409, 413, 415, 422])
async def test_a_permanent_refusal_is_not_retried(status: int, waits: Waits, lines: list[Any]) -> None:
    async with (
        scripted(otherwise=answers(status, "Inconsistent prefill allocation policies")) as server,
        client(server.url, waits) as rank,
    ):
        with pytest.raises(RegistryRefused, match="Inconsistent prefill allocation policies") as caught:
            await rank.register(ROW, Exhaustion.KEEP_TRYING)
        assert not is_registered(rank)
    assert (caught.value.status, caught.value.text) == (status, "Inconsistent prefill allocation policies")
    assert (len(server.asked), waits) == (1, [])
    assert [line["next_wait_s"] for line in warnings(lines)] == [None]


@pytest.mark.parametrize("status", [204, 408, 425, 429, 500, 502, 503, 504])
async def test_what_may_pass_is_tried_again(status: int, waits: Waits) -> None:
    async with scripted(answers(status), answers(status)) as server, client(server.url, waits) as rank:
        await rank.register(ROW)
        assert is_registered(rank)
    assert (len(server.asked), len(waits)) == (3, 2)


async def test_a_contradiction_is_refused_by_the_registry_in_its_own_words(registry_url: str) -> None:
    async with client(registry_url) as rank, client(registry_url) as other:
        await rank.register(ROW_OF_TWO)
        wrong = replace(ROW_OF_TWO, seat=Seat(0, 0, 1, 0), shape=replace(ROW_OF_TWO.shape, page_size=64))
        with pytest.raises(RegistryRefused, match="page_size"):
            await other.register(wrong)
        assert is_registered(rank)
        assert not is_registered(other)


@pytest.mark.parametrize("header", ["20", formatdate(5_000_020, usegmt=True)], ids=["seconds", "date"])
@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_obeyed(header: str, status: int, waits: Waits) -> None:
    said = {"Retry-After": header, "Date": formatdate(5_000_000, usegmt=True)}
    async with scripted(answers(status, headers=said)) as server, client(server.url, waits) as rank:
        await rank.register(ROW)
    assert 20.5 <= waits[0] <= 21


async def test_a_retry_after_of_a_day_does_not_lose_the_rank_for_a_day(waits: Waits) -> None:
    async with scripted(answers(503, headers={"Retry-After": "86400"})) as server, client(server.url, waits) as rank:
        await rank.register(ROW)
    assert waits[0] <= 121


@pytest.mark.parametrize(
    ("act", "cause"),
    [
        (hangs(), "timed out after 1 s"),
        (resets(), "connection reset by peer"),
        (closes(), "server disconnected"),
        (answers(503, "  busy\n now"), "answered 503: busy now"),
        (answers(502), "answered 502: bad Gateway"),
        (answers_json({"error": {"message": "no room", "code": 503}}, 503), "answered 503: no room"),
        (
            answers(500, "500 Internal Server Error\n\nServer got itself in trouble"),
            "answered 500: 500 Internal Server Error Server got itself in trouble",
        ),
    ],
    ids=["hung", "reset", "closed", "busy", "wordless", "rust registry", "stock registry"],
)
async def test_the_warning_names_the_root_cause(act: Act, cause: str, waits: Waits, lines: list[Any]) -> None:
    async with scripted(act) as server, client(server.url, waits, attempt_timeout_s=1.0) as rank:
        await rank.register(ROW)
    (line,) = warnings(lines)
    assert line["cause"] == cause
    assert (line["attempt"], line["next_wait_s"]) == (1, pytest.approx(waits[0], abs=1e-3))


@pytest.mark.parametrize("act", [closes(), resets()], ids=["closed", "reset"])
async def test_a_lost_connection_is_one_attempt(act: Act, waits: Waits, lines: list[Any]) -> None:
    """aiohttp would send it again by itself."""
    async with scripted(answers(200), act, act) as server, client(server.url, waits) as rank:
        await rank.healthy()  # so that the first of them meets a kept-alive connection, the second a new one
        await rank.register(ROW)
    assert len(server.asked) == 4
    assert [line["attempt"] for line in warnings(lines)] == [1, 2]


async def test_a_refused_connection_and_an_unknown_name_are_named_as_such(waits: Waits, lines: list[Any]) -> None:
    with reserve_port() as nobody:
        for url in (f"http://127.0.0.1:{nobody.getsockname()[1]}", "http://registry.invalid:8998"):
            async with client(url, waits, policy=RetryPolicy(max_attempts=1), attempt_timeout_s=20) as rank:
                with pytest.raises(RegistrationGaveUp):
                    await rank.register(ROW)
    refused, unknown = (line["cause"] for line in warnings(lines))
    assert refused == "connection refused"
    assert "name" in unknown  # "name or service not known"; without any network "... failure in name resolution"


async def test_each_failed_attempt_is_one_warning_with_its_number_and_next_wait(waits: Waits, lines: list[Any]) -> None:
    async with scripted(*[answers(503)] * 4) as server, client(server.url, waits) as rank:
        await rank.register(ROW)
    told = warnings(lines)
    assert [line["attempt"] for line in told] == [1, 2, 3, 4]
    assert [line["next_wait_s"] for line in told] == pytest.approx(list(waits), abs=1e-3)
    assert {line["event"] for line in told} == {"registration attempt failed"}
    assert [line["event"] for line in lines if line not in told] == ["registered"]


async def test_a_hung_server_costs_one_attempts_time_out() -> None:
    loop = asyncio.get_running_loop()
    async with (
        scripted(otherwise=hangs()) as server,
        client(server.url, policy=RetryPolicy(max_attempts=1), attempt_timeout_s=0.2) as rank,
    ):
        began = loop.time()
        with pytest.raises(RegistrationGaveUp, match=r"timed out after 0\.2 s"):
            await rank.register(ROW)
        assert 0.2 <= loop.time() - began < 20


async def test_a_server_that_drips_its_answer_is_held_to_the_same_time_out() -> None:
    async with (
        scripted(otherwise=never_ends()) as server,
        client(server.url, policy=RetryPolicy(max_attempts=1), attempt_timeout_s=60) as rank,
    ):
        with pytest.raises(RegistrationGaveUp, match=f"more than {MAX_ANSWER_BYTES} bytes"):
            await rank.register(ROW)


async def test_a_rank_that_starts_before_its_registry_is_registered_when_it_comes(
    waits: Waits, lines: list[Any]
) -> None:
    sock = reserve_port()
    failed = asyncio.Event()

    async def wait_and_count(seconds: float) -> None:
        await waits(seconds)
        if len(waits) == 3:
            failed.set()
        if len(waits) > 3:
            await asyncio.sleep(0.01)  # the server's turn

    async with client(f"http://127.0.0.1:{sock.getsockname()[1]}", waits, sleep=wait_and_count) as rank:
        registering = asyncio.create_task(rank.register(ROW))
        await failed.wait()
        assert not is_registered(rank)
        sock.listen()
        async with scripted(sock=sock):
            await asyncio.wait_for(registering, 60)
        assert is_registered(rank)
    assert {line["cause"] for line in warnings(lines)[:3]} == {"connection refused"}


async def test_the_first_waits_of_200_clients_are_spread() -> None:
    """One registry, 200 ranks that met it busy at the same moment."""
    first: list[float] = []

    async def note(seconds: float) -> None:
        first.append(seconds)
        raise asyncio.CancelledError

    async def one(seed: int, url: str) -> None:
        async with RegistryClient(url, random=Random(seed), sleep=note) as rank:
            with contextlib.suppress(asyncio.CancelledError):
                await rank.register(ROW)

    async with scripted(otherwise=answers(503, headers={"Retry-After": "5"})) as server:
        await asyncio.gather(*(one(seed, server.url) for seed in range(200)))
    slots = Counter(int((wait - 5.5) * 20) for wait in first)
    assert len(first) == 200
    assert sorted(slots) == list(range(10))
    assert max(slots.values()) <= 3 * 20


async def test_clients_that_are_given_no_source_of_jitter_do_not_share_one() -> None:
    first: set[float] = set()

    async def note(seconds: float) -> None:
        first.add(seconds)

    async with scripted(*[answers(503)] * 10) as server:
        for _ in range(10):
            async with RegistryClient(server.url, policy=RetryPolicy(max_attempts=2), sleep=note) as rank:
                with contextlib.suppress(RegistrationGaveUp):
                    await rank.register(ROW)
    assert len(first) == 5  # of ten answers, two for each client; then the server is well


# --- exhaustion ---


async def test_exhaustion_raises_with_the_count_and_the_cause(waits: Waits) -> None:
    async with (
        scripted(otherwise=answers(503, "full")) as server,
        client(server.url, waits, policy=RetryPolicy(max_attempts=3)) as rank,
    ):
        with pytest.raises(RegistrationGaveUp, match="3 times, at last: answered 503: full") as caught:
            await rank.register(ROW)
        assert not is_registered(rank)
    assert (caught.value.attempts, caught.value.cause) == (3, "answered 503: full")
    assert (len(server.asked), len(waits)) == (3, 2)
    assert isinstance(caught.value.__cause__, PutOff)


async def test_exhaustion_exits_with_unavailable_after_one_error_line(waits: Waits, lines: list[Any]) -> None:
    async with (
        scripted(otherwise=answers(503, "full")) as server,
        client(server.url, waits, policy=RetryPolicy(max_attempts=2)) as rank,
    ):
        with pytest.raises(SystemExit) as caught:
            await rank.register(ROW, Exhaustion.EXIT)
    assert caught.value.code == 69
    (error,) = [line for line in lines if line["log_level"] == "error"]
    assert (error["attempts"], error["cause"]) == (2, "answered 503: full")


async def test_who_keeps_trying_is_not_registered_until_it_is(waits: Waits) -> None:
    seen = []
    async with (
        scripted(*[answers(503)] * 12) as server,
        client(server.url, waits, policy=RetryPolicy(max_attempts=2)) as rank,
    ):

        async def look(seconds: float) -> None:
            seen.append(is_registered(rank))
            await waits(seconds)

        rank._sleep = look
        await rank.register(ROW, Exhaustion.KEEP_TRYING)
        assert is_registered(rank)
    assert seen == [False] * 12
    assert all(15 <= wait <= 30 for wait in waits[1:])


# --- what `registered` means ---


async def test_it_is_not_registered_before_the_answer_has_come() -> None:
    entered = asyncio.Event()
    async with scripted(hangs(entered=entered)) as server, client(server.url) as rank:
        registering = asyncio.create_task(rank.register(ROW))
        await entered.wait()
        assert not is_registered(rank)
        registering.cancel()
        await asyncio.wait({registering})


async def test_a_cancelled_attempt_leaves_nothing_running() -> None:
    entered, left = asyncio.Event(), asyncio.Event()
    async with scripted(hangs(left, entered)) as server, client(server.url) as rank:
        before = asyncio.all_tasks()
        registering = asyncio.create_task(rank.register(ROW))
        await entered.wait()
        registering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await registering
        assert not is_registered(rank)
        await asyncio.wait_for(left.wait(), 60)  # the server saw the connection end
        ours = [task for task in asyncio.all_tasks() - before if "web_protocol" not in repr(task)]  # the server's own
        assert ours == []
        await rank.register(ROW)  # and the client is as good as new
        assert is_registered(rank)


async def test_a_cancelled_repetition_leaves_an_earlier_registration_standing() -> None:
    entered = asyncio.Event()
    async with scripted(answers(200), hangs(entered=entered)) as server, client(server.url) as rank:
        await rank.register(ROW)
        again = asyncio.create_task(rank.register(ROW))
        await entered.wait()
        again.cancel()
        await asyncio.wait({again})
        assert is_registered(rank)


async def test_another_announcement_is_not_registered_by_the_first_ones_answer() -> None:
    entered = asyncio.Event()
    async with scripted(answers(200), hangs(entered=entered)) as server, client(server.url) as rank:
        await rank.register(ROW)
        moving = asyncio.create_task(rank.register(MOVED))
        await entered.wait()
        assert not is_registered(rank)
        moving.cancel()
        await asyncio.wait({moving})
        assert not is_registered(rank)


async def test_a_closed_client_is_not_registered_and_says_so_when_used() -> None:
    async with scripted() as server, client(server.url) as rank:
        await rank.register(ROW)
    assert not is_registered(rank)
    with pytest.raises(RuntimeError, match="async with"):
        await rank.register(ROW)


# --- holding ---


class EnoughError(Exception):
    pass


async def test_a_held_registration_is_repeated_at_its_interval_and_a_little_sooner(
    waits: Waits, lines: list[Any]
) -> None:
    async def five(seconds: float) -> None:
        await waits(seconds)
        if len(waits) == 5:
            raise EnoughError

    async with scripted() as server, client(server.url, waits, sleep=five) as rank:
        with pytest.raises(EnoughError):
            await rank.hold(ROW, every_s=10)
    assert server.asked == [("PUT", "/route", ROW.to_body())] * 5
    assert all(8 <= wait <= 10 for wait in waits)
    assert len(set(waits)) == 5
    assert [line["event"] for line in lines] == ["registered"]


async def test_a_held_registration_that_fails_is_false_until_it_is_taken_again(waits: Waits, lines: list[Any]) -> None:
    seen: list[bool] = []
    async with (
        scripted(answers(200), answers(503), resets(), answers(200)) as server,
        client(server.url, waits) as rank,
    ):

        async def look(seconds: float) -> None:
            seen.append(is_registered(rank))
            if len(seen) == 4:
                raise EnoughError
            await waits(seconds)

        rank._sleep = look
        with pytest.raises(EnoughError):
            await rank.hold(ROW)
    assert seen == [True, False, False, True]
    assert [line["event"] for line in lines if line["log_level"] == "info"] == ["registered"] * 2


async def test_a_held_registration_that_is_refused_ends_loudly(waits: Waits) -> None:
    async with scripted(answers(200), answers(409, "held by epoch 3")) as server, client(server.url, waits) as rank:
        with pytest.raises(RegistryRefused, match="held by epoch 3"):
            await rank.hold(ROW)
        assert not is_registered(rank)


async def test_an_interval_that_cannot_be_is_refused(waits: Waits) -> None:
    async with client("http://127.0.0.1:1", waits) as rank:
        with pytest.raises(ConfigError, match="every_s is 0"):
            await rank.hold(ROW, every_s=0)


# --- looking up ---


async def test_an_incomplete_instance_is_not_ready_in_the_registrys_words(registry_url: str) -> None:
    async with client(registry_url) as rank:
        await rank.register(ROW_OF_TWO)
        with pytest.raises(NotReady, match=r"not fully registered yet \(1 workers registered\)"):
            await rank.topology()


async def test_the_topology_is_awaited_until_the_last_rank_is_there(registry_url: str) -> None:
    async with client(registry_url) as first, client(registry_url) as second, client(registry_url) as decode:
        await first.register(ROW_OF_TWO)
        waiting = asyncio.create_task(decode.await_topology(20))
        await second.register(replace(ROW_OF_TWO, seat=Seat(0, 0, 1, 0)))
        assert await waiting == ROW_OF_TWO.shape


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (answers(503, "3 workers registered"), NotReady, "no topology within 0.3 s: .*3 workers registered"),
        (hangs(), Unreachable, "no topology within 0.3 s: .*"),
        (closes(), Unreachable, "no topology within 0.3 s: .*disconnected"),
    ],
    ids=["incomplete", "hung", "closing"],
)
async def test_an_awaited_topology_has_an_end_and_a_reason(act: Act, kind: type[Exception], words: str) -> None:
    loop = asyncio.get_running_loop()
    async with scripted(otherwise=act) as server, client(server.url) as decode:
        began = loop.time()
        with pytest.raises(kind, match=words):
            await decode.await_topology(0.3)
        assert 0.3 <= loop.time() - began < 3


async def test_a_topology_with_unknown_keys_is_understood() -> None:
    newer = topology_body(SHAPE, 30000) | {"a_field_of_next_year": [1]}
    async with scripted(answers_json(newer)) as server, client(server.url) as decode:
        assert await decode.topology() == SHAPE
    assert server.asked[0][1] == "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"


async def test_a_rank_look_up_outlives_a_lost_connection(waits: Waits) -> None:
    """Stock asks once: 85 of 300 look-ups were lost to closed keep-alive connections."""
    found = answers_json({"rank_ip": "fe80::1", "rank_port": 40123})
    async with (
        scripted(resets(), answers(500), hangs(), found) as server,
        client(server.url, waits, attempt_timeout_s=1.0) as decode,
    ):
        assert await decode.rank(Seat(0, 0, 1, 0)) == Endpoint("fe80::1", 40123)
    assert server.asked[-1][1] == "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=1&target_pp_rank=0"


async def test_a_rank_look_up_that_is_never_answered_ends(waits: Waits) -> None:
    async with (
        scripted(otherwise=answers(404, "Bootstrap info not found")) as server,
        client(server.url, waits) as decode,
    ):
        with pytest.raises(NotReady, match="Bootstrap info not found"):
            await decode.rank(Seat(0, 0, 9, 0))
    assert sum(waits) <= 10
    assert len(server.asked) > 3


@pytest.mark.parametrize(
    "act",
    [
        answers(200, "<html>welcome</html>"),
        answers_json([]),
        answers_json({"rank_ip": "10.0.0.1"}),
        answers(200, "[" * 99999),
    ],
    ids=["html", "array", "field missing", "bottomless"],
)
async def test_what_is_no_registry_is_said_to_be_none(act: Act, waits: Waits) -> None:
    async with scripted(otherwise=act) as server, client(server.url, waits) as decode:
        with pytest.raises(Unreachable, match="is no registry"):
            await decode.rank(Seat(0, 0, 0, 0))


async def test_rooms_are_announced_and_found(registry_url: str) -> None:
    big = 2**63 + 5
    async with client(registry_url) as rank:
        await rank.announce_room(big, 3)
        await rank.announce_room(7, 1)
        await rank.announce_room(7, 2)
        assert await rank.rooms([7, big, 8]) == {7: 2, big: 3}
        assert await rank.rooms([]) == {}


async def test_many_rooms_are_asked_for_in_questions_that_a_stock_registry_takes() -> None:
    rooms = [2**63 + n for n in range(2 * ROOMS_A_QUESTION + 1)]
    async with (
        scripted(answers_json({str(rooms[0]): 0}), answers_json({}), answers_json({str(rooms[-1]): 1})) as server,
        client(server.url) as decode,
    ):
        assert await decode.rooms(rooms) == {rooms[0]: 0, rooms[-1]: 1}
    asked = [body["bootstrap_rooms"] for _, _, body in server.asked]
    assert [len(part) for part in asked] == [ROOMS_A_QUESTION, ROOMS_A_QUESTION, 1]
    assert [room for part in asked for room in part] == rooms
    assert all(len(str(part)) < 1 << 20 for part in asked)


async def test_a_full_room_book_is_asked_again_when_it_said(waits: Waits) -> None:
    async with scripted(answers(429, headers={"Retry-After": "2"})) as server, client(server.url, waits) as rank:
        await rank.announce_room(7, 1)
    assert len(server.asked) == 2
    assert 2 <= waits[0] <= 2.2


@pytest.mark.parametrize(
    ("act", "well"), [(answers(200), True), (answers(503), False), (resets(), False), (hangs(), False)]
)
async def test_health_is_asked_once(act: Act, well: bool) -> None:
    async with scripted(otherwise=act) as server, client(server.url, attempt_timeout_s=1.0) as decode:
        assert await decode.healthy() is well
    assert len(server.asked) == 1


async def test_all_questions_share_one_connection() -> None:
    async with scripted(answers(200), TOPOLOGY) as server, client(server.url) as rank:
        await rank.register(ROW)
        await rank.topology()
        await rank.healthy()
    assert len(server.connections) == 1


# --- where the registry is ---


async def test_a_redirect_is_not_followed_and_its_target_is_named(waits: Waits) -> None:
    async with (
        scripted() as elsewhere,
        scripted(answers(308, headers={"Location": elsewhere.url})) as server,
        client(server.url, waits) as rank,
    ):
        with pytest.raises(RegistryRefused, match=elsewhere.url):
            await rank.register(ROW)
    assert elsewhere.asked == []


@pytest.mark.parametrize("path", ["/", "/pd/blue", "/pd/blue/"])
async def test_a_registry_below_a_path_is_found(path: str) -> None:
    async with scripted() as server, client(server.url + path) as rank:
        await rank.register(ROW)
    assert server.asked[0][1] == path.rstrip("/") + "/route"


@pytest.mark.parametrize(
    "url",
    [
        "10.0.0.1:8998",
        "localhost:8998",
        "",
        "http://",
        "http://:8998",
        "ftp://10.0.0.1",
        "http://10.0.0.1:0",
        "http://10.0.0.1:70000",
        "http://10.0.0.1:x",
        "http://[::1:8998",
        "http://10.0.0.1:8998?",
        "http://10.0.0.1:8998/#a",
        "http://a b:1",
    ],
)
def test_a_url_that_cannot_be_a_registrys_is_refused_with_what_to_write(url: str) -> None:
    with pytest.raises(ConfigError, match="write http://"):
        RegistryClient(url)


@pytest.mark.parametrize("url", ["http://me:hush@10.0.0.1:8998", "me:hush@10.0.0.1:8998", "http://me:hush@10.0.0.1:x"])
def test_a_password_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RegistryClient(url)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_an_attempt_without_an_end_is_refused(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="attempt_timeout_s"):
        RegistryClient("http://10.0.0.1:8998", attempt_timeout_s=timeout_s)


# --- several registries that are one


async def test_the_next_registry_is_asked_when_one_does_not_answer_and_goes_on_being_asked() -> None:
    async with scripted(closes(), closes()) as first, scripted() as second, client(f"{first.url},{second.url}") as rank:
        await rank.register(ROW)
        await rank.register(ROW)
        assert (len(first.asked), len(second.asked), rank.url) == (1, 2, second.url)


async def test_a_registry_that_takes_nothing_is_left_for_one_that_does() -> None:
    async with (
        scripted(otherwise=answers(503, "the journal takes no rows", {"Retry-After": "100"})) as first,
        scripted() as second,
        client(f"{first.url},{second.url}") as rank,
    ):
        await rank.register(ROW)
        assert (len(first.asked), len(second.asked)) == (1, 1)


@pytest.mark.parametrize("ages", [("9", None), ("9", "4")])
async def test_of_answers_from_old_copies_the_freshest_counts(ages: tuple[str, str | None]) -> None:
    old, fresher = ({} if age is None else {"X-Pdctl-Age": age} for age in ages)
    topologies = [replace(SHAPE, page_size=size) for size in (1, 2)]
    bodies = [str(topology_body(shape, None)).replace("'", '"') for shape in topologies]
    bodies = [body.replace("None", "null").replace("True", "true").replace("False", "false") for body in bodies]
    async with (
        scripted(otherwise=answers(200, bodies[0], old)) as first,
        scripted(otherwise=answers(200, bodies[1], fresher)) as second,
        client(f"{first.url},{second.url}") as rank,
    ):
        assert await rank.topology() == topologies[1]
        assert await rank.topology() == topologies[1]
        assert len(first.asked) == (1 if ages[1] is None else 2)


async def test_what_no_registry_can_do_is_told_as_one_would_tell_it() -> None:
    async with (
        scripted(otherwise=answers(503, "first says no")) as first,
        scripted(otherwise=closes()) as second,
        client(f"{first.url},{second.url}") as rank,
    ):
        with pytest.raises(PutOff, match="first says no"):
            await rank.tell(Exchange("a word", "POST", "/said", lambda body: body))
    with pytest.raises(Unreachable):
        async with client(f"{first.url},{second.url}") as rank:
            await rank.tell(Exchange("a word", "POST", "/said", lambda body: body))


async def test_a_final_no_is_final_whoever_else_might_say_yes() -> None:
    async with (
        scripted(otherwise=answers(409, "Inconsistent")) as first,
        scripted() as second,
        client(f"{first.url},{second.url}") as rank,
    ):
        with pytest.raises(RegistryRefused):
            await rank.register(ROW)
        assert not second.asked
