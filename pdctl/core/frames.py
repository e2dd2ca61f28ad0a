"""
How a frame of the control link holds a number, a list, pages or an address; read and written side by side.

Numbers are decimal ASCII, packed integers little-endian. What a message means is not known here (core.wire); whatever
the bytes are, nothing is raised but BadFrames, which names the message, the frame and what it should hold.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdctl.core.address import Endpoint
from pdctl.errors import BadField, BadFrames

Frames = Sequence[bytes]
Pages = npt.NDArray[np.int32]
IntLists = tuple[tuple[int, ...], ...]

MAX_TEXT = 512  # a session, a host, a reason: what a log line can bear
MAX_ROOM = 2**64 - 1  # stock routers draw 63 bits
DECIMAL = re.compile(rb"[0-9]{1,20}")
_PAGE = np.dtype("<i4")


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads one message's frames by number; every refusal names the message, the frame and what it should hold."""

    message: str
    frames: Frames
    needed: int

    def __post_init__(self) -> None:
        if len(self.frames) < self.needed:
            raise BadFrames(
                f"{self.message}: {len(self.frames)} frames, needs {self.needed}: the sender is no SGLang rank"
            )

    def bad(self, index: int, what: str, problem: str) -> BadFrames:
        return BadFrames(f"{self.message} frame {index} ({what}): {problem}")

    def frame(self, index: int) -> bytes:
        """Empty where the message is shorter: old peers leave frames out, new ones leave them empty."""
        return self.frames[index] if index < len(self.frames) else b""

    def number(self, index: int, what: str, *, low: int = 0, high: int = 2**63 - 1) -> int:
        raw = self.frame(index)
        # not int() alone: it takes "1_000", " 7\n" and digits of other alphabets
        if not DECIMAL.fullmatch(raw) or not low <= int(raw) <= high:
            raise self.bad(index, what, f"{raw[:32]!r} is no number from {low} to {high}")
        return int(raw)

    def optional(self, index: int, what: str, default: int) -> int:
        return self.number(index, what) if self.frame(index) else default

    def room(self, index: int) -> int:
        return self.number(index, "room", high=MAX_ROOM)

    def session(self, index: int) -> str:
        raw = self.frame(index)
        text = raw.decode("ascii", errors="replace")
        if not 1 <= len(raw) <= MAX_TEXT or not text.isascii() or not text.isprintable() or " " in text:
            raise self.bad(index, "session", f"{raw[:32]!r} is no session id")
        return text

    def endpoint(self, host: int, port: int) -> Endpoint:
        number = self.number(port, "port", high=2**16)
        try:
            return Endpoint(self.frame(host).decode("ascii"), number)
        except (BadField, UnicodeDecodeError) as error:
            raise self.bad(host, "host and port to answer to", str(error)) from None

    def text(self, index: int) -> str | None:
        """Free text for people: cut, and without anything that could break a log line."""
        raw = self.frame(index)[:MAX_TEXT].decode("utf-8", errors="replace")
        return "".join(c if c.isprintable() else " " for c in raw) or None

    def after(self, marker: bytes, first: int) -> int | None:
        """The number of the frame behind `marker`, which is looked for from `first` on: a later release may have put
        frames of its own before it."""
        behind = list(self.frames[first:])
        return first + behind.index(marker) + 1 if marker in behind else None

    def packed(self, index: int, code: str, what: str) -> tuple[int, ...]:
        return self._unpack(index, code, what, self.frame(index))

    def lists(self, index: int, code: str, what: str) -> IntLists:
        """A count, that many byte lengths, then the packed lists themselves; empty for no list at all."""
        raw = self.frame(index)
        if not raw:
            return ()
        count = int.from_bytes(raw[:4], "little")
        head = 4 * (count + 1)
        if len(raw) < head:
            raise self.bad(index, what, f"{len(raw)} bytes cannot hold the lengths of {count} lists")
        ends = [
            head,
            *(int(n) for n in np.cumsum(np.frombuffer(raw[4:head], "<u4"), dtype=np.uint64) + np.uint64(head)),
        ]
        if ends[-1] != len(raw):
            raise self.bad(index, what, f"the lists should end at byte {ends[-1]}, the frame ends at {len(raw)}")
        return tuple(self._unpack(index, code, what, raw[start:end]) for start, end in itertools.pairwise(ends))

    def pages(self, index: int, what: str) -> Pages:
        raw = self.frame(index)
        if len(raw) % _PAGE.itemsize:
            raise self.bad(index, what, f"{len(raw)} bytes are no whole number of i32")
        pages = np.frombuffer(raw, dtype=_PAGE)
        if len(pages) and int(pages.min()) < 0:
            raise self.bad(index, what, f"page {int(pages.min())} is below 0")
        return pages

    def _unpack(self, index: int, code: str, what: str, raw: bytes) -> tuple[int, ...]:
        width = struct.calcsize(f"<{code}")
        if len(raw) % width:
            raise self.bad(index, what, f"{len(raw)} bytes are no whole number of {width}-byte integers")
        return struct.unpack(f"<{len(raw) // width}{code}", raw)


def put(number: int) -> bytes:
    return b"%d" % number


def put_pages(pages: Pages) -> bytes:
    return pages.astype(_PAGE).tobytes()


def put_endpoint(endpoint: Endpoint) -> list[bytes]:
    return [endpoint.host.encode("ascii"), put(endpoint.port)]


def packed(code: str, numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}{code}", *numbers)


def packed_lists(code: str, lists: IntLists) -> bytes:
    if not lists:
        return b""
    each = [packed(code, numbers) for numbers in lists]
    return packed("I", [len(each), *map(len, each)]) + b"".join(each)
