"""
The short way: a request that has come whole is answered from within the parser's callback, without a task of its own.

An ASGI app may have a method `at_once(scope, body)` beside `__call__`. It is asked first, for every request whose body
came with its head; it gives an Answer, a Promise of one, or None for "go the usual way". Whoever
wraps an app wraps both. What uvicorn does for one ASGI request (a scope, a cycle, an event, a task, two messages with
each header checked twice) takes more than twice as long as such an answer (docs/performance.md).

The usual way is taken for all that is unusual: bodies in several pieces, HTTP/1.0, `Connection: close`, HEAD, escaped
or absolute targets, `Expect`, upgrades, questions behind one that is not answered yet, clients that read too slowly.
No path is known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

Headers = Sequence[tuple[bytes, bytes]]

_METHODS = frozenset({b"GET", b"PUT", b"POST", b"DELETE"})


class Answer:
    """A whole answer, encoded once for both ways; `send` it as often as you like."""

    __slots__ = ("_after", "_before", "_body", "_start")

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        """`headers` with the body's length."""
        self._start: Message = {"type": "http.response.start", "status": status, "headers": list(headers)}
        self._body: Message = {"type": "http.response.body", "body": body}
        lines = [b"%b: %b\r\n" % header for header in headers]
        self._before = b"HTTP/1.1 %d %b\r\n%b" % (status, HTTPStatus(status).phrase.encode(), b"".join(lines))
        self._after = b"\r\n" + body

    async def send(self, send: Send) -> None:
        await send(self._start)
        await send(self._body)

    def on_the_wire(self, headers: Headers) -> bytes:
        """With `headers` of the server's own."""
        return b"".join((self._before, *(b"%b: %b\r\n" % header for header in headers), self._after))


class Promise:
    """An answer that is given later, without a task of its own that waits for it. Awaiting it does as well."""

    __slots__ = ("_hear", "_kept")

    def __init__(self) -> None:
        self._kept: Answer | BaseException | None = None
        self._hear: Callable[[Answer | BaseException], None] | None = None

    def keep(self, answer: Answer | BaseException) -> None:
        """To be called once. An exception: there will be no answer, and why."""
        self._kept = answer
        if self._hear is not None:
            self._hear(answer)

    def then(self, hear: Callable[[Answer | BaseException], None]) -> None:
        """Call `hear` when it is kept, which it may be already. For one who hears."""
        self._hear = hear
        if self._kept is not None:
            hear(self._kept)

    def __await__(self) -> Generator[Any, None, Answer]:
        if self._kept is None:
            kept = asyncio.get_running_loop().create_future()
            self._hear = lambda answer: None if kept.done() else kept.set_result(None)  # noqa: ARG005
            yield from kept
        if isinstance(self._kept, BaseException):
            raise self._kept
        assert self._kept is not None  # noqa: S101
        return self._kept


Answered = Answer | Promise | None


class AtOnce(Protocol):
    """`scope` has what an ASGI scope has, but for `raw_path`. What was counted or changed must not lead to None."""

    def __call__(self, scope: Scope, body: bytes) -> Answered: ...


def nothing_at_once(scope: Scope, body: bytes) -> Answered:  # noqa: ARG001
    return None


def at_once_of(app: ASGIApp) -> AtOnce:
    """The app's short way; the one that leads nowhere where it has none."""
    found: AtOnce = getattr(app, "at_once", nothing_at_once)
    return found


class Beside:
    """An ASGI app out of both ways."""

    def __init__(self, app: ASGIApp, at_once: AtOnce) -> None:
        self._app = app
        self.at_once = at_once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _Pending:
    """Stands where uvicorn has the cycle of the request under way, while an answer is awaited."""

    __slots__ = ("disconnected", "keep_alive", "response_complete")

    def __init__(self) -> None:
        self.response_complete = False
        self.keep_alive = True  # uvicorn takes it away when the server stops
        self.disconnected = False

    @property
    def message_event(self) -> _Pending:
        return self

    def set(self) -> None:
        """Uvicorn wakes whoever waits for more of the body: nobody does."""


_BROKEN = Answer(
    500, [(b"content-length", b"21"), (b"content-type", b"text/plain; charset=utf-8")], b"Internal Server Error"
)


class ShortcutProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 with the short way before the usual one."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._at_once = at_once_of(self.app)
        self._held: list[bytes] | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._held is not None:
            held, self._held = self._held, None
            if not self.transport.is_closing():
                self._go_the_usual_way(b"".join(held))

    def on_headers_complete(self) -> None:
        if self._may_be_short():
            self._held = []
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
        else:
            self._held.append(body)

    def on_message_complete(self) -> None:
        if self._held is None:
            super().on_message_complete()
            return
        body, self._held = b"".join(self._held), None
        answered = self._ask(body)
        if answered is None:
            self._go_the_usual_way(body)
            super().on_message_complete()
        elif isinstance(answered, Answer):
            self._answer(answered)
        else:
            self._answer_later(answered)

    def _may_be_short(self) -> bool:
        return (
            (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
            and not self.expect_100_continue
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and not self.parser.should_upgrade()
            and self.parser.get_method() in _METHODS
            and self.url.startswith(b"/")
            and self.url.isascii()
            and b"%" not in self.url
            and b"#" not in self.url
        )

    def _ask(self, body: bytes) -> Answered:
        path, _, query = self.url.partition(b"?")
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["path"] = path.decode("ascii")
        self.scope["query_string"] = query
        try:
            return self._at_once(self.scope, body)  # type: ignore[arg-type]  # uvicorn's own dict type
        except Exception:  # a defect is no malformed request, which is what the parser would make of it
            self.logger.exception("Exception in the short way")
            return _BROKEN

    def _go_the_usual_way(self, body: bytes) -> None:
        super().on_headers_complete()
        if body:
            super().on_body(body)

    def _answer(self, answer: Answer) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer.on_the_wire(self.server_state.default_headers))
            self.on_response_complete()

    def _answer_later(self, promise: Promise) -> None:
        self.cycle = pending = _Pending()  # type: ignore[assignment]
        promise.then(partial(self._kept, pending))

    def _kept(self, pending: _Pending, kept: Answer | BaseException) -> None:
        """Whoever keeps promises has others to keep as well: nothing is raised here."""
        pending.response_complete = True
        if isinstance(kept, Exception):
            self.logger.error("Exception in the short way", exc_info=kept)
        try:
            self._answer_now(pending, _BROKEN if isinstance(kept, Exception) else kept)
        except Exception:
            self.logger.exception("Exception in the short way")
            self.transport.abort()

    def _answer_now(self, pending: _Pending, answer: Answer | BaseException) -> None:
        if pending.disconnected or self.transport.is_closing():
            return
        if isinstance(answer, BaseException):  # whoever promised is being stopped
            self.transport.close()
            return
        own = self.server_state.default_headers
        self.transport.write(answer.on_the_wire(own if pending.keep_alive else [*own, (b"connection", b"close")]))
        if not pending.keep_alive:
            self.transport.close()
        self.on_response_complete()
