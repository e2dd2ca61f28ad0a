"""
A watch that goes on: one stream of the registry's changes after another, as if there had been only one.

    open at the last cursor --> news, news, ... --broken, silent or told goodbye--> wait (retry.py) --> open again

Opens no connection: it is given the means to (`RegistryClient` has them). What a stream says is read in `core.news`; a
list or an event that it breaks off in has not been said, and comes again. A registry that does not have what was
missed, or is another process by now, tells all that there is: a `Listed`, wherever in the stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from pdctl.core.events import Events
from pdctl.core.news import Hearing, News
from pdctl.errors import BadField, NotNow, Unreachable
from pdctl.retry import RetryPolicy

WATCH = RetryPolicy(first_wait_s=1.0, max_wait_s=10.0, full_jitter=True, after_hint_s=1.0)
"""Who watches has nothing to do without the news, so that it asks sooner than a rank that has yet to load its weights;
from 0 s on, since all watchers lose one registry at one moment."""

SILENT_AFTER_S = 30.0
"""The registry says every 10 s that it lives (`watch.heartbeat_s`): three of these are missing by then."""

MAX_EVENT_NBYTES = 64 << 20
"""One instance whole: 65,536 ranks, the most that one has, are 26 MB without labels and metadata."""

Read = Callable[[], Awaitable[bytes]]
"""The next bytes of a stream. Raises Unreachable when it has ended, or has been silent for too long."""

Open = Callable[[str | None], AbstractAsyncContextManager[Read]]
"""A stream from a cursor on, or from all there is. Raises as any question to the registry."""

Insist = Callable[[Callable[[], Awaitable[Read]]], Awaitable[Read]]
"""Attempts until one succeeds or is refused."""


async def follow(open_at: Open, insist: Insist, since: str | None = None) -> AsyncGenerator[News, None]:
    """All news after `since`, for ever; from all there is without it.

    Raises RegistryRefused, TooLarge for what no registry sends, and what the end of all attempts means.
    """
    cursor = since
    broken: NotNow | None = None
    while True:
        async with AsyncExitStack() as stack:
            read = await insist(_opening(open_at, cursor, stack, broken))
            events, hearing = Events(MAX_EVENT_NBYTES), Hearing()
            try:
                while True:
                    for event in events.feed(await read()):
                        news = hearing.hear(event)
                        if news is not None:
                            cursor = news.cursor
                            yield news
            except BadField as error:
                broken = Unreachable(f"what sends the stream is no registry: {error}")
            except NotNow as error:
                broken = error


def _opening(
    open_at: Open, cursor: str | None, stack: AsyncExitStack, broken: NotNow | None
) -> Callable[[], Awaitable[Read]]:
    """An attempt. That the stream before it broke is the first failure, so that it is told and waited for as others."""
    failures = [] if broken is None else [broken]

    async def attempt() -> Read:
        if failures:
            raise failures.pop()
        return await stack.enter_async_context(open_at(cursor))

    return attempt
