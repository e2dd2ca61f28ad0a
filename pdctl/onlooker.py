"""
Looks at a fleet through its registry, again and again if need be: the overview, and what has happened since.

Changes nothing there. Of several registries that are one the first that answers is looked at; who answers instead of a
registry is said by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
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

    async def events(self, since: int = 0) -> list[Row]:
        """All that it knows from that id on, oldest first. As `overview`."""
        found: list[Row] = []
        while True:
            page = await self._ask("/v1/events", "events", {"since": str(since), "limit": str(_PAGE)})
            found += page["events"]
            following = int(page["next"])
            if not page["events"] or following <= since:
                return found
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


class Following:
    """What happens, each event once, over restarts of the registry too: it begins its ids anew, and not its clock."""

    def __init__(self, onlooker: Onlooker) -> None:
        self._onlooker = onlooker
        self._last: Row | None = None

    async def more(self, since: int = 0) -> list[Row]:
        """What is new; the first time all that is known from the id `since` on. As `Onlooker.events`."""
        last = self._last
        if last is None:
            found = await self._onlooker.events(since)
        else:
            found = await self._after(int(last["id"]), str(last["at"]))
        if found:
            self._last = found[-1]
        return found

    async def _after(self, number: int, at: str) -> list[Row]:
        found = await self._onlooker.events(number)
        if found and (found[0]["id"], found[0]["at"]) == (number, at):
            return found[1:]
        if not found or found[0]["id"] <= number:  # the last one is not there: another registry answers, or it anew
            found = await self._onlooker.events()
        return [event for event in found if event["at"] > at]


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
