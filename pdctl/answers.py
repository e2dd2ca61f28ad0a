"""
What an HTTP service has answered, in a form to act on: whether it is final, and the service's own words.

Nothing is asked here. Words are shown, never understood: the registries word their errors differently.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus

LONGEST_TEXT = 500
_MAY_PASS = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})


AGE_HEADER = "X-Pdctl-Age"
"""Whole seconds that an answer may be old, where several registries are one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, whole. `location` is where a redirect would lead; `age_s`, how old it may be, as it says itself."""

    status: int
    body: bytes
    retry_after_s: float | None
    location: str | None
    age_s: float = 0.0

    @property
    def text(self) -> str:
        """The server's own words on one line, from any of the registries' error bodies."""
        if self.location is not None and 300 <= self.status < 400:
            return f"it redirects to {self.location[:LONGEST_TEXT]}: give that URL if it is the registry's"
        words = " ".join(_message(self.body).split())[:LONGEST_TEXT]
        return "".join(c if c.isprintable() else "?" for c in words) or _phrase(self.status)

    @property
    def is_final(self) -> bool:
        """Whether asking again would change nothing. Redirects are not followed: whoever sends one is no registry."""
        return 300 <= self.status < 500 and self.status not in _MAY_PASS


def _message(body: bytes) -> str:
    """Plain text as it is; of a JSON error ({"error": {"message": ...}}), the message."""
    text = body[: 8 * LONGEST_TEXT].decode(errors="replace")
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return text
    return message if isinstance(message, str) else text


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no words"
