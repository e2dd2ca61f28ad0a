"""
Asks ranks without a lease for a sign of life, and tells the registrar who is dead. The shell around core.witness.

It never decides, never waits for one rank before it asks another, and says nothing over the connections that it makes
to control ports: they are closed as soon as they stand. What it did not hear through its own fault counts for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping

import aiohttp
import structlog

from pdctl.core.lives import Life
from pdctl.core.witness import Means, Question, Sign, Target, Verdict, WitnessPolicy, WitnessTable
from pdctl.metrics import Metrics
from pdctl.retry import root_cause

log = structlog.get_logger(__name__)

Heard = tuple[Sign, str]
Ask = Callable[[Target], Awaitable[Heard]]
"""Puts one question; held to the deadline from here, so it may wait for ever, and must be cancellable."""

FOLLOW_EVERY_S = 1.0
"""10,000 lives are gone through in some milliseconds, so not for each of the changes that a start brings."""
_AT_ONCE = 8

_ANSWERS = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE}
_OURS = {
    *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),  # nothing left to ask with
    *(errno.EADDRNOTAVAIL, errno.ENETDOWN, errno.ENETUNREACH, errno.EACCES, errno.EPERM),  # no way out of this host
}
_ERRNO = re.compile(r"\[Errno (\d+)\]", re.ASCII)


class Witness:
    """`lives` are those to watch; `tell` is told each verdict. `run` is its only loop."""

    def __init__(
        self,
        table: WitnessTable,
        lives: Callable[[], Iterable[Life]],
        tell: Callable[[Verdict], Awaitable[None]],
        ask: Mapping[Means, Ask],
        *,
        clock: Callable[[], float],
        metrics: Metrics,
    ) -> None:
        self._table = table
        self._policy = table.policy
        self._lives = lives
        self._tell = tell
        self._ask = ask
        self._clock = clock
        self._counts = metrics.witness
        self._counts.follow(lambda: len(table), lambda: table.doubts)
        self._asking = 0
        self._follow_at: float | None = clock()
        self._followed_at = clock() - FOLLOW_EVERY_S
        self._doubted = False
        self._news = asyncio.Event()

    def lives_changed(self, changes: object = None) -> None:  # noqa: ARG002 - whatever changed, all are looked at
        """Somebody has come, gone or said something else of himself: look, at most once a second."""
        if self._follow_at is None:
            self._follow_at = max(self._clock(), self._followed_at + FOLLOW_EVERY_S)
            self._news.set()

    async def run(self) -> None:
        """Ask whoever is due, until cancelled. Leaves no task behind."""
        async with asyncio.TaskGroup() as questions:
            while True:
                await self._something_due()
                self._follow()
                free = self._policy.max_concurrent - self._asking
                for question in self._table.ask_due(self._clock(), min(free, _AT_ONCE)):
                    self._asking += 1
                    questions.create_task(self._put(question), name=f"witness {question.target.where}")
                await asyncio.sleep(0)  # look-ups have their turn between two handfuls

    async def _something_due(self) -> None:
        """Return when there is somebody to follow, or to ask and a place for it. Wakes for news, never to look."""
        while True:
            self._news.clear()
            due = self._table.next_due if self._asking < self._policy.max_concurrent else None
            dues = [at for at in (due, self._follow_at) if at is not None]
            wait_s = min(dues) - self._clock() if dues else None
            if wait_s is not None and wait_s <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()

    def _follow(self) -> None:
        now = self._clock()
        if self._follow_at is not None and self._follow_at <= now:
            self._follow_at, self._followed_at = None, now
            self._table.follow(self._lives(), now)

    async def _put(self, question: Question) -> None:
        """Put one question and hand the answer to the table. Only our own stop ends it without one."""
        try:
            sign, detail = await self._heard(question.target)
        finally:
            self._asking -= 1
        verdicts = self._table.answered(question, sign, detail, self._clock())
        self._counts.answered(question.target.means, sign)
        self._news.set()
        self._tell_doubt()
        for verdict in verdicts:
            self._counts.said(verdict.alive)
            await self._tell(verdict)

    async def _heard(self, target: Target) -> Heard:
        try:
            async with asyncio.timeout(self._policy.deadline_s):
                return await self._ask[target.means](target)
        except TimeoutError:
            return Sign.SILENT, f"no answer in {self._policy.deadline_s:g} s"
        except Exception as defect:
            log.warning("question for a sign of life failed on our side", target=target.where, exc_info=defect)
            return Sign.VOID, repr(defect)

    def _tell_doubt(self) -> None:
        if self._table.doubts == self._doubted:
            return
        self._doubted = self._table.doubts
        if self._doubted:
            log.warning("most hosts are silent: nobody is declared dead for it, look at this host's network")
        else:
            log.info("most hosts are heard again")


@contextlib.asynccontextmanager
async def asking(policy: WitnessPolicy) -> AsyncIterator[dict[Means, Ask]]:
    """How each question is put, as long as this is open."""
    async with aiohttp.ClientSession(
        # a kept connection that the engine has closed meanwhile would read as a sign of death
        connector=aiohttp.TCPConnector(limit=policy.max_concurrent, force_close=True, use_dns_cache=False),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        yield {Means.TCP: connect, Means.HTTP: lambda target: get(session, target)}


async def connect(target: Target) -> Heard:
    """Whether something accepts connections at the target."""
    try:
        _, writer = await asyncio.open_connection(target.host, target.port)
    except OSError as error:
        return _sign(error), root_cause(error)
    writer.transport.abort()
    return Sign.WELL, ""


async def get(session: aiohttp.ClientSession, target: Target) -> Heard:
    """Whether the URL is answered, with whatever status below 500."""
    try:
        async with session.get(target.where, allow_redirects=False) as answer:
            return (Sign.WELL, "") if answer.status < 500 else (Sign.UNWELL, f"answered {answer.status}")
    except (aiohttp.ClientSSLError, aiohttp.InvalidURL, ssl.SSLError) as error:
        return Sign.VOID, root_cause(error)
    except aiohttp.ClientConnectorError as error:
        return _sign(error.os_error), root_cause(error)
    except (aiohttp.ClientError, OSError) as error:  # connected, and then it broke or made no sense
        return Sign.UNWELL, root_cause(error)


def _sign(error: OSError) -> Sign:
    """What a connection that did not come about says. Of several addresses the friendliest answer counts."""
    if isinstance(error, socket.gaierror):
        return Sign.SILENT
    numbers = {error.errno} if error.errno else {int(number) for number in _ERRNO.findall(str(error))}
    if numbers & _ANSWERS:
        return Sign.REFUSED
    return Sign.VOID if numbers & _OURS else Sign.SILENT
