"""
Server-sent events out of a stream of bytes, wherever it was cut.

No sockets and no JSON: pieces go in, whole events come out. What a stream ends in the middle of was never said.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.errors import TooLarge


@dataclass(frozen=True, slots=True)
class Event:
    """`kind` is "message" where the stream names none; `id` None where this event has none of its own."""

    kind: str
    data: bytes
    id: str | None = None


class Events:
    """One stream's. A line, and all lines of one event, have `max_nbytes` at most."""

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._line: list[bytes] = []  # of the line that has not ended yet: joined once, however many pieces it takes
        self._data: list[bytes] = []
        self._kind = ""
        self._id: str | None = None
        self._nbytes = 0

    def feed(self, piece: bytes) -> list[Event]:
        """The events that end in `piece`. Raises TooLarge."""
        first, *others = piece.split(b"\n")
        self._hold(first)
        found = []
        for start in others:
            line, self._line = b"".join(self._line), []
            event = self._read(line.removesuffix(b"\r"))
            if event is not None:
                found.append(event)
            self._hold(start)
        return found

    def _hold(self, part: bytes) -> None:
        self._line.append(part)
        self._nbytes += len(part)
        if self._nbytes > self._max_nbytes:
            raise TooLarge(f"an event of the stream has more than {self._max_nbytes} bytes: is it a registry's?")

    def _read(self, line: bytes) -> Event | None:
        """One line; an empty one ends an event."""
        if not line:
            return self._ended()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._kind = value.decode(errors="replace")
        elif name == b"id":
            self._id = value.decode(errors="replace")
        if name != b"data":
            self._nbytes -= len(line)  # comments and fields that nobody knows cost nothing, however many they are
        return None

    def _ended(self) -> Event | None:
        """An event without data is none."""
        event = Event(self._kind or "message", b"\n".join(self._data), self._id) if self._data else None
        self._data, self._kind, self._id, self._nbytes = [], "", None, 0
        return event
