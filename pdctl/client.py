"""
What a rank says to the registry and asks it, over SGLang's HTTP wire; pdctl's registry or a stock one. Of pdctl's own
wire: `tell`, by which a lease is held, and `watch`.

`registered` is True only while the registry's last answer about the present announcement was 200. Nothing here carries
on unregistered in silence: the end of all attempts is an exception, an exit, or further attempts with `registered`
False. Error texts are shown, never understood: the two stock registries word them differently.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from random import Random, SystemRandom
from typing import Any, NoReturn, Self, TypeVar

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.exchange import Exchange
from pdctl.core.news import News
from pdctl.core.route import Announcement, Seat, Shape, as_integer, as_object, rank_from_body, shape_from_topology
from pdctl.courier import Courier
from pdctl.credentials import Credentials
from pdctl.errors import (
    ConfigError,
    NotNow,
    NotReady,
    PutOff,
    RegistrationGaveUp,
    Unreachable,
)
from pdctl.retry import Failure, RetryPolicy, Sleep, retrying
from pdctl.spans import Open, Spans, spanned
from pdctl.together import Together
from pdctl.watching import SILENT_AFTER_S, WATCH, Read, follow

log = structlog.get_logger(__name__)

T = TypeVar("T")

LOOK_UP = RetryPolicy(first_wait_s=0.1, max_wait_s=2.0, give_up_after_s=10.0)
"""For questions that a request waits for. Stock asks once, and one lost keep-alive connection costs the request (85 of
300 look-ups); a prefill gives its rooms 300 s, so 10 s of asking is affordable and still an answer for the user."""

POLL = RetryPolicy(first_wait_s=0.2, multiplier=1.5, max_wait_s=1.0)
"""For an instance that is coming up: not a failure but a state, so it is asked about as often as stock does (1 s)."""

LOST_CONNECTION = RetryPolicy(first_wait_s=0.02, max_wait_s=0.2, max_attempts=5)
"""For one question that may meet a kept connection that has been lost meanwhile, or several; not for a registry that is
down: whoever asks then hears so within half a second."""

_CONNECTIONS = 8  # of a decode rank to one registry, for the questions of its rooms

ROOMS_A_QUESTION = 10_000
"""Stock refuses bodies above 1 MiB (413): 10,000 rooms of 20 digits are 220 KB."""

_TOPOLOGY = Seat(-1, -1, -1, -1)


class Exhaustion(StrEnum):
    """What it means that every attempt the policy allows has failed; the caller chooses."""

    RAISE = "raise"  # RegistrationGaveUp
    EXIT = "exit"  # the process ends with EX_UNAVAILABLE (69): for ranks under a supervisor that starts them again
    KEEP_TRYING = "keep-trying"  # at the policy's longest wait, with `registered` False


class RegistryClient:
    """One rank's side of the registry; one keep-alive session from `async with` to its end.

    base_url           http://host:port, or with a path where the registry is mounted below one; several, with commas,
                       of registries that are one (one etcd): where one does not answer, has trouble, or answers from
                       an old copy, the next is asked, and goes on being asked
    policy             for registrations; `look_up` for the questions that a request waits for
    credentials        what is shown to the registry, and whose certificate is believed
    spans              who wants one of each registration
    attempt_timeout_s  for one attempt, from name resolution to the answer's last byte
    max_connections    at once; a question that finds none free waits for one, within its attempt
    """

    def __init__(
        self,
        base_url: str,
        *,
        max_connections: int = 100,
        policy: RetryPolicy | None = None,
        look_up: RetryPolicy = LOOK_UP,
        credentials: Credentials | None = None,
        spans: Spans | None = None,
        attempt_timeout_s: float = 5.0,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._courier = Courier(
            base_url,
            credentials=credentials or Credentials(),
            max_connections=max_connections,
            attempt_timeout_s=attempt_timeout_s,
            wall_clock=wall_clock,
        )
        self._policy = policy or RetryPolicy()
        self._look_up = look_up
        self._spans = spans
        self._random = random or SystemRandom()
        self._clock = clock
        self._sleep = sleep
        self._together: Together[Hashable, Any] = Together()
        self._present: Announcement | None = None
        self._confirmed: Announcement | None = None

    async def __aenter__(self) -> Self:
        await self._courier.__aenter__()
        return self

    async def __aexit__(self, *ended: object) -> None:
        self._confirmed = None
        await self._courier.__aexit__(*ended)

    @property
    def url(self) -> str:
        """The registry that is asked next."""
        return self._courier.url

    @property
    def registered(self) -> bool:
        """Whether the registry's last answer about the present announcement was 200.

        False again from the first failed repetition on: a registry that is down may come back without us. An attempt
        that is cancelled says nothing, and changes nothing.
        """
        return self._present is not None and self._confirmed == self._present

    async def register(
        self,
        announcement: Announcement,
        exhaustion: Exhaustion = Exhaustion.RAISE,
        policy: RetryPolicy | None = None,
    ) -> None:
        """Announce until the registry has taken it, by the client's policy or this one. Harmless to repeat.

        Raises RegistryRefused at once where the registry says no; at the policy's end RegistrationGaveUp or SystemExit.
        """
        await self.insist(announcement, lambda: self._announce(announcement), policy or self._policy, exhaustion)

    async def insist(
        self,
        announcement: Announcement,
        attempt: Callable[[], Awaitable[None]],
        policy: RetryPolicy,
        exhaustion: Exhaustion = Exhaustion.RAISE,
    ) -> None:
        """`attempt` to register until it succeeds or is refused; `registered` says how it stands. As `register`."""
        if self._present is None:
            self._courier.warn_of_eavesdroppers()
        self._present = announcement

        async def confirmed() -> None:
            await attempt()
            self._confirmed = announcement

        async def until_confirmed(span: Open | None) -> None:
            if span is not None:
                span.show(seat=str(announcement.seat), registry=self.url)
            await self._retrying(
                confirmed,
                policy,
                on_failure=lambda failure: self._not_registered(announcement, failure, span),
                on_exhaustion=lambda failure: self._gave_up(announcement, failure),
                keep_trying=exhaustion is Exhaustion.KEEP_TRYING,
            )

        try:
            await spanned(None if self.registered else self._spans, "pdctl.registration", until_confirmed)
        except RegistrationGaveUp as gave_up:
            self._exit_or_raise(gave_up, exhaustion)

    def _exit_or_raise(self, gave_up: RegistrationGaveUp, exhaustion: Exhaustion) -> NoReturn:
        if exhaustion is Exhaustion.EXIT:
            log.error(
                "registration gave up, exiting", attempts=gave_up.attempts, cause=gave_up.cause, registry=self.url
            )
            raise SystemExit(os.EX_UNAVAILABLE) from gave_up
        raise gave_up

    async def tell(self, exchange: Exchange[T]) -> T:
        """Ask once, and what is only looked up together with all who ask it now. Raises RegistryRefused for a final no,
        PutOff for "not now", and Unreachable."""
        if exchange.method != "GET":
            return await self._courier.tell(exchange)
        what = exchange.path, frozenset((exchange.params or {}).items())
        said: T = await self._together.ask(what, lambda: self._courier.tell(exchange))
        return said

    async def hold(
        self, announcement: Announcement, every_s: float = 10.0, exhaustion: Exhaustion = Exhaustion.RAISE
    ) -> NoReturn:
        """Register, then say it again every `every_s` or a little sooner, so that a registry that forgot learns it.

        Ends only as `register` does, or by cancellation.
        """
        if not (math.isfinite(every_s) and every_s > 0):
            raise ConfigError(f"every_s is {every_s}: give a number of seconds above 0")
        await self.register(announcement, exhaustion)
        while True:
            await self._sleep(every_s * self._random.uniform(0.8, 1.0))
            await self.register(announcement, exhaustion, self._policy.returning(every_s))

    async def topology(self, policy: RetryPolicy | None = None) -> Shape:
        """The instance's shape, asked for once; where nobody answers, again by `policy`. Raises NotReady with the
        registry's words while it is incomplete."""
        question = _about(_TOPOLOGY, "topology", shape_from_topology)
        if policy is None:
            return await self.tell(question)
        answered = lambda error: not isinstance(error, Unreachable)  # noqa: E731
        return await self._retrying(lambda: self.tell(question), policy, is_permanent=answered)

    async def await_topology(self, deadline_s: float) -> Shape:
        """The shape, as soon as the instance is complete. After `deadline_s` NotReady or Unreachable, and why."""
        last: NotNow = Unreachable(f"registry {self.url} has not answered yet")

        def remember(failure: Failure) -> None:
            nonlocal last
            if isinstance(failure.error, NotNow):
                last = failure.error

        try:
            async with asyncio.timeout(deadline_s):
                return await self._retrying(self.topology, POLL, on_failure=remember)
        except TimeoutError:
            kind = NotReady if isinstance(last, NotReady) else Unreachable
            raise kind(f"no topology within {deadline_s:g} s: {last}") from last

    async def rank(self, seat: Seat) -> Endpoint:
        """Where the rank in `seat` listens. A seat that the registry does not know (404) may still come: NotReady."""
        return await self._patiently(_about(seat, f"look-up of {seat}", rank_from_body, HTTPStatus.NOT_FOUND))

    async def announce_room(self, room: int, dp_rank: int) -> None:
        """Say which DP rank has the room. The last one said wins, so repeating is harmless."""
        body = {"bootstrap_room": room, "dp_rank": dp_rank}
        await self._patiently(Exchange("announcement of a room", "POST", "/register_dp_rank", _nothing, body=body))

    async def rooms(self, rooms: Iterable[int]) -> dict[int, int]:
        """The DP rank of each of `rooms` that the registry knows; the others are absent."""
        wanted, found = list(dict.fromkeys(rooms)), dict[int, int]()
        for start in range(0, len(wanted), ROOMS_A_QUESTION):
            body = {"bootstrap_rooms": wanted[start : start + ROOMS_A_QUESTION]}
            question: Exchange[dict[int, int]] = Exchange(
                "question for rooms", "POST", "/query_dp_ranks", _from_json(_dp_ranks), body=body
            )
            answer: dict[int, int] = await self._patiently(question)
            found |= answer
        return found

    async def healthy(self) -> bool:
        """Whether the registry answers /health with 200; asked once, whatever is wrong means no."""
        try:
            return (await self._courier.ask(Exchange("health", "GET", "/health", _nothing))).status == HTTPStatus.OK
        except Unreachable:
            return False

    def watch(
        self, since: str | None = None, *, policy: RetryPolicy = WATCH, silent_after_s: float = SILENT_AFTER_S
    ) -> AsyncGenerator[News, None]:
        """What happens at the registry, from now on: `Listed` with all there is, then each `Changed`; for ever.

        since           the cursor of the last news that was taken, to go on from there: no `Listed` then, unless the
                        registry does not have what came after it. A `Listed` may come at any time, for that reason
        policy          waits before a stream that broke is opened again
        silent_after_s  a stream that says nothing for so long, not even that it lives, is dead

        Raises RegistryRefused where the registry says no (one that has no watch says 404). Close it, with
        `contextlib.aclosing`, when it is left early. Who takes no news for 10 s is cut off by the registry, and goes on
        with what it missed.
        """

        def say(failure: Failure) -> None:
            wait_s = None if failure.next_wait_s is None else round(failure.next_wait_s, 3)
            log.warning("watch interrupted", cause=failure.cause, next_wait_s=wait_s, registry=self.url)

        async def insist(attempt: Callable[[], Awaitable[Read]]) -> Read:
            return await self._retrying(attempt, policy, on_failure=say)

        return follow(lambda cursor: self._courier.stream(cursor, silent_after_s), insist, since)

    async def _announce(self, announcement: Announcement) -> None:
        await self.tell(Exchange("registration", "PUT", "/route", _nothing, body=announcement.to_body()))
        if not self.registered:
            log.info("registered", registry=self.url, seat=str(announcement.seat), address=str(announcement.address))

    def _not_registered(self, announcement: Announcement, failure: Failure, span: Open | None) -> None:
        self._confirmed = None
        if span is not None:
            span.say("attempt failed", attempt=failure.attempt, cause=failure.cause)
        log.warning(
            "registration attempt failed",
            attempt=failure.attempt,
            cause=failure.cause,
            next_wait_s=None if failure.next_wait_s is None else round(failure.next_wait_s, 3),
            registry=self.url,
            seat=str(announcement.seat),
        )

    def _gave_up(self, announcement: Announcement, failure: Failure) -> NoReturn:
        raise RegistrationGaveUp(
            f"registration of {announcement.seat} with {self.url} failed {failure.attempt} times, at last: "
            f"{failure.cause}: see that the registry runs and can be reached from here, or allow more attempts",
            attempts=failure.attempt,
            cause=failure.cause,
        ) from failure.error

    async def _patiently(self, question: Exchange[T]) -> T:
        """`tell`, asked again by the look-up policy."""

        def say(failure: Failure) -> None:
            said = {"what": question.what, "attempt": failure.attempt, "cause": failure.cause}
            log.info("registry question failed", **said, registry=self.url)

        return await self._retrying(lambda: self.tell(question), self._look_up, on_failure=say)

    async def _retrying(self, attempt: Callable[[], Awaitable[T]], policy: RetryPolicy, **more: Any) -> T:
        usual: dict[str, Any] = {
            "is_permanent": lambda error: not isinstance(error, NotNow),
            "wait_hint": lambda error: error.retry_after_s if isinstance(error, PutOff) else None,
            "sleep": self._sleep,
            "clock": self._clock,
            "random": self._random,
        }
        return await retrying(policy, attempt, **usual | more)


def _about(seat: Seat, what: str, read: Callable[[object], T], not_yet: int | None = None) -> Exchange[T]:
    """The question for one seat; stock's way to ask for the topology is the seat of which all four parts are -1."""
    params = {
        "prefill_dp_rank": str(seat.dp),
        "prefill_cp_rank": str(seat.cp),
        "target_tp_rank": str(seat.tp),
        "target_pp_rank": str(seat.pp),
    }
    return Exchange(what, "GET", "/route", _from_json(read), params=params, not_yet=not_yet)


def _from_json(read: Callable[[object], T]) -> Callable[[bytes], T]:
    return lambda body: read(json.loads(body))


def _nothing(body: bytes) -> None:
    """A reader for answers whose status says everything."""


def _dp_ranks(body: object) -> dict[int, int]:
    return {as_integer(room, "room"): as_integer(rank, "dp_rank") for room, rank in as_object(body).items()}


@dataclass(slots=True)
class _Kept:
    client: RegistryClient
    users: int = 0


class Registries:
    """A client for each registry that is asked, kept from question to question: of what a small room costs a decode
    rank, a session and a connection of its own were a third. Open with `async with`.

    Of those that nobody asks just now, `max_idle` are kept. Few connections each: the answers to 64 rooms that come at
    one moment hold the loop for 15 ms, those to 8 for 2.
    """

    def __init__(self, max_idle: int = 16) -> None:
        self._max_idle = max_idle
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._kept:
            await self._kept.popitem()[1].client.__aexit__(None, None, None)

    @asynccontextmanager
    async def asking(self, url: str, policy: RetryPolicy, credentials: Credentials) -> AsyncIterator[RegistryClient]:
        """Raises ConfigError for what is no URL. How it is asked, the first question says."""
        kept = self._kept.get(url)
        if kept is None:
            client = RegistryClient(url, policy=policy, credentials=credentials, max_connections=_CONNECTIONS)
            kept = self._kept[url] = _Kept(client)
            await client.__aenter__()  # which waits for nothing
        self._kept.move_to_end(url)
        kept.users += 1
        try:
            yield kept.client
        finally:
            kept.users -= 1
            await self._make_room()

    async def _make_room(self) -> None:
        idle = [url for url, kept in self._kept.items() if not kept.users]
        for url in idle[: max(0, len(idle) - self._max_idle)]:
            await self._kept.pop(url).client.__aexit__(None, None, None)
