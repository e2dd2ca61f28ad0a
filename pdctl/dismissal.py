"""
Takes an instance, or one rank of it, out of service in order: nothing new for it, and gone when what it has is done.

The registry does it, and goes on with it when nobody waits any more. Here is only asked for it, and watched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from pdctl.client import RegistryClient
from pdctl.config import Settings
from pdctl.core.exchange import Exchange
from pdctl.core.native import Drain, instance_path, rank_path, read_seat
from pdctl.core.news import Changed, Listed, News, Rank
from pdctl.core.report import short_seat
from pdctl.core.route import Seat
from pdctl.errors import BadField, NotReady, Unreachable

BEYOND_S = 15.0
"""A drain that nobody ends is over with its grace; the registry looks at that every second, and tells at once."""


_VLLM = "vllm:"


@dataclass(frozen=True, slots=True)
class Whom:
    """An instance, and a seat of it; None: all of them."""

    instance: str
    seat: Seat | None = None

    @classmethod
    def parse(cls, instance: str, rank: str | None = None) -> Whom:
        """From `p`, `p tp1` or `p/tp1`. Raises BadField."""
        if instance.startswith(_VLLM):
            raise BadField("instance", f"{instance!r} is vLLM's: its decodes keep whom they asked for, stop it instead")
        name, _, within = instance.partition("/")
        seat = rank or within
        instance_path(name)
        return cls(name, read_seat(seat.replace("/", "-")) if seat else None)

    def __str__(self) -> str:
        return self.instance if self.seat is None else f"{self.instance}/{short_seat(self.seat)}"

    @property
    def path(self) -> str:
        return instance_path(self.instance) if self.seat is None else rank_path(self.instance, self.seat)


@dataclass(frozen=True, slots=True)
class Gone:
    """A rank that has gone, `after_s` since it was asked to; `left` are still there. `how` is the registry's word."""

    rank: str
    how: str
    after_s: float
    left: int


async def drain(settings: Settings, whom: Whom, grace_s: float) -> None:
    """Ask for it. Raises RegistryRefused for who is not there or not ours, PutOff, Unreachable, BadField."""
    async with _client(settings) as client:
        await _ask(client, whom, grace_s)


async def drain_and_wait(
    settings: Settings,
    whom: Whom,
    grace_s: float,
    *,
    asked: Callable[[int], None],
    tell: Callable[[Gone], None],
    beyond_s: float = BEYOND_S,
) -> None:
    """Ask for it, and return when all are gone. As `drain`; NotReady when some stay `beyond_s` after the grace.

    `asked` hears how many drain, `tell` of each that has gone.
    """
    async with _client(settings) as client, aclosing(client.watch()) as news:
        going = await _present(news, whom)
        await _ask(client, whom, grace_s)
        asked(len(going))
        try:
            async with asyncio.timeout(grace_s + beyond_s):
                await _until_gone(news, going, whom, tell)
        except TimeoutError:
            names = ", ".join(sorted(f"{whom.instance}/{short_seat(seat)}" for seat in going.values())[:5])
            raise NotReady(
                f"{names} did not go in {grace_s + beyond_s:g} s: `pdctl explain {whom}` says how it stands"
            ) from None


async def _present(news: AsyncGenerator[News, None], whom: Whom) -> dict[int, Seat]:
    """By epoch. The first news of a watch is all there is."""
    try:
        async with asyncio.timeout(30.0):
            listed = await anext(news)
    except TimeoutError:
        raise Unreachable("the registry has not said who is there for 30 s: look at it with `pdctl status`") from None
    return _ranks(listed, whom) if isinstance(listed, Listed) else {}


async def _until_gone(
    news: AsyncGenerator[News, None], going: dict[int, Seat], whom: Whom, tell: Callable[[Gone], None]
) -> None:
    began = time.monotonic()
    while going:
        each = await anext(news)
        for epoch, how in _over(each, going, whom):
            seat = going.pop(epoch)
            tell(Gone(f"{whom.instance}/{short_seat(seat)}", how, time.monotonic() - began, len(going)))


def _over(news: News, going: dict[int, Seat], whom: Whom) -> list[tuple[int, str]]:
    """Who of them is gone by this, and how."""
    if isinstance(news, Listed):
        here = _ranks(news, whom)
        return [(epoch, "gone") for epoch in going if epoch not in here]
    if isinstance(news, Changed) and news.instance == whom.instance:
        how = news.kind if news.why is None else f"{news.kind}, {news.why}"
        return [(epoch, how) for epoch in news.gone if epoch in going]
    return []


def _ranks(listed: Listed, whom: Whom) -> dict[int, Seat]:
    instance = listed.instances.get(whom.instance)
    ranks: list[Rank] = [] if instance is None else list(instance.ranks.values())
    return {rank.epoch: rank.seat for rank in ranks if whom.seat in (None, rank.seat)}


async def _ask(client: RegistryClient, whom: Whom, grace_s: float) -> None:
    body = {"grace_s": Drain(grace_s).grace_s}
    await client.tell(Exchange(f"drain of {whom}", "POST", f"{whom.path}/drain", lambda _: None, body=body))


def _client(settings: Settings) -> RegistryClient:
    return RegistryClient(settings.node.registry, policy=settings.retry, credentials=settings.client)
