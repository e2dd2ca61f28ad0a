"""
Mooncake's metadata keys: what they say, whose they are, and how many there may be.

No sockets, no clock, no journal: a claim on a key comes in, the Rows that it would change come out, and `apply` makes
them so. Values are bytes that nobody here rewrites; of one kind the address in them is read.

Keys of one name belong together. An engine called `nodeA` writes `mooncake/rpc_meta/nodeA`, where its handshake
answers, then `mooncake/ram/nodeA`, where its memory lies, and writes each again whenever it registers memory.

    who writes                            holder           what becomes of the name's keys
    its host, the same handshake address  -                the key is written; the same bytes again change nothing
    its host, another handshake address   answers          Occupied: two processes that live cannot have one name
    another host                          answers          Occupied
    another host                          said no address  Occupied: silence is not death
    either                                gone             all keys of the holder go, the newcomer's is written

The holder's handshake address is its witness: of two who want a name the holder is the `rival`, and the shell asks it
then and only then. So a restart after `kill -9` works at once on any host, and a living engine cannot be robbed. All
keys go, because memory that a dead process had registered must not be written to under its heir's name: between the
heir's two PUTs it has no memory to offer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pdctl.core.address import Endpoint
from pdctl.core.seconds import check_seconds
from pdctl.errors import BadField, ConfigError, LimitReached, Occupied, TooLarge

_KEY = re.compile(r"(?P<root>mooncake(?:/[^/]+)??)/(?P<kind>ram|rpc_meta)/(?P<name>.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What the book holds at most.

    max_keys         two for each engine
    max_value_nbytes a descriptor is a few KiB; the engine's own limit, and the stock server's, is 1 MiB
    max_nbytes       of all values together
    max_key_length   in characters
    """

    max_keys: int = 20_000
    max_value_nbytes: int = 1 << 20
    max_nbytes: int = 256 << 20
    max_key_length: int = 1024

    def __post_init__(self) -> None:
        if min(self.max_keys, self.max_value_nbytes, self.max_nbytes, self.max_key_length) < 1:
            raise ValueError("each limit of the metadata keys needs at least 1")


@dataclass(frozen=True, slots=True)
class KeyWitness:
    """When a holder that nobody contests is asked whether it lives, and what its silence means.

    every_s  how often each is asked; 0 (the default) for never: a key that is dropped by mistake is not written
             again by an engine that lives, so only who wants stale keys gone turns it on
    misses   how many times in a row it must be gone until its keys are dropped
    """

    every_s: float = 0.0
    misses: int = 3

    def __post_init__(self) -> None:
        check_seconds(self, "metadata witness", or_zero=("every_s",))
        if self.misses < 1:
            raise ConfigError(f"metadata witness misses is {self.misses}: give at least 1")


@dataclass(frozen=True, slots=True)
class Row:
    """A key as it is from now on: `value` None means that it is gone. `host` is who wrote, or removed, it."""

    key: str
    value: bytes | None = field(repr=False)
    host: str

    def to_note(self) -> tuple[str, bytes | None]:
        """As a journal keeps it: the key, then host and value in one."""
        return self.key, None if self.value is None else self.host.encode() + b"\0" + self.value

    @classmethod
    def from_note(cls, key: str, noted: bytes | None) -> Row:
        if noted is None:
            return cls(key, None, "")
        host, _, value = noted.partition(b"\0")
        return cls(key, value, host.decode())


@dataclass(slots=True)
class Segment:
    """All keys of one name, and the host they belong to. Live: read it at once, never write it."""

    name: str
    host: str
    values: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def witness(self) -> Endpoint | None:
        """Where the holder's handshake answers while it lives; None where its keys do not say."""
        said = (handshake_address(value) for key, value in self.values.items() if is_rpc_meta(key))
        return next((address for address in said if address is not None), None)


class KeyBook:
    """All keys. One owner, in one event loop."""

    def __init__(self, limits: KeyLimits | None = None) -> None:
        self._limits = limits or KeyLimits()
        self._segments: dict[str, Segment] = {}
        self._answering: dict[Endpoint, str] = {}  # handshake address -> the name that claimed it last
        self._size = 0
        self._nbytes = 0

    def __len__(self) -> int:
        """Keys held."""
        return self._size

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments.values())

    @property
    def nbytes(self) -> int:
        """Of all values together."""
        return self._nbytes

    def get(self, key: str) -> bytes | None:
        segment = self._segments.get(name_of(key))
        return segment.values.get(key) if segment else None

    def rival(self, key: str, value: bytes | None, host: str) -> Segment | None:
        """Who must be gone before `host` may write `value`, or None to remove: the segment's holder, or nobody."""
        segment = self._segments.get(name_of(key))
        if segment is None:
            return None
        is_own = segment.host == host and (value is None or not self._is_another_process(segment, key, value))
        return None if is_own else segment

    def replaced(self, segment: Segment) -> bool:
        """Whether an engine of another name has said since that it answers at this one's address."""
        witness = segment.witness
        return witness is not None and self._answering.get(witness) != segment.name

    def put(self, key: str, value: bytes, host: str, *, holder_gone: bool = False) -> list[Row]:
        """What writing would change; nothing for bytes that are there already. Raises Occupied, TooLarge, ..."""
        self._check_claim(key, value)
        rival = self.rival(key, value, host)
        if rival is None and self.get(key) == value:
            return []
        ended = self._yielded(rival, key, host, holder_gone=holder_gone)
        rows = [*(Row(old, None, host) for old in ended if old != key), Row(key, value, host)]
        self._check_room(rows)
        return rows

    def delete(self, key: str, host: str, *, holder_gone: bool = False) -> list[Row]:
        """What removing it would change; nothing for a key that is not there. Raises Occupied."""
        if self.get(key) is None:
            return []
        self._yielded(self.rival(key, None, host), key, host, holder_gone=holder_gone)
        return [Row(key, None, host)]

    def drop(self, segment: Segment) -> list[Row]:
        """What forgetting a segment would change: its holder is known to be gone."""
        return [Row(key, None, segment.host) for key in segment.values]

    def apply(self, rows: Iterable[Row]) -> None:
        """Make it so, without judging: the rows come from `put`, `delete` or a journal."""
        for row in rows:
            self._set(row)

    def _is_another_process(self, segment: Segment, key: str, value: bytes) -> bool:
        before = segment.values.get(key) if is_rpc_meta(key) else None
        return before is not None and handshake_address(before) not in (None, handshake_address(value))

    def _yielded(self, rival: Segment | None, key: str, host: str, *, holder_gone: bool) -> list[str]:
        """The keys that end because their holder has; none where nobody stands against it."""
        if rival is None:
            return []
        if not holder_gone:
            there = "gave no address to ask at" if rival.witness is None else f"still answers at {rival.witness}"
            raise Occupied(
                f"{key!r} belongs to an engine of {rival.host} that {there}, and {host} wants it: choose another "
                "segment name, or stop that engine and delete its keys from its own host",
                holder=rival.host,
                claimant=host,
            )
        return list(rival.values)

    def _check_claim(self, key: str, value: bytes) -> None:
        limits = self._limits
        if len(key) > limits.max_key_length:
            raise TooLarge(
                f"key: has {len(key)} characters and the limit (max_key_length) is {limits.max_key_length}: "
                "choose a shorter segment name"
            )
        if not key.isprintable():
            raise BadField("key", f"{key!r} has characters that cannot be printed: choose another segment name")
        if len(value) > limits.max_value_nbytes:
            raise TooLarge(
                f"value: has {len(value)} bytes and the limit (max_value_nbytes) is {limits.max_value_nbytes}: "
                "register fewer, larger buffers, or raise the limit"
            )

    def _check_room(self, rows: Iterable[Row]) -> None:
        size, nbytes = self._size, self._nbytes
        for row in rows:
            old = self.get(row.key)
            size += (row.value is not None) - (old is not None)
            nbytes += len(row.value or b"") - len(old or b"")
        if size > self._limits.max_keys and size > self._size:
            raise _full(f"{self._size} metadata keys are held, the limit (max_keys)")
        if nbytes > self._limits.max_nbytes and nbytes > self._nbytes:
            raise _full(f"metadata values of {self._nbytes} bytes are held, the limit (max_nbytes)")

    def _set(self, row: Row) -> None:
        name = name_of(row.key)
        segment = self._segments.setdefault(name, Segment(name, row.host))
        old = segment.values.pop(row.key, None)
        self._size += (row.value is not None) - (old is not None)
        self._nbytes += len(row.value or b"") - len(old or b"")
        self._follow_handshake(name, row.key, old, row.value)
        if row.value is not None:
            segment.values[row.key] = row.value
            segment.host = row.host
        if not segment.values:
            del self._segments[name]

    def _follow_handshake(self, name: str, key: str, old: bytes | None, new: bytes | None) -> None:
        if not is_rpc_meta(key):
            return
        before, after = (None if value is None else handshake_address(value) for value in (old, new))
        if before is not None and self._answering.get(before) == name:
            del self._answering[before]
        if after is not None:
            self._answering[after] = name


def name_of(key: str) -> str:
    """What a key belongs to: its cluster and name; a key of another form stands for itself."""
    found = _KEY.fullmatch(key)
    return f"{found['root']}//{found['name']}" if found else key


def is_rpc_meta(key: str) -> bool:
    found = _KEY.fullmatch(key)
    return found is not None and found["kind"] == "rpc_meta"


def handshake_address(value: bytes) -> Endpoint | None:
    """Where an rpc_meta value says that the handshake answers; None for what says nothing usable."""
    try:
        said = json.loads(value)
        return Endpoint(said["ip_or_host_name"].strip("[]"), int(said["rpc_port"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, BadField):
        return None


def _full(what: str) -> LimitReached:
    return LimitReached(f"{what}: delete the keys of engines that are gone, or raise the limit")
