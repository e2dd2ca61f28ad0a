"""
What prefill and decode ranks say to each other: SGLang's ZMQ messages, both directions side by side.

Frames in, values out, and back. No sockets, nothing is acted upon, and no bytes make a parser raise anything but
BadFrames, which names the frame. Trailing frames that a later release adds are tolerated; so are whole messages that
we have no use for (staging, other engines): they come back as `Unknown`.

    decode -> prefill   RegisterBuffers, Metadata, Abort, Bootstrap, Matched
    prefill -> decode   Status, AbortAck, AuxData

How a frame holds its number or its lists: core.frames.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import ClassVar, Self

from pdctl.core.address import Endpoint
from pdctl.core.frames import (
    DECIMAL,
    MAX_TEXT,
    Frames,
    IntLists,
    Pages,
    Reader,
    packed,
    packed_lists,
    put,
    put_endpoint,
    put_pages,
)
from pdctl.core.layout import Pool
from pdctl.core.sums import Sums, pack, unpack
from pdctl.core.trace import TraceContext
from pdctl.core.transfer import Phase
from pdctl.errors import BadFrames, LayoutMismatch

Send = Callable[[Endpoint, Frames], Awaitable[None]]
"""Brings one message to a control link. Raises Unreachable."""

MAX_FRAMES = 64  # the longest message known has 20
MAX_RANKS = 4096  # of one instance; a required count above it is nonsense
_TAG = re.compile(rb"[A-Za-z][A-Za-z0-9_]{0,63}")

# How a pdctl prefill begins the reason when it does not know the session. The wire carries nothing else that a decode
# rank could tell it by, and registering anew is the cure.
NOT_REGISTERED = "session is not registered here"

# How a pdctl decode says, behind all frames of its registration, that it wants sums, and how a pdctl prefill that
# grants them marks them behind a success. Stock reads frames by number and never looks there (tests/wire/stock).
SUMS = b"pdctl:crc32"

# How a pdctl decode marks its reason behind all frames of an abort.
WHY = b"pdctl:why"

# How a pdctl decode marks the two frames of a trace context behind all frames of its metadata, where there is one.
TRACE = b"pdctl:trace"

# How a pdctl decode says, behind all frames of its metadata, which use of the room's number it speaks of. A pdctl
# prefill says that number behind its status, so that what is said twice is neither taken for news nor for another
# room's.
USE = b"pdctl:use"

# How a pdctl decode marks a registration and metadata that say nothing new, and a pdctl prefill its answer to a
# question: it is one to whom a room's pages may be named again at any time. (Stock takes up a room anew that is named
# after its end.)
AGAIN = b"pdctl:again"

# How a pdctl prefill marks, behind a failure, that no other room between these two can go better as they are.
PERMANENT = b"pdctl:permanent"

# Rooms from here on are none, stock routers draw 63 bits. A decode that must know beforehand whether a prefill sums
# gives such a room up: stock confirms that at once, as it does of any room that it does not know, and ours adds SUMS.
FIRST_QUESTION = 2**64 - 2**32


@dataclass(frozen=True, slots=True)
class RegisterBuffers:
    """A decode rank's memory, once for each prefill rank. The layout fields that we do not use ride along."""

    TAG: ClassVar[bytes] = b"None"
    NAME: ClassVar[str] = "buffer registration"

    reply: Endpoint
    session: str
    kv_pointers: tuple[int, ...]
    aux_pointers: tuple[int, ...]
    tp_rank: int
    tp_size: int
    kv_item_len: int  # of entry 0; what peers older than frame 19 have
    kv_item_lens: tuple[int, ...] = ()
    state_pointers: IntLists = ()
    state_item_lens: IntLists = ()
    state_dims: IntLists = ()
    kv_layer_ids: tuple[int, ...] = ()
    state_layer_ids: IntLists = ()
    staging_pointer: int | None = None
    staging_nbytes: int = 0
    dcp_size: int = 1
    dcp_rank: int = 0
    staging_slots: tuple[int, ...] = ()
    wants_sums: bool = False
    again: bool = field(default=False, compare=False)

    def kv_pool(self) -> Pool:
        """Raises LayoutMismatch where the message contradicts itself."""
        lens = self.kv_item_lens or (self.kv_item_len,) * len(self.kv_pointers)
        return Pool(self.kv_pointers, lens)

    def aux_pool(self, item_lens: tuple[int, ...]) -> Pool:
        """The wire does not carry the row lengths: both sides must have the same buffers, so ours are taken."""
        if len(self.aux_pointers) != len(item_lens):
            raise LayoutMismatch(
                f"aux: the sender has {len(item_lens)} buffers and the receiver {len(self.aux_pointers)}: "
                "start both with the same model and the same log-prob and hidden-state settings"
            )
        return Pool(self.aux_pointers, item_lens)

    def to_frames(self) -> list[bytes]:
        return [
            self.TAG,
            *put_endpoint(self.reply),
            self.session.encode("ascii"),
            packed("Q", self.kv_pointers),
            packed("Q", self.aux_pointers),
            packed_lists("Q", self.state_pointers),
            put(self.tp_rank),
            put(self.tp_size),
            put(self.kv_item_len),
            packed_lists("I", self.state_item_lens),
            packed_lists("I", self.state_dims),
            packed("I", self.kv_layer_ids),
            packed_lists("I", self.state_layer_ids),
            b"" if self.staging_pointer is None else packed("Q", (self.staging_pointer,)),
            b"" if self.staging_pointer is None else put(self.staging_nbytes),
            put(self.dcp_size),
            put(self.dcp_rank),
            packed("Q", self.staging_slots),
            packed("Q", self.kv_item_lens),
            *([SUMS] if self.wants_sums else []),
            *([AGAIN] if self.again else []),
        ]

    @classmethod
    def from_frames(cls, frames: Frames) -> Self:
        read = Reader(cls.NAME, frames, needed=10)
        staging = read.packed(14, "Q", "staging pointer")
        return cls(
            reply=read.endpoint(1, 2),
            session=read.session(3),
            kv_pointers=read.packed(4, "Q", "KV pointers"),
            aux_pointers=read.packed(5, "Q", "aux pointers"),
            state_pointers=read.lists(6, "Q", "state pointers"),
            tp_rank=read.number(7, "TP rank"),
            tp_size=read.number(8, "TP size", low=1, high=MAX_RANKS),
            kv_item_len=read.number(9, "KV bytes a page"),
            state_item_lens=read.lists(10, "I", "state item lengths"),
            state_dims=read.lists(11, "I", "state dimensions"),
            kv_layer_ids=read.packed(12, "I", "KV layer ids"),
            state_layer_ids=read.lists(13, "I", "state layer ids"),
            staging_pointer=staging[0] if staging else None,
            staging_nbytes=read.optional(15, "staging size", 0),
            dcp_size=read.optional(16, "DCP size", 1),
            dcp_rank=read.optional(17, "DCP rank", 0),
            staging_slots=read.packed(18, "Q", "staging slots"),
            kv_item_lens=read.packed(19, "Q", "KV bytes a page of each entry"),
            wants_sums=SUMS in frames[20:],  # not by number: a later stock release may have frames of its own there
            again=AGAIN in frames[20:],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Metadata:
    """Where one request's KV and aux row go. `pages` has shape (n,), int32, all at or above 0.

    aux_row None and no pages: a dummy, from a decode rank that needs nothing but must be heard of. `required`: how many
    decode ranks this prefill rank must hear of. `prefix_len`: tokens that decode has already; `pages` begins after it.
    `trace`: whose request it is, `use`: which use of the room's number, and `again`: it has been said before, behind
    all frames that stock reads.
    """

    NAME: ClassVar[str] = "metadata"

    room: int
    reply: Endpoint
    session: str
    pages: Pages = field(repr=False)
    aux_row: int | None
    required: int = 1
    prefix_len: int = 0
    state_rows: IntLists = ()
    device_pages: Pages | None = field(default=None, repr=False)
    trace: TraceContext | None = None
    use: int | None = None
    again: bool = False

    @property
    def is_dummy(self) -> bool:
        return self.aux_row is None and not len(self.pages)

    def to_frames(self) -> list[bytes]:
        return [
            put(self.room),
            *put_endpoint(self.reply),
            self.session.encode("ascii"),
            put_pages(self.pages),
            b"" if self.aux_row is None else put(self.aux_row),
            packed_lists("i", self.state_rows),
            put(self.required),
            put(self.prefix_len),
            b"" if self.device_pages is None else put_pages(self.device_pages),
            *([] if self.trace is None else [TRACE, self.trace.traceparent.encode(), self.trace.state.encode()]),
            *([] if self.use is None else [USE, put(self.use)]),
            *([AGAIN] if self.again else []),
        ]

    @classmethod
    def from_frames(cls, frames: Frames) -> Self:
        read = Reader(cls.NAME, frames, needed=8)
        pages = read.pages(4, "destination pages")
        device_pages = read.pages(9, "device pages")
        return cls(
            room=read.room(0),
            reply=read.endpoint(1, 2),
            session=read.session(3),
            pages=pages,
            aux_row=None if not len(pages) and not frames[5] else read.number(5, "aux row"),
            state_rows=read.lists(6, "i", "state rows"),
            required=read.number(7, "number of decode ranks", low=1, high=MAX_RANKS),
            prefix_len=read.optional(8, "prefix length", 0),
            device_pages=device_pages if len(device_pages) else None,
            trace=_trace(read, 10),
            use=_use(read, 10),
            again=AGAIN in frames[10:],
        )


@dataclass(frozen=True, slots=True)
class Abort:
    """Decode gives the room up. With `generation` it holds the pages until that very generation is acknowledged; only
    then a `reason` travels too, and which `use` of the room's number is over, in frames that stock does not read."""

    TAG: ClassVar[bytes] = b"ABORT"
    NAME: ClassVar[str] = "abort"

    room: int
    reply: Endpoint | None = None
    generation: int | None = None
    reason: str | None = None
    use: int | None = None

    def to_frames(self) -> list[bytes]:
        frames = [self.TAG, put(self.room)]
        if self.reply is not None:
            frames += put_endpoint(self.reply)
            if self.generation is not None:
                frames.append(put(self.generation))
                frames += [] if self.reason is None else [WHY, self.reason.encode()[:MAX_TEXT]]
                frames += [] if self.use is None else [USE, put(self.use)]
        return frames

    @classmethod
    def from_frames(cls, frames: Frames) -> Self:
        read = Reader(cls.NAME, frames, needed=2)
        reply = read.endpoint(2, 3) if len(frames) > 2 else None
        generation = read.number(4, "generation") if len(frames) > 4 else None
        reason = read.text(6) if read.frame(5) == WHY else None
        return cls(read.room(1), reply, generation, reason, _use(read, 5 if reason is None else 7))


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Decode's address before it has pages (only with the prefill_complete policy)."""

    TAG: ClassVar[bytes] = b"BOOTSTRAP"
    NAME: ClassVar[str] = "bootstrap"

    room: int
    reply: Endpoint

    def to_frames(self) -> list[bytes]:
        return [self.TAG, put(self.room), *put_endpoint(self.reply)]

    @classmethod
    def from_frames(cls, frames: Frames) -> Self:
        read = Reader(cls.NAME, frames, needed=4)
        return cls(read.room(1), read.endpoint(2, 3))


@dataclass(frozen=True, slots=True)
class Matched:
    """What has arrived at `session` of the room is what the sums say. Only for a prefill rank that has sent sums: the
    control thread of a stock one ends by a message that it does not know."""

    TAG: ClassVar[bytes] = b"PDCTL_MATCHED"
    NAME: ClassVar[str] = "match"

    room: int
    session: str
    use: int | None = None

    def to_frames(self) -> list[bytes]:
        behind = [] if self.use is None else [USE, put(self.use)]
        return [self.TAG, put(self.room), self.session.encode("ascii"), *behind]

    @classmethod
    def from_frames(cls, frames: Frames) -> Self:
        read = Reader(cls.NAME, frames, needed=3)
        return cls(read.room(1), read.session(2), _use(read, 3))


@dataclass(frozen=True, slots=True)
class Status:
    """How a room stands at one prefill rank. The reason is a fourth frame: stock 0.5.23 sends none but reads it.

    sums: of what it has written, for a decode that has asked for them; None where it sends none. Not yet checked
    against any pool. use: of the room's number, as its metadata said; None where that said none. is_permanent: no
    other room between these two can go better.
    """

    NAME: ClassVar[str] = "status"

    room: int
    phase: Phase
    rank: int
    reason: str | None = None
    sums: tuple[Sums, ...] | None = None
    use: int | None = None
    is_permanent: bool = False

    def to_frames(self) -> list[bytes]:
        frames = [put(self.room), put(self.phase), put(self.rank)]
        behind = [] if self.sums is None else [SUMS, pack(self.sums)]
        behind += [] if self.use is None else [USE, put(self.use)]
        behind += [PERMANENT] if self.is_permanent else []
        if self.reason is not None or behind:
            frames.append((self.reason or "").encode()[:MAX_TEXT])
        return frames + behind

    @classmethod
    def from_frames(cls, frames: Frames) -> Self:
        read = Reader(cls.NAME, frames, needed=3)
        phase = Phase(read.number(1, "status", high=max(Phase)))
        sums = _sums(read, 4)
        use = _use(read, 4 if sums is None else 6)
        rank, is_permanent = read.number(2, "rank"), PERMANENT in frames[4:]
        return cls(read.room(0), phase, rank, read.text(3), sums, use, is_permanent)


@dataclass(frozen=True, slots=True)
class AbortAck:
    """No chunk of the room is in flight any more. Without rank and generation (older peers) it proves nothing. `sums`,
    in answer to a question: this prefill gives sums; `again`: it may be told everything twice."""

    TAG: ClassVar[bytes] = b"ABORT_ACK"
    NAME: ClassVar[str] = "abort acknowledgement"

    room: int
    rank: int | None = None
    generation: int | None = None
    sums: bool = False
    again: bool = False

    def to_frames(self) -> list[bytes]:
        given = [self.room] + [n for n in (self.rank, self.generation) if n is not None]
        return [self.TAG, *map(put, given), *([SUMS] if self.sums else []), *([AGAIN] if self.again else [])]

    @classmethod
    def from_frames(cls, frames: Frames) -> Self:
        read = Reader(cls.NAME, frames, needed=2)
        rank = read.number(2, "rank") if len(frames) > 2 else None
        generation = read.number(3, "generation") if len(frames) > 3 else None
        return cls(read.room(1), rank, generation, SUMS in frames[4:], AGAIN in frames[4:])


@dataclass(frozen=True, slots=True)
class AuxData:
    """One aux row over ZMQ. Its length is the one big-endian number of the wire. Not yet checked against any pool."""

    TAG: ClassVar[bytes] = b"AUX_DATA"
    NAME: ClassVar[str] = "aux data"

    room: int
    buffer: int
    row: int
    data: bytes = field(repr=False)

    def to_frames(self) -> list[bytes]:
        return [
            self.TAG,
            *map(put, (self.room, self.buffer, self.row)),
            struct.pack(">I", len(self.data)),
            self.data,
        ]

    @classmethod
    def from_frames(cls, frames: Frames) -> Self:
        read = Reader(cls.NAME, frames, needed=6)
        if len(frames[4]) != 4 or struct.unpack(">I", frames[4])[0] != len(frames[5]):
            raise read.bad(4, "length", f"does not say {len(frames[5])}, the length of frame 5")
        return cls(read.room(1), read.number(2, "buffer"), read.number(3, "row"), bytes(frames[5]))


@dataclass(frozen=True, slots=True)
class Unknown:
    """A message that we have no use for; `tag` says which."""

    tag: str


ToPrefill = RegisterBuffers | Metadata | Abort | Bootstrap | Matched | Unknown
ToDecode = Status | AbortAck | AuxData | Unknown


def parse_to_prefill(frames: Frames) -> ToPrefill:
    """What a decode rank said. Raises BadFrames and nothing else."""
    tag = _tag(frames)
    for message in (RegisterBuffers, Abort, Bootstrap, Matched):
        if tag == message.TAG:
            return message.from_frames(frames)
    return Metadata.from_frames(frames) if DECIMAL.fullmatch(tag) else _unknown(tag)


def parse_to_decode(frames: Frames) -> ToDecode:
    """What a prefill rank said. Raises BadFrames and nothing else."""
    tag = _tag(frames)
    for message in (AbortAck, AuxData):
        if tag == message.TAG:
            return message.from_frames(frames)
    return Status.from_frames(frames) if DECIMAL.fullmatch(tag) else _unknown(tag)


def _tag(frames: Frames) -> bytes:
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise BadFrames(f"a message of {len(frames)} frames: one of 1 to {MAX_FRAMES} was expected")
    return frames[0]


def _unknown(tag: bytes) -> Unknown:
    if not _TAG.fullmatch(tag):
        raise BadFrames(f"frame 0 is {tag[:32]!r}: neither a room number nor the name of a message")
    return Unknown(tag.decode("ascii"))


def _sums(read: Reader, index: int) -> tuple[Sums, ...] | None:
    if read.frame(index) != SUMS:
        return None
    try:
        return tuple(unpack(read.frame(index + 1)))
    except ValueError as error:
        raise read.bad(index + 1, "sums", str(error)) from None


def _trace(read: Reader, first: int) -> TraceContext | None:
    """One that cannot be read is none: it moves no byte."""
    if (at := read.after(TRACE, first)) is None:
        return None
    parent, state = (read.frame(at + n).decode("latin-1") for n in (0, 1))
    return TraceContext.parse(parent, state)


def _use(read: Reader, first: int) -> int | None:
    at = read.after(USE, first)
    return None if at is None else read.number(at, "use of the room's number")
