"""
Asks stock engines that drain what they have under way, and ends the drain when that is nothing. Around core.draining.

It decides nothing, asks nobody but who drains, and never lengthens a drain: the grace ends it in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import NoReturn

import aiohttp
import structlog

from pdctl.core.draining import DrainPolicy, Load, Quiet, draining, load_of, read_loads
from pdctl.core.instances import InstanceView
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Change
from pdctl.errors import BadField, NotNow, Unreachable
from pdctl.retry import root_cause

log = structlog.get_logger(__name__)

Ask = Callable[[str], Awaitable[dict[int, Load]]]
"""The loads at a URL. Raises Unreachable, BadField; held to the deadline from here."""

End = Callable[[str, Collection[int]], Awaitable[None]]
"""The drain of these epochs of an instance is over: `Registrar.drained`."""

MAX_LOAD_NBYTES = 1 << 20
"""1,024 DP ranks are about 700 KB with all sections."""


class Drainer:
    """`view` is what is known of an instance. Subscribe `lives_changed`; `run` is the only loop."""

    def __init__(
        self,
        policy: DrainPolicy,
        view: Callable[[str], InstanceView | None],
        end: End,
        ask: Ask,
        clock: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._view = view
        self._end = end
        self._ask = ask
        self._clock = clock
        self._quiet: dict[str, dict[int, Quiet]] = {}
        self._silent: set[str] = set()  # told once that they do not say
        self._gate = asyncio.Semaphore(policy.max_concurrent)

    def follow(self, instance: str) -> None:
        """Somebody drains there, or may do so."""
        self._quiet.setdefault(instance, {})

    def lives_changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.kind is ChangeKind.DRAINING and change.life.ttl_s is None:
                self.follow(change.instance)

    async def run(self) -> NoReturn:
        """Until cancelled. Leaves no task behind."""
        while True:
            async with asyncio.TaskGroup() as questions:
                for name in list(self._quiet):
                    questions.create_task(self._look_after(name), name=f"drain {name}")
            await asyncio.sleep(self._policy.every_s)

    async def _look_after(self, name: str) -> None:
        view = self._view(name)
        groups = {} if view is None else draining(view)
        if view is None or not groups:
            del self._quiet[name]
            self._silent.discard(name)
            return
        loads, now = await self._loads(view), self._clock()
        quiet = self._quiet[name] = {
            dp: self._known(name, dp, [life.epoch for life in lives]) for dp, lives in groups.items()
        }
        for dp, each in quiet.items():
            each.heard(load_of(loads, dp, view.shape.dp_size), now)
        over = [epoch for each in quiet.values() if each.for_s(now) >= self._policy.quiet_s for epoch in each.epochs]
        if over:
            with contextlib.suppress(NotNow):  # the journal does not take it now: the next time, or the grace
                await self._end(name, over)

    def _known(self, name: str, dp: int, epochs: list[int]) -> Quiet:
        known = self._quiet[name].get(dp)
        return known if known is not None and known.epochs == tuple(epochs) else Quiet(epochs)

    async def _loads(self, view: InstanceView) -> dict[int, Load]:
        """Empty where the engine does not say."""
        url = self._policy.url(view)
        try:
            if url is None:
                raise Unreachable("no rank has announced its API's port")
            async with self._gate, asyncio.timeout(self._policy.deadline_s):
                return await self._ask(url)
        except (TimeoutError, NotNow, BadField) as error:
            if view.name not in self._silent:
                self._silent.add(view.name)
                why = root_cause(error) if isinstance(error, TimeoutError) else str(error)
                log.warning("engine that drains does not say what is under way", instance=view.name, url=url, cause=why)
            return {}


@contextlib.asynccontextmanager
async def asking() -> AsyncIterator[Ask]:
    """How an engine is asked, as long as this is open."""
    connector = aiohttp.TCPConnector(force_close=True, use_dns_cache=False)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        yield lambda url: loads_at(session, url)


async def loads_at(session: aiohttp.ClientSession, url: str) -> dict[int, Load]:
    try:
        async with session.get(url, allow_redirects=False) as answer:
            if answer.status != 200:
                raise Unreachable(f"it answered {answer.status}")
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > MAX_LOAD_NBYTES:
                    raise BadField("loads", f"has more than {MAX_LOAD_NBYTES} bytes")
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable(root_cause(error)) from error
    try:
        return read_loads(json.loads(body))
    except (ValueError, RecursionError) as error:
        raise BadField("loads", f"is not JSON ({error})") from None
