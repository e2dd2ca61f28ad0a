"""
A rank's lease: taken, renewed every third of it, taken again when the registry does not know it, and given back.

    register --granted--> renew, renew, ... --404--> register again          the registry forgot us
                               |---------------409--> Superseded              another process holds the seat
                               |--draining, then either--> stay away          an operator wanted us gone, and we are
    cancelled --> goodbye, within a second

Opens no connection: it is given the means to speak (`RegistryClient` has them). Whoever has lost the registry returns
within one third of the lease, drawn anew for each attempt, so that thousands do not return as one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from random import Random, SystemRandom
from typing import Any, NoReturn, Protocol, TypeVar

import structlog

from pdctl.core.exchange import Exchange
from pdctl.core.lives import LONGEST_TTL_S
from pdctl.core.native import Grant, Registration, Renewal, rank_path
from pdctl.core.route import Announcement
from pdctl.core.seconds import check_seconds
from pdctl.errors import PdctlError, RegistryRefused, Superseded
from pdctl.lag import patience
from pdctl.retry import RetryPolicy, Sleep

GOODBYE_WITHIN_S = 3.0
"""A registry that does not answer must not hold up a rank that stops: the lease ends by itself."""

_NO_SUCH_WIRE = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED})

T = TypeVar("T")

log = structlog.get_logger(__name__)


class NoLeases(Exception):
    """The registry does not speak this wire: it is a stock one, or an old one of ours. Use the plain paths."""


class Tell(Protocol):
    """`RegistryClient.tell`."""

    async def __call__(self, exchange: Exchange[T]) -> T: ...


Insist = Callable[[Callable[[], Awaitable[None]], RetryPolicy], Awaitable[None]]
"""Attempts until one succeeds or is refused: `RegistryClient.insist`, told already for whom and for how long."""


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """What is leased: a seat of `instance`, for `ttl_s` seconds from each renewal on.

    ttl_s     None: for good, or until somebody says otherwise; for `take`, when nobody stays to renew
    rooms     how many rooms are under way at the rank, so that a drain knows when it is done; None: nobody knows
    metadata  what stands beside the rank for whoever lists or watches
    """

    instance: str
    announcement: Announcement
    ttl_s: float | None
    role: str = "prefill"
    rooms: Callable[[], int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_seconds(self, "lease")

    @property
    def path(self) -> str:
        return rank_path(self.instance, self.announcement.seat)

    def body(self) -> dict[str, Any]:
        return Registration.of(self.announcement, self.ttl_s, role=self.role, metadata=self.metadata).to_body()


class Lease:
    """One rank's. `hold` it beside the work, in a task of its own; or `take` it, when nobody stays."""

    def __init__(
        self,
        tell: Tell,
        insist: Insist,
        terms: LeaseTerms,
        policy: RetryPolicy | None = None,
        *,
        sleep: Sleep = asyncio.sleep,
        random: Random | None = None,
    ) -> None:
        self._exchange = tell
        self._insist = insist
        self._terms = terms
        self._policy = policy or RetryPolicy()
        self._sleep = sleep
        self._random = random or SystemRandom()
        self._granted: Grant | None = None

    @property
    def granted(self) -> Grant | None:
        """The registry's last word; None while it has given none, or has forgotten us."""
        return self._granted

    async def take(self) -> None:
        """Register, and leave it at that. Raises as `hold`, but for Superseded."""
        await self._insist(self._register, self._policy)

    async def hold(self) -> NoReturn:
        """Until cancelled. Raises NoLeases, Superseded, RegistryRefused, and what the end of all attempts means."""
        try:
            while True:
                await self._insist(self._register, self._policy_now())
                await self._renew_while_known()
        finally:
            await self._say_goodbye()

    async def _register(self) -> None:
        # 409: another host holds the seat. That may pass: its lease ends when it does
        said = await self._tell("registration", "PUT", "", body=self._terms.body(), not_yet=HTTPStatus.CONFLICT)
        self._granted = said
        log.info("registered", **self._named(), epoch=said.epoch, ttl_s=said.ttl_s)

    async def _renew_while_known(self) -> None:
        """Return when the registry does not know the lease any more, and it was not told to let it go."""
        while self._granted is not None:
            await self._sleep(self._every_s(self._granted) * self._random.uniform(0.8, 1.0))
            try:
                await self._insist(self._renew, self._policy_now())
            except RegistryRefused as refused:
                await self._bear(refused, self._granted)
                return

    async def _renew(self) -> None:
        was = self._granted
        assert was is not None  # noqa: S101
        rooms = None if self._terms.rooms is None else self._terms.rooms()
        self._granted = now = await self._tell("renewal", "POST", "/renew", body=asdict(Renewal(was.epoch, rooms)))
        if _is_draining(now) and not _is_draining(was):
            log.warning("draining: the registry gives this rank nothing new", **self._named())

    async def _bear(self, refused: RegistryRefused, was: Grant) -> None:
        """What a refused renewal means: come again, stay away, or an end."""
        if refused.status not in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):
            raise refused
        if _is_draining(was):
            self._granted = None
            log.warning("drained: this rank stays away from the registry until it is started again", **self._named())
            await asyncio.Event().wait()
        if refused.status == HTTPStatus.CONFLICT:
            self._granted = None  # nothing to give back
            raise Superseded(refused.text, held=0, got=was.epoch) from refused
        log.warning("the registry does not know this lease, registering again", **self._named(), epoch=was.epoch)

    async def _say_goodbye(self) -> None:
        granted, self._granted = self._granted, None
        if granted is None:
            return
        try:
            async with patience(GOODBYE_WITHIN_S):
                epoch = {"epoch": str(granted.epoch)}
                await self._exchange(Exchange("goodbye", "DELETE", self._terms.path, _unread, params=epoch))
        except (PdctlError, TimeoutError) as error:
            log.info("goodbye came to nothing, the lease ends by itself", **self._named(), cause=str(error))

    async def _tell(self, what: str, method: str, below: str, *, body: object, not_yet: int | None = None) -> Grant:
        try:
            path = self._terms.path + below
            return await self._exchange(Exchange(what, method, path, _grant, body=body, not_yet=not_yet))
        except RegistryRefused as refused:
            if method == "PUT" and refused.status in _NO_SUCH_WIRE:
                raise NoLeases(refused.text) from refused
            raise

    def _policy_now(self) -> RetryPolicy:
        """Of one who comes for the first time, or of one who was here and was lost."""
        return self._policy if self._granted is None else self._policy.returning(self._every_s(self._granted))

    def _every_s(self, granted: Grant) -> float:
        return (granted.ttl_s or self._terms.ttl_s or LONGEST_TTL_S) / 3

    def _named(self) -> dict[str, str]:
        return {"instance": self._terms.instance, "seat": str(self._terms.announcement.seat)}


def _grant(body: bytes) -> Grant:
    return Grant.from_body(json.loads(body))


def _unread(body: bytes) -> None:
    """A goodbye's status says everything."""


def _is_draining(grant: Grant) -> bool:
    return grant.standing == "draining"
