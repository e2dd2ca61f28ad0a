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
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from random import Random, SystemRandom
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar
from urllib.parse import urlsplit

import aiohttp
import structlog

from pdctl.answers import AGE_HEADER, Answer
from pdctl.core.address import Endpoint, is_loopback
from pdctl.core.exchange import Exchange
from pdctl.core.news import News
from pdctl.core.route import Announcement, Seat, Shape, as_integer, as_object, rank_from_body, shape_from_topology
from pdctl.credentials import Credentials, client_tls, own_token
from pdctl.errors import (
    BadField,
    ConfigError,
    NotNow,
    NotReady,
    PutOff,
    RegistrationGaveUp,
    RegistryRefused,
    Unreachable,
)
from pdctl.retry import Failure, RetryPolicy, Sleep, parse_retry_after, retrying, root_cause
from pdctl.spans import CURRENT, Open, Spans, spanned
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

MAX_ANSWER_BYTES = 1 << 20
"""10,000 rooms are answered with 250 KB. What is longer than this is no registry's."""

ROOMS_A_QUESTION = 10_000
"""Stock refuses bodies above 1 MiB (413): 10,000 rooms of 20 digits are 220 KB."""

_TOPOLOGY = Seat(-1, -1, -1, -1)
_ENDLESS = aiohttp.ClientTimeout(total=None)


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
        if not (math.isfinite(attempt_timeout_s) and attempt_timeout_s > 0):
            raise ConfigError(f"attempt_timeout_s is {attempt_timeout_s}: give a number of seconds above 0")
        self._urls = tuple(_checked(url) for url in base_url.split(","))
        self._at = 0
        self._policy = policy or RetryPolicy()
        self._look_up = look_up
        self._spans = spans
        credentials = credentials or Credentials()
        self._token = own_token(credentials)
        self._certified = credentials.tls_cert is not None
        self._token_may_change = credentials.token_file is not None
        self._tls = client_tls(credentials) if any(url.startswith("https:") for url in self._urls) else None
        self._attempt_timeout_s = attempt_timeout_s
        self._max_connections = max_connections
        self._random = random or SystemRandom()
        self._clock = clock
        self._wall_clock = wall_clock
        self._sleep = sleep
        self._session: aiohttp.ClientSession | None = None
        self._present: Announcement | None = None
        self._confirmed: Announcement | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # no DNS cache: a registry that was replaced behind its name is found by the very next attempt
            connector=aiohttp.TCPConnector(use_dns_cache=False, keepalive_timeout=60.0, limit=self._max_connections),
            timeout=aiohttp.ClientTimeout(total=self._attempt_timeout_s),
            headers={"Accept-Encoding": "identity"},  # so that MAX_ANSWER_BYTES means bytes on the wire
        )
        # aiohttp sends a PUT or GET a second time, unseen, when a connection ends without an answer: attempts that no
        # warning tells of. It has no public switch for it; test_a_lost_connection_is_one_attempt notices when it goes
        self._session._retry_connection = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, self._session, self._confirmed = self._session, None, None
        if session is not None:
            await session.close()

    @property
    def url(self) -> str:
        """The registry that is asked next."""
        return self._urls[self._at]

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
            self._warn_of_eavesdroppers()
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
        """Ask once. Raises RegistryRefused for a final no, PutOff for "not now", and Unreachable."""
        answer = await self._ask(exchange)
        if answer.status == HTTPStatus.OK:
            return self._read(exchange, answer)
        raise self._no(answer, exchange.what, exchange.not_yet)

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
            return (await self._ask(Exchange("health", "GET", "/health", _nothing))).status == HTTPStatus.OK
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

        return follow(lambda cursor: self._stream(cursor, silent_after_s), insist, since)

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

    def _no(self, answer: Answer, what: str, not_yet: int | None = None) -> RegistryRefused | PutOff:
        said = f"{what} with {answer.status}: {answer.text}"
        if answer.is_final and answer.status != not_yet and not self._may_be_let_in(answer):
            return RegistryRefused(
                f"registry {self.url} refused {said}: trying again changes nothing, mend what it names",
                status=answer.status,
                text=answer.text,
            )
        return PutOff(
            f"registry {self.url} put off {said}",
            status=answer.status,
            text=answer.text,
            retry_after_s=answer.retry_after_s,
        )

    def _read(self, question: Exchange[T], answer: Answer) -> T:
        try:
            return question.read(answer.body)
        except (BadField, ValueError, RecursionError) as error:
            raise Unreachable(f"what answers at {self.url} is no registry: {question.what}: {error}") from None

    async def _ask(self, question: Exchange[T]) -> Answer:
        """The answer of the first registry that has a good one, else the best that there is."""
        best: Answer | None = None
        failed: Unreachable | None = None
        for _ in self._urls:
            try:
                answer = await self._ask_one(question)
            except Unreachable as error:
                failed = failed or error
                self._turn("does not answer")
                continue
            if not self._is_poor(question, answer):
                return answer
            if best is None or _rank_of(answer) < _rank_of(best):
                best = answer
            self._turn("has trouble with its journal")
        if best is not None:
            return best
        assert failed is not None  # noqa: S101 - there is one URL at least
        raise failed

    def _is_poor(self, question: Exchange[T], answer: Answer) -> bool:
        """Whether another registry over the same journal may have a better one."""
        if len(self._urls) == 1:
            return False
        return answer.age_s > 0 or (answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR and question.method != "GET")

    def _turn(self, why: str) -> None:
        """Ask the next registry from now on."""
        if len(self._urls) > 1:
            was, self._at = self.url, (self._at + 1) % len(self._urls)
            log.info("another registry is asked", registry=self.url, before=was, why=why)

    async def _ask_one(self, question: Exchange[T]) -> Answer:
        """One HTTP exchange."""
        with self._bridge(f"timed out after {self._attempt_timeout_s:g} s"):
            async with self._request(question.method, question.path, question.params, question.body) as response:
                return await self._received(response)

    @asynccontextmanager
    async def _stream(self, cursor: str | None, silent_after_s: float) -> AsyncIterator[Read]:
        """A watch that the registry has agreed to, from `cursor` on; the next one at another registry if it breaks."""
        try:
            async with self._stream_of_one(cursor, silent_after_s) as read:
                yield read
        except Unreachable:
            self._turn("does not answer")
            raise

    @asynccontextmanager
    async def _stream_of_one(self, cursor: str | None, silent_after_s: float) -> AsyncIterator[Read]:
        params = None if cursor is None else {"since": cursor}  # another registry does not know it, and tells all
        late = f"timed out after {self._attempt_timeout_s:g} s"
        with self._bridge(late):
            async with asyncio.timeout(self._attempt_timeout_s):
                response = await self._request("GET", "/v1/watch", params, timeout=_ENDLESS)

        async def read() -> bytes:
            with self._bridge(f"timed out: it has said nothing for {silent_after_s:g} s"):
                async with asyncio.timeout(silent_after_s):
                    piece = await response.content.readany()
            if not piece:
                raise Unreachable(f"registry {self.url} has ended the stream")
            return piece

        try:
            if response.status != HTTPStatus.OK:
                with self._bridge(late):
                    async with asyncio.timeout(self._attempt_timeout_s):
                        refused = await self._received(response)
                raise self._no(refused, "a watch")
            if response.content_type != "text/event-stream":
                raise Unreachable(f"what answers at {self.url} is no registry: {response.content_type} for a watch")
            yield read
        finally:
            response.close()

    def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        body: object = None,
        timeout: aiohttp.ClientTimeout | None = None,
    ) -> aiohttp.client._RequestContextManager:
        if self._session is None:
            raise RuntimeError("RegistryClient is used outside of its `async with`: open it first")
        return self._session.request(
            method,
            self.url + path,
            params=params,
            json=body,
            headers=self._shown(),
            ssl=True if self._tls is None else self._tls.refresh(),
            allow_redirects=False,
            timeout=timeout or self._session.timeout,
        )

    @contextmanager
    def _bridge(self, late: str) -> Iterator[None]:
        """Where aiohttp's errors become ours; `late` is what a deadline that has passed means."""
        try:
            yield
        except aiohttp.InvalidURL as error:
            raise ConfigError(f"registry URL {self.url} cannot be used ({error}): write http://host:port") from None
        except TimeoutError:
            timed_out = TimeoutError(late)
            raise Unreachable(f"registry {self.url} does not answer: {timed_out}") from timed_out
        except aiohttp.ServerDisconnectedError as error:
            why = self._hung_up(error)
            raise Unreachable(f"registry {self.url} does not answer: {root_cause(why)}") from why
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"registry {self.url} does not answer: {root_cause(error)}") from error

    def _may_be_let_in(self, answer: Answer) -> bool:
        """While a token is changed over, the registry may know the new one before our file does: no rank dies of it."""
        return answer.status == HTTPStatus.UNAUTHORIZED and self._token_may_change

    def _shown(self) -> dict[str, str]:
        """The headers of every question; a file is looked at again for each."""
        token, trace = self._token.refresh(), CURRENT.get()
        shown = {} if token is None else {"Authorization": f"Bearer {token}"}
        return shown if trace is None else shown | trace.headers()

    def _warn_of_eavesdroppers(self) -> None:
        """Once, by who registers: a decode opens a client for every room."""
        if self._token.value is not None and self._tls is None and not is_loopback(urlsplit(self.url).hostname or ""):
            log.warning("token goes over plain HTTP, anyone on the way can read it", registry=self.url)

    def _hung_up(self, error: Exception) -> Exception:
        """What a TLS server does to a client that it does not believe: asyncio closes before the alert is out."""
        if self._tls is None:
            return error
        ours = "may not believe our certificate" if self._certified else "may want a certificate, and we have none"
        return ConnectionError(f"server disconnected: it {ours} (tls_cert)")

    async def _received(self, response: aiohttp.ClientResponse) -> Answer:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise Unreachable(f"what answers at {self.url} is no registry: more than {MAX_ANSWER_BYTES} bytes")
        retry_after_s = parse_retry_after(
            response.headers.get("Retry-After"), now=self._wall_clock(), date=response.headers.get("Date")
        )
        age = response.headers.get(AGE_HEADER, "")
        age_s = float(age) if age.isdecimal() else 0.0
        return Answer(response.status, bytes(body), retry_after_s, response.headers.get("Location"), age_s)


def _rank_of(answer: Answer) -> tuple[bool, float]:
    """The lowest is the best."""
    return answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR, answer.age_s


def _checked(base_url: str) -> str:
    """`base_url` without its last slash. Raises ConfigError for what no registry can be reached by."""
    text = base_url.strip()
    if "@" in text:
        raise ConfigError("registry URL carries a user or password, which would end up in logs: write http://host:port")
    if "://" not in text:
        raise ConfigError(f"registry URL {base_url!r} has no scheme: write http://{text or 'host:port'}")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"registry URL {base_url!r} cannot be read ({error}): write http://host:port") from None
    if parts.scheme not in ("http", "https") or not host or port == 0 or not text.isprintable() or " " in text:
        raise ConfigError(f"registry URL {base_url!r} is none: write http://host:port")
    if "?" in text or "#" in text:
        raise ConfigError(f"registry URL {base_url!r} has a query or a fragment: write http://host:port[/path]")
    return text.rstrip("/")


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
