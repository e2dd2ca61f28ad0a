"""
When to try again, and why the last try failed; the only file that imports tenacity.

    attempt 1 --failed--> wait --> attempt 2 --failed--> longer wait --> ... until it is well, hopeless or given up

Knows nothing of HTTP clients and of what is being tried, logs nothing, and never goes on quietly: a failure is shown to
`on_failure` as it happens, and the end of all attempts is an exception or whatever `on_exhaustion` makes of it.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from random import Random, SystemRandom
from typing import Generic, NoReturn, TypeVar

from tenacity import AsyncRetrying, RetryCallState

from pdctl.core.seconds import check_seconds
from pdctl.errors import Behind, ConfigError, PutOff, RegistryRefused, Unreachable

T = TypeVar("T")

Sleep = Callable[[float], Awaitable[None]]

_LONGEST_CAUSE = 300
_SECONDS = re.compile(r"\d{1,9}(\.\d+)?", re.ASCII)
_ERRNO = re.compile(r"\[Errno (\d+)\]", re.ASCII)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to wait after which failure, and when to stop.

    first_wait_s: 1 s. A registry that restarts is back in one or two; a rank that starts loads weights for minutes, so
        asking sooner gains nothing, and a thousand ranks asking sooner keep the registry from coming up.
    multiplier: each wait doubles the last, so that the load of those who wait halves with every round.
    max_wait_s: where doubling ends. 30 s is what an operator who has just mended the registry is ready to watch;
        doubling further would save nothing (1,000 ranks at 30 s are 33 requests a second) and cost minutes.
    full_jitter: False, "equal" jitter: a wait is drawn between half of its ceiling and the whole. Ranks that started
        together spread, and none hammers. True draws from 0 on: twice the spread, for the price of some waits that are
        hardly any; better where thousands lost the same registry at one moment.
    full_first: True: the first wait, and what is added to a `Retry-After`, are drawn from 0 on whatever `full_jitter`
        says of the other waits (`returning`).
    even: False; True, no jitter: each wait is its ceiling. For who alone tries its own thing, and says how far apart.
    max_attempts: None, no bound: an engine that has loaded its weights for ten minutes should not throw them away
        because the registry was slow. Whoever wants an end says so, and says what it means.
    give_up_after_s: no attempt starts later than this after the first one started; None, no bound. The last wait is
        shortened to fit, to a random point of what is left, so that those who give up together do not ask together.
    max_retry_after_s: a `Retry-After` is obeyed up to this. 120 s: a registry sheds load for seconds. A day in that
        header comes from a maintenance page or a proxy, and a rank must not be lost for a day by another's mistake.
    after_hint_s: the longest wait that is added to a `Retry-After`; None, the wait as it would have been without one,
        for whoever tells thousands the same number. pdctl's registry tells each another, in whole seconds: 1 s evens
        that out, and waits drawn wider only leave late-comers (`returning`).
    """

    first_wait_s: float = 1.0
    multiplier: float = 2.0
    max_wait_s: float = 30.0
    full_jitter: bool = False
    full_first: bool = False
    even: bool = False
    max_attempts: int | None = None
    give_up_after_s: float | None = None
    max_retry_after_s: float = 120.0
    after_hint_s: float | None = None

    def __post_init__(self) -> None:
        check_seconds(self, "retry")
        if not (math.isfinite(self.multiplier) and self.multiplier >= 1):
            raise ConfigError(f"retry multiplier is {self.multiplier}: give 1 (no growth) or more")
        if self.first_wait_s > self.max_wait_s:
            raise ConfigError(
                f"retry first_wait_s is {self.first_wait_s} but max_wait_s {self.max_wait_s}: "
                "raise the second or lower the first"
            )
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ConfigError(f"retry max_attempts is {self.max_attempts}: give at least 1, or nothing for no bound")

    def ceiling_s(self, attempt: int) -> float:
        """The longest wait after failure number `attempt` (from 1 on)."""
        try:
            return min(self.first_wait_s * self.multiplier ** (attempt - 1), self.max_wait_s)
        except OverflowError:  # 2.0 ** 1024: nine hours of trying at 30 s
            return self.max_wait_s

    def wait_s(self, attempt: int, random: Random) -> float:
        """The wait after failure number `attempt` (from 1 on), drawn from `random`."""
        return self._jittered_s(self.ceiling_s(attempt), random, full=self.full_first and attempt == 1)

    def longest_wait_s(self, random: Random) -> float:
        """A wait for those who keep trying beyond the bounds."""
        return self._jittered_s(self.max_wait_s, random)

    def wait_after_hint_s(self, attempt: int, random: Random) -> float:
        """What is waited beyond a `Retry-After`."""
        ceiling_s = min(self.ceiling_s(attempt), self.after_hint_s or math.inf)
        return self._jittered_s(ceiling_s, random, full=self.full_first)  # it makes up for whole seconds

    def returning(self, period_s: float) -> RetryPolicy:
        """The policy of one who was registered and said so every `period_s`, until the registry was lost.

        Thousands lose it at one moment, and find it again at one moment. With waits that double from a second on most
        return in a rush and the last half a minute later: of 2,000 clients after 5 s without a registry the fullest
        100 ms held 14 times the mean. With waits drawn from the same stretch each time everybody is back within a
        period, and the fullest 100 ms hold at most 3 times the mean, whatever the outage (tests/test_herd.py). The
        stretch is half a period (from a whole one of 10 s it was 3.4 times), but 5 s where the period allows: 2,000
        clients in 2.5 s are more than the registry's door lets in. A renewal that is lost alone is repeated after a
        quarter to a half of the period, on average.

        Only the first wait has full jitter: it scatters them. Who draws every wait from 0 on is most likely to come
        right after the outage, twice as likely as on average; drawn from the half on it is 1.3 times. Of 2,000 renewals
        after a minute, which no door holds up, the fullest 100 ms held 2.3 times the mean so, and 1.8 times now.
        """
        stretch_s = min(max(period_s / 2, min(period_s, 5.0)), self.max_wait_s)
        return replace(
            self,
            first_wait_s=stretch_s,
            multiplier=1.0,
            max_wait_s=stretch_s,
            full_jitter=False,
            full_first=True,
            after_hint_s=1.0,
        )

    def _jittered_s(self, ceiling_s: float, random: Random, *, full: bool = False) -> float:
        if self.even:
            return ceiling_s
        return random.uniform(0.0 if full or self.full_jitter else ceiling_s / 2, ceiling_s)


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt: its number (from 1 on), what it raised, the wait before the next (None: it was the last)."""

    attempt: int
    error: Exception
    next_wait_s: float | None

    @property
    def cause(self) -> str:
        return root_cause(self.error)


def _nothing_is_permanent(error: Exception) -> bool:  # noqa: ARG001
    return False


def _no_hint(error: Exception) -> float | None:  # noqa: ARG001
    return None


def _tell_nobody(failure: Failure) -> None:
    pass


def _raise_it(failure: Failure) -> NoReturn:
    raise failure.error


async def retrying(
    policy: RetryPolicy,
    attempt: Callable[[], Awaitable[T]],
    *,
    is_permanent: Callable[[Exception], bool] = _nothing_is_permanent,
    wait_hint: Callable[[Exception], float | None] = _no_hint,
    on_failure: Callable[[Failure], None] = _tell_nobody,
    on_exhaustion: Callable[[Failure], T] = _raise_it,
    keep_trying: bool = False,
    sleep: Sleep = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
    random: Random | None = None,
) -> T:
    """What `attempt` returns, as soon as it returns.

    is_permanent   a failure that another attempt would only repeat: raised as it is, at once
    wait_hint      seconds that the other side wants to be left alone: our own wait begins after them. Not instead of
                   it: all who were refused together were told the same number
    on_failure     hears of every failed attempt, once, before the wait
    on_exhaustion  what the end of all attempts means; by default the last error is raised
    keep_trying    there is no end: beyond the policy's bounds every wait is the longest one
    random         where jitter comes from; by default the system's source, so that ranks forked from one process or
                   started with one seed do not draw the same waits

    Only `Exception`s are failures: cancellation goes through.
    """
    run = _Run(policy, is_permanent, wait_hint, on_failure, on_exhaustion, keep_trying, clock, random or SystemRandom())

    try:
        return await attempt()  # mostly that is all, and tenacity takes 40 us to find it so
    except Exception as error:
        failed: list[Exception] = [error]

    async def once() -> T:  # tenacity awaits only what it can see to be a coroutine function
        if failed:
            raise failed.pop()
        return await attempt()

    return await AsyncRetrying(
        sleep=sleep, retry=run.again, wait=run.wait, stop=run.stop, before_sleep=run.tell, retry_error_callback=run.end
    )(once)


async def until_reached(policy: RetryPolicy, attempt: Callable[[], Awaitable[T]]) -> T:
    """What `attempt` returns, tried again while a peer is Unreachable: whatever else it raises is a defect."""
    return await retrying(policy, attempt, is_permanent=lambda error: not isinstance(error, Unreachable))


AT_ONCE = RetryPolicy(first_wait_s=0.001, max_wait_s=0.05, full_jitter=True, give_up_after_s=5.0)
"""Another registry was faster: what it has written is known by now."""


async def deciding(attempt: Callable[[], Awaitable[T]], *, still: Callable[[], bool] = lambda: True) -> T:
    """What `attempt` returns, made again while another registry over the same journal is faster, as long as `still`
    holds. Raises Behind after 5 s, and what else the attempt raises at once.
    """
    return await retrying(AT_ONCE, attempt, is_permanent=lambda error: not isinstance(error, Behind) or not still())


class _Run(Generic[T]):
    """The decisions of one `retrying`; tenacity asks them in the order again, wait, stop, tell or end."""

    def __init__(
        self,
        policy: RetryPolicy,
        is_permanent: Callable[[Exception], bool],
        wait_hint: Callable[[Exception], float | None],
        on_failure: Callable[[Failure], None],
        on_exhaustion: Callable[[Failure], T],
        keep_trying: bool,
        clock: Callable[[], float],
        random: Random,
    ) -> None:
        self._policy = policy
        self._is_permanent = is_permanent
        self._wait_hint = wait_hint
        self._on_failure = on_failure
        self._on_exhaustion = on_exhaustion
        self._keep_trying = keep_trying
        self._clock = clock
        self._random = random
        self._started = clock()
        self._final = False  # whether the attempt under way, or waited for, was fitted in before the end
        self._next_wait_s: float | None = None

    def again(self, state: RetryCallState) -> bool:
        error = _raised(state)
        if not isinstance(error, Exception):
            return False
        if not self._is_permanent(error):
            return True
        self._on_failure(Failure(state.attempt_number, error, None))
        return False

    def wait(self, state: RetryCallState) -> float:
        self._next_wait_s = self._plan(state.attempt_number, _failed(state))
        return self._next_wait_s or 0.0

    def stop(self, state: RetryCallState) -> bool:  # noqa: ARG002
        return self._next_wait_s is None

    def tell(self, state: RetryCallState) -> None:
        self._on_failure(Failure(state.attempt_number, _failed(state), self._next_wait_s))

    def end(self, state: RetryCallState) -> T:
        failure = Failure(state.attempt_number, _failed(state), None)
        self._on_failure(failure)
        return self._on_exhaustion(failure)

    def _plan(self, attempt: int, error: Exception) -> float | None:
        """The wait before the next attempt, None where there shall be none."""
        hint = min(self._wait_hint(error) or 0.0, self._policy.max_retry_after_s)
        wait = self._within_bounds(attempt, hint)
        if wait is None and self._keep_trying:
            return hint + self._policy.longest_wait_s(self._random)
        return wait

    def _within_bounds(self, attempt: int, hint: float) -> float | None:
        left = self._left_s()
        if self._final or attempt >= (self._policy.max_attempts or math.inf) or hint >= left:
            return None
        wait = self._wait_s(attempt, hint)
        if wait <= left:
            return wait
        self._final = True
        return self._random.uniform(max(hint, left / 2), left)

    def _wait_s(self, attempt: int, hint: float) -> float:
        if hint:
            return hint + self._policy.wait_after_hint_s(attempt, self._random)
        return self._policy.wait_s(attempt, self._random)

    def _left_s(self) -> float:
        if self._policy.give_up_after_s is None:
            return math.inf
        return self._policy.give_up_after_s - (self._clock() - self._started)


def _raised(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _failed(state: RetryCallState) -> Exception:
    error = _raised(state)
    assert isinstance(error, Exception)  # noqa: S101 - `again` let nothing else through
    return error


def parse_retry_after(value: str | None, *, now: float, date: str | None = None) -> float | None:
    """Seconds from a `Retry-After` header in either of its forms; None where there is none that can be read.

    now   this host's wall clock, seconds since 1970
    date  the same answer's `Date` header: an HTTP-date counts from there, as the two hosts' clocks may differ
    """
    text = (value or "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    until = _http_date(text)
    if until is None:
        return None
    said_at = _http_date(date or "")
    return max(0.0, until - (now if said_at is None else said_at))


def _http_date(text: str) -> float | None:
    try:
        parsed = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def root_cause(error: BaseException) -> str:
    """Why, in the words of whoever met the trouble first: "connection refused", never a wrapper's sentence."""
    causes = dict.fromkeys(_in_words(root) for root in _roots(error, seen=set()))
    return "; ".join(causes)[:_LONGEST_CAUSE]


def _roots(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    seen.add(id(error))
    below = [inner for inner in _beneath(error) if id(inner) not in seen]
    if not below:
        yield error
    for inner in below:
        yield from _roots(inner, seen)


def _beneath(error: BaseException) -> list[BaseException]:
    """What `error` was made of."""
    if isinstance(error, BaseExceptionGroup):
        return list(error.exceptions)
    inner = getattr(error, "os_error", None) or error.__cause__  # os_error: aiohttp's connector errors
    if inner is None and not error.__suppress_context__ and not _is_telling(error):
        inner = error.__context__
    # a deadline is kept by cancelling: the cancellation under a TimeoutError is how, not why
    return [inner] if isinstance(inner, Exception) else []


def _is_telling(error: BaseException) -> bool:
    """Whether the kernel or the resolver speaks: what was being handled meanwhile is another story."""
    return isinstance(error, OSError) and error.errno is not None


def _in_words(error: BaseException) -> str:
    if isinstance(error, PutOff | RegistryRefused):
        return f"answered {error.status}: {_plain(error.text)}"
    if isinstance(error, ssl.SSLError):
        return _plain(getattr(error, "verify_message", "") or str(error))
    if isinstance(error, socket.gaierror):
        return _plain(error.strerror or str(error))
    if isinstance(error, OSError):
        return _os_error_in_words(error)
    message = getattr(error, "message", None)
    return _plain(message if isinstance(message, str) else str(error)) or type(error).__name__


def _os_error_in_words(error: OSError) -> str:
    # several addresses tried at once, each with its own end: asyncio has only their text left
    numbers = [error.errno] if error.errno else [int(number) for number in _ERRNO.findall(str(error))]
    if numbers:
        return "; ".join(dict.fromkeys(_plain(os.strerror(number)) for number in numbers))
    text = _plain(str(error))
    if isinstance(error, TimeoutError) and not text.startswith("timed out"):
        return "timed out"
    return text or type(error).__name__


def _plain(text: str) -> str:
    """One line, beginning small unless with a name in capitals."""
    line = " ".join(text.split()).strip().rstrip(".:")
    return line[:1].lower() + line[1:] if line[1:2].islower() else line
