"""Waits, bounds and root causes, on a clock that is turned by hand; nothing here sleeps."""

from __future__ import annotations

import asyncio
import errno
import math
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from email.utils import formatdate
from random import Random, SystemRandom

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.errors import ConfigError, PutOff, RegistryRefused, Unreachable
from pdctl.retry import Failure, RetryPolicy, parse_retry_after, retrying, root_cause
from tests.conftest import Clock


class Trial:
    """An attempt that fails as told, on a clock of its own; `slept` are the waits between."""

    def __init__(self, failures: int, error: Callable[[int], Exception] = lambda n: OSError(f"no {n}")) -> None:
        self.clock = Clock(0.0)
        self.slept: list[float] = []
        self.started_at: list[float] = []
        self.told: list[Failure] = []
        self.takes_s = 0.0
        self._failures = failures
        self._error = error

    async def attempt(self) -> str:
        self.started_at.append(self.clock())
        self.clock.forward(self.takes_s)
        if len(self.started_at) > self._failures:
            return "well"
        raise self._error(len(self.started_at))

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.forward(seconds)

    async def run(self, policy: RetryPolicy, seed: int = 7, **more: object) -> str:
        return await retrying(
            policy,
            self.attempt,
            on_failure=self.told.append,
            sleep=self.sleep,
            clock=self.clock,
            random=Random(seed),
            **more,  # type: ignore[arg-type]
        )


policies = st.builds(
    RetryPolicy,
    first_wait_s=st.floats(1e-3, 10),
    multiplier=st.floats(1, 100),
    max_wait_s=st.floats(10, 1e4),
    full_jitter=st.booleans(),
    full_first=st.booleans(),
)


@given(policy=policies, attempt=st.integers(1, 100_000), seed=st.integers())
def test_a_wait_lies_between_its_floor_and_its_ceiling_whatever_the_attempt(
    policy: RetryPolicy, attempt: int, seed: int
) -> None:
    wait, ceiling = policy.wait_s(attempt, Random(seed)), policy.ceiling_s(attempt)
    full = policy.full_jitter or (policy.full_first and attempt == 1)
    assert (0 if full else ceiling / 2) <= wait <= ceiling <= policy.max_wait_s
    assert policy.ceiling_s(attempt) <= policy.ceiling_s(attempt + 1)


def test_waits_double_from_one_second_to_thirty() -> None:
    assert [RetryPolicy().ceiling_s(n) for n in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("full_jitter", [False, True], ids=["equal", "full"])
def test_the_first_waits_of_200_ranks_are_spread(full_jitter: bool) -> None:
    policy = RetryPolicy(full_jitter=full_jitter)
    waits = [policy.wait_s(1, Random(seed)) for seed in range(200)]
    low = 0.0 if full_jitter else 0.5
    tenths = Counter(int((wait - low) / (1 - low) * 10) for wait in waits)
    assert len(tenths) == 10
    assert max(tenths.values()) <= 3 * 200 / 10
    assert len(set(waits)) == 200


async def test_without_a_source_given_jitter_is_the_systems_and_not_the_seeded_one() -> None:
    """Ranks forked from one process inherit the state of `random`, and drew the same waits."""

    async def first_wait() -> float:
        import random

        random.seed(1)
        trial = Trial(failures=1)
        await retrying(RetryPolicy(), trial.attempt, sleep=trial.sleep, clock=trial.clock)
        return trial.slept[0]

    assert len({await first_wait() for _ in range(10)}) == 10
    assert SystemRandom().random() != SystemRandom().random()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"first_wait_s": 0}, "first_wait_s is 0"),
        ({"first_wait_s": math.nan}, "first_wait_s is nan"),
        ({"max_wait_s": math.inf}, "max_wait_s is inf"),
        ({"multiplier": 0.5}, "multiplier is 0.5"),
        ({"first_wait_s": 40}, "max_wait_s 30"),
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"give_up_after_s": -1}, "give_up_after_s is -1"),
        ({"max_retry_after_s": 0}, "max_retry_after_s is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_policy_that_cannot_work_is_refused_with_its_field(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RetryPolicy(**wrong)  # type: ignore[arg-type]


def test_a_policy_is_a_value() -> None:
    assert RetryPolicy() == RetryPolicy(first_wait_s=1.0)
    with pytest.raises(FrozenInstanceError):
        RetryPolicy().first_wait_s = 2.0  # type: ignore[misc]


async def test_it_tries_until_it_is_well_and_tells_each_failure_once_before_its_wait() -> None:
    trial = Trial(failures=3)
    assert await trial.run(RetryPolicy()) == "well"
    assert [failure.attempt for failure in trial.told] == [1, 2, 3]
    assert [failure.next_wait_s for failure in trial.told] == trial.slept
    assert [failure.cause for failure in trial.told] == ["no 1", "no 2", "no 3"]


async def test_what_is_well_at_once_waits_for_nothing_and_tells_nothing() -> None:
    trial = Trial(failures=0)
    assert await trial.run(RetryPolicy()) == "well"
    assert (trial.slept, trial.told) == ([], [])


async def test_a_permanent_failure_is_raised_at_once_and_as_it_is() -> None:
    trial = Trial(failures=9, error=lambda n: ValueError("wrong page size"))
    with pytest.raises(ValueError, match="wrong page size"):
        await trial.run(RetryPolicy(), is_permanent=lambda error: isinstance(error, ValueError), keep_trying=True)
    assert (len(trial.started_at), trial.slept) == (1, [])
    assert [failure.next_wait_s for failure in trial.told] == [None]


async def test_max_attempts_is_the_number_of_attempts() -> None:
    trial = Trial(failures=99)
    with pytest.raises(OSError, match="no 3"):
        await trial.run(RetryPolicy(max_attempts=3))
    assert len(trial.started_at) == 3
    assert [failure.next_wait_s is None for failure in trial.told] == [False, False, True]


@pytest.mark.parametrize("give_up_after_s", [0.01, 1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("takes_s", [0.0, 5.0], ids=["refused", "timed out"])
async def test_no_attempt_starts_after_the_end_and_the_last_comes_near_it(
    give_up_after_s: float, takes_s: float
) -> None:
    trial = Trial(failures=10**6)
    trial.takes_s = takes_s
    with pytest.raises(OSError, match="no"):
        await trial.run(RetryPolicy(give_up_after_s=give_up_after_s))
    assert trial.started_at[-1] <= give_up_after_s
    assert trial.started_at[-1] >= give_up_after_s - max(15.0, takes_s)


async def test_those_who_give_up_together_do_not_make_their_last_attempt_together() -> None:
    last = set()
    for seed in range(50):
        trial = Trial(failures=10**6)
        with pytest.raises(OSError, match="no"):
            await retrying(
                RetryPolicy(give_up_after_s=60),
                trial.attempt,
                sleep=trial.sleep,
                clock=trial.clock,
                random=Random(seed),
            )
        last.add(round(trial.started_at[-1], 2))
    assert len(last) > 40


async def test_the_end_means_what_the_caller_says() -> None:
    trial = Trial(failures=99)
    answer = await trial.run(RetryPolicy(max_attempts=2), on_exhaustion=lambda failure: f"spent {failure.attempt}")
    assert answer == "spent 2"


@pytest.mark.parametrize(
    "policy", [RetryPolicy(max_attempts=2), RetryPolicy(give_up_after_s=2)], ids=["attempts", "seconds"]
)
async def test_who_keeps_trying_goes_on_beyond_the_bounds_at_the_longest_wait(policy: RetryPolicy) -> None:
    trial = Trial(failures=20)
    assert await trial.run(policy, keep_trying=True) == "well"
    assert all(15 <= wait <= 30 for wait in trial.slept[5:])
    assert [failure.attempt for failure in trial.told] == list(range(1, 21))


@pytest.mark.parametrize("hint", [0.0, 3.0, 90.0])
async def test_a_hint_is_a_lower_bound_to_which_jitter_is_added(hint: float) -> None:
    trial = Trial(failures=1)
    await trial.run(RetryPolicy(), wait_hint=lambda error: hint)
    assert hint + 0.5 <= trial.slept[0] <= hint + 1


async def test_a_hint_of_a_day_is_capped() -> None:
    trial = Trial(failures=1)
    await trial.run(RetryPolicy(max_retry_after_s=60), wait_hint=lambda error: 86_400.0)
    assert 60 <= trial.slept[0] <= 61


async def test_a_hint_beyond_the_end_ends_it_without_waiting() -> None:
    trial = Trial(failures=9)
    with pytest.raises(OSError, match="no 1"):
        await trial.run(RetryPolicy(give_up_after_s=10), wait_hint=lambda error: 20.0)
    assert trial.slept == []


async def test_cancellation_is_no_failure() -> None:
    told: list[Failure] = []
    entered = asyncio.Event()

    async def hangs() -> None:
        entered.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(retrying(RetryPolicy(), hangs, on_failure=told.append))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == []


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        (" 1.5 ", 1.5),
        ("0", 0.0),
        (formatdate(1_000_030, usegmt=True), 30.0),
        (formatdate(999_000, usegmt=True), 0.0),
        ("Mon Jan 12 13:47:10 1970", 30.0),  # the oldest form has no zone and means UTC
        ("-3", None),
        ("nan", None),
        ("٣", None),
        ("9" * 5000, None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
    ids=str,
)
def test_both_forms_of_retry_after_are_read(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header, now=1_000_000.0) == seconds


def test_a_date_counts_from_the_servers_own_clock() -> None:
    """Ours may be an hour off; the interval that it means is not."""
    until, said_at = formatdate(5_000_010, usegmt=True), formatdate(5_000_000, usegmt=True)
    assert parse_retry_after(until, now=5_003_600.0, date=said_at) == 10.0


def wrapped(inner: BaseException, *, explicit: bool = True) -> Exception:
    """`inner`, in two wrappers' sentences."""
    try:
        try:
            raise inner
        except BaseException as error:
            if explicit:
                raise RuntimeError("something went wrong") from error
            raise RuntimeError("something went wrong")  # noqa: B904 - the implicit chain is what is tested
    except RuntimeError as error:
        outer = Unreachable("the registry does not answer")
        outer.__cause__ = error
        return outer


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)")
CAUSES = [
    (REFUSED, "connection refused"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "connection reset by peer"),
    (OSError(errno.EHOSTUNREACH, "x"), "no route to host"),
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "name or service not known"),
    (TimeoutError("timed out after 5 s"), "timed out after 5 s"),
    (TimeoutError(), "timed out"),
    (TimeoutError(errno.ETIMEDOUT, "x"), "connection timed out"),
    (
        OSError("Multiple exceptions: [Errno 111] Connect call, [Errno 101] x"),
        "connection refused; network is unreachable",
    ),
    (ExceptionGroup("two", [REFUSED, TimeoutError()]), "connection refused; timed out"),
    (ExceptionGroup("alike", [REFUSED, ConnectionRefusedError(errno.ECONNREFUSED, "y")]), "connection refused"),
    (RegistryRefused("long sentence", status=400, text="page_size: is 16."), "answered 400: page_size: is 16"),
    (PutOff("long sentence", status=503, text="Not yet"), "answered 503: not yet"),
    (
        ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"),
        "[SSL: WRONG_VERSION_NUMBER] wrong version number",
    ),
    (KeyError(), "KeyError"),
]


@pytest.mark.parametrize(("error", "words"), CAUSES, ids=[words for _, words in CAUSES])
@pytest.mark.parametrize("explicit", [True, False], ids=["cause", "context"])
def test_the_root_cause_is_told_and_no_wrappers_sentence(error: Exception, words: str, explicit: bool) -> None:
    assert root_cause(error) == words
    assert root_cause(wrapped(error, explicit=explicit)) == words


def test_a_timeout_kept_by_cancelling_is_a_timeout() -> None:
    late = TimeoutError()
    late.__cause__ = asyncio.CancelledError()
    assert root_cause(late) == "timed out"


def test_what_was_handled_meanwhile_is_not_the_cause() -> None:
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "x")
    refused.__context__ = ValueError("an older story")
    assert root_cause(refused) == "connection refused"


def test_a_suppressed_context_stays_suppressed() -> None:
    error = RuntimeError("what answers is no registry")
    error.__context__ = ValueError("line 1 column 1")
    error.__suppress_context__ = True
    assert root_cause(error) == "what answers is no registry"


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert root_cause(first) == "second"


async def test_who_returns_draws_the_first_wait_from_half_the_period_the_others_from_the_second_half_of_it() -> None:
    policy = RetryPolicy(give_up_after_s=3600).returning(20.0)
    firsts = [policy.wait_s(1, Random(seed)) for seed in range(200)]
    assert min(firsts) < 1 < 9 < max(firsts) <= 10
    later = [policy.wait_s(attempt, Random(7 * attempt)) for attempt in range(2, 200)]
    assert 5 <= min(later) < 6 < 9 < max(later) <= 10
    added = [policy.wait_after_hint_s(3, Random(seed)) for seed in range(200)]
    assert min(added) < 0.1 < 0.9 < max(added) <= 1
    assert policy.give_up_after_s == 3600  # what the operator bounded stays bounded
    trial = Trial(failures=1)
    await trial.run(policy, wait_hint=lambda error: 7.0)
    assert 7 <= trial.slept[0] <= 8


def test_who_returns_waits_no_longer_than_the_operator_allows() -> None:
    assert RetryPolicy(max_wait_s=2.0).returning(10.0).max_wait_s == 2.0
