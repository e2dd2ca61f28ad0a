"""
Looks at a fleet through its registry, again and again if need be: the overview, and what has happened since.

Changes nothing there. Of several registries that are one the first that answers is looked at; who answers instead of a
registry is said by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self

import aiohttp

from pdctl.config import Settings
from pdctl.errors import PdctlError, RegistryRefused, Unreachable
from pdctl.identity import Reply, Service
from pdctl.retry import root_cause

Row = Mapping[str, Any]

DEADLINE_S = 30.0
"""The overview of thousands of ranks has megabytes."""
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Wish:
    """Which events: from the id `since` on; of these kinds, all unless named; of this instance."""

    since: int = 0
    kinds: frozenset[str] = frozenset()
    instance: str | None = None

    @property
    def params(self) -> dict[str, str]:
        asked = {"since": str(self.since), "limit": str(_PAGE)}
        if len(self.kinds) == 1:
            asked["kind"] = next(iter(self.kinds))
        return asked if self.instance is None else asked | {"instance": self.instance}


class Onlooker:
    """An `async with`. `url`: who answered last."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._services: list[Service] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for url in self._settings.node.registry.split(","):
            service = Service(url.strip(), self._settings.client, DEADLINE_S)
            self._services.append(await self._stack.enter_async_context(service))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def url(self) -> str:
        return self._services[0].url

    async def overview(self) -> Row:
        """Raises Unreachable, RegistryRefused."""
        return await self._ask("/v1/overview", "instances")

    async def events(self, wish: Wish) -> tuple[Sequence[Row], int]:
        """All that are known of those, oldest first, and from where on the next are. As `overview`."""
        found: list[Row] = []
        since = wish.since
        while True:
            page = await self._ask("/v1/events", "events", Wish(since, wish.kinds, wish.instance).params)
            found += [row for row in page["events"] if not wish.kinds or row["kind"] in wish.kinds]
            following = int(page["next"])
            if not page["events"] or following <= since:
                return found, following
            since = following

    async def _ask(self, path: str, wanted: str, params: Mapping[str, str] | None = None) -> Row:
        """From the first that answers, which is asked first from then on."""
        last: PdctlError | None = None
        for service in list(self._services):
            try:
                found = await self._told(service, path, wanted, params)
            except Unreachable as error:
                last = last or error
                continue
            self._services.remove(service)
            self._services.insert(0, service)
            return found
        assert last is not None  # noqa: S101 - a URL, or several
        raise last

    async def _told(self, service: Service, path: str, wanted: str, params: Mapping[str, str] | None) -> Row:
        try:
            reply = await service.get(path, params)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            why = f"no answer within {DEADLINE_S:g} s" if isinstance(error, TimeoutError) else root_cause(error)
            raise Unreachable(f"registry {service.url} does not answer: {why}") from error
        told = reply.json
        if reply.status == HTTPStatus.OK and isinstance(told, dict) and wanted in told:
            return told
        raise await _no(service, path, reply)


async def _no(service: Service, path: str, reply: Reply) -> PdctlError:
    if reply.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        text = (
            f"registry {service.url} does not let us in ({reply.words}): give --token-file, or ask from a trusted host"
        )
        return RegistryRefused(text, status=reply.status, text=reply.words)
    if 400 <= reply.status < 500 and reply.status != HTTPStatus.NOT_FOUND:
        text = f"registry {service.url} has refused the question: {reply.words}"
        return RegistryRefused(text, status=reply.status, text=reply.words)
    there = await service.identify()
    return Unreachable(
        f"what answers at {service.url} has no {path} ({reply.status}): there is {there.who} ({there.detail}); give "
        "--at with the URL of `pdctl serve`"
    )
