"""
Carries a question to a registry, or to the first of several registries that are one which has a good answer, and
brings back what it says: an answer, a stream, a no, or that nobody is there.

Asks once: who asks again does it by a policy, elsewhere. What is asked, `core.exchange` says. The one place where
aiohttp's errors become ours.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import Self, TypeVar
from urllib.parse import urlsplit

import aiohttp
import structlog

from pdctl.answers import AGE_HEADER, Answer
from pdctl.core.address import is_loopback
from pdctl.core.exchange import Exchange
from pdctl.credentials import Credentials, client_tls, own_token
from pdctl.errors import BadField, ConfigError, PutOff, RegistryRefused, Unreachable
from pdctl.retry import parse_retry_after, root_cause
from pdctl.spans import CURRENT

log = structlog.get_logger(__name__)

T = TypeVar("T")
Read = Callable[[], Awaitable[bytes]]

MAX_ANSWER_BYTES = 1 << 20
"""10,000 rooms are answered with 250 KB. What is longer than this is no registry's."""

_ENDLESS = aiohttp.ClientTimeout(total=None)


class Courier:
    """One keep-alive session from `async with` to its end. What the arguments mean, `RegistryClient` says."""

    def __init__(
        self,
        base_url: str,
        *,
        credentials: Credentials,
        max_connections: int,
        attempt_timeout_s: float,
        wall_clock: Callable[[], float],
    ) -> None:
        if not (math.isfinite(attempt_timeout_s) and attempt_timeout_s > 0):
            raise ConfigError(f"attempt_timeout_s is {attempt_timeout_s}: give a number of seconds above 0")
        self._urls = tuple(_checked(url) for url in base_url.split(","))
        self._at = 0
        self._token = own_token(credentials)
        self._certified = credentials.tls_cert is not None
        self._token_may_change = credentials.token_file is not None
        self._tls = client_tls(credentials) if any(url.startswith("https:") for url in self._urls) else None
        self._attempt_timeout_s = attempt_timeout_s
        self._max_connections = max_connections
        self._wall_clock = wall_clock
        self._session: aiohttp.ClientSession | None = None

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

    async def __aexit__(self, *_: object) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @property
    def url(self) -> str:
        """The registry that is asked next."""
        return self._urls[self._at]

    async def tell(self, question: Exchange[T]) -> T:
        """Raises RegistryRefused for a final no, PutOff for "not now", and Unreachable."""
        answer = await self.ask(question)
        if answer.status == HTTPStatus.OK:
            return self._read(question, answer)
        raise self._no(answer, question.what, question.not_yet)

    async def ask(self, question: Exchange[T]) -> Answer:
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
    async def stream(self, cursor: str | None, silent_after_s: float) -> AsyncIterator[Read]:
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

    def warn_of_eavesdroppers(self) -> None:
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
