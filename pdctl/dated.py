"""
How old an answer may be, where several registries are one: `X-Pdctl-Age`, in whole seconds, on each that is not fresh.

Fresh: a majority of the journal's members has confirmed within FRESH_S that nothing newer is there. An older answer is
given all the same: who is in which seat changes seldom, and no answer helps nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdctl.answers import AGE_HEADER
from pdctl.shortcut import Answered, at_once_of

FRESH_S: Final = 3.0
_HEADER: Final = AGE_HEADER.lower().encode()


class Dated:
    """An ASGI application around another."""

    def __init__(self, inner: ASGIApp, age_s: Callable[[], float]) -> None:
        self._inner = inner
        self._age_s = age_s
        self._at_once = at_once_of(inner)

    def at_once(self, scope: Scope, body: bytes) -> Answered:
        """The short way, for answers that are fresh."""
        return self._at_once(scope, body) if self._age_s() <= FRESH_S else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        age_s = self._age_s() if scope["type"] == "http" else 0.0
        if age_s <= FRESH_S:
            await self._inner(scope, receive, send)
            return

        async def dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (_HEADER, str(int(age_s)).encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self._inner(scope, receive, dated)
