"""
SSD offload of the store: which settings lose nothing, and what a rank's directory is called.

The wheel reads its offload settings from the environment, and its own defaults lose data or stand still where a segment
is small (docs/store.md has the experiments). Chosen here, checked against the segment; nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pdctl.core.kvstore import StoreRank, parse_size
from pdctl.core.seconds import check_seconds
from pdctl.errors import ConfigError

MIB: Final = 1 << 20
FILE_PER_KEY: Final = "file_per_key_storage_backend"
BUCKET: Final = "bucket_storage_backend"
_PREFIX: Final = "MOONCAKE_OFFLOAD_"
_BACKEND: Final = f"{_PREFIX}STORAGE_BACKEND_DESCRIPTOR"
_HEARTBEAT: Final = f"{_PREFIX}HEARTBEAT_INTERVAL_SECONDS"
_BUFFER: Final = f"{_PREFIX}LOCAL_BUFFER_SIZE_BYTES"
_BUCKET_NBYTES: Final = f"{_PREFIX}BUCKET_SIZE_LIMIT_BYTES"
_BUCKET_KEYS: Final = f"{_PREFIX}BUCKET_KEYS_LIMIT"
_SAFE_SHARE, _LAST_SHARE = 8, 2
"""A bucket is written when it is full: it must be full long before the segment is. A quarter and an eighth of a segment
lost nothing, one of four segments stood still for ever."""


@dataclass(frozen=True, slots=True)
class OffloadPatience:
    """How long to wait until the master has forgotten the last life of a directory.

    client_ttl_s  where the master does not tell: its flag of that name (10 s), and a little more
    forget_s      at most, where it tells
    """

    client_ttl_s: float = 12.0
    forget_s: float = 60.0

    def __post_init__(self) -> None:
        check_seconds(self, "store offload")


@dataclass(frozen=True, slots=True)
class Offload:
    """`variables`: what has to stand in the environment before set-up. `buffer_nbytes`: no object may be larger, nor
    what one call reads from the disk, else it is written and can never be read."""

    variables: Mapping[str, str]
    buffer_nbytes: int
    warnings: tuple[str, ...] = field(default=())


def directory_of(rank: StoreRank) -> str:
    """As SGLang names it. One for each rank: in a shared one ranks truncate each other's files."""
    return f"rank_{rank.dp}_{rank.tp}_{rank.pp}_{rank.cp}"


def offload(environ: Mapping[str, str], segment_nbytes: int) -> Offload:
    """What an operator has set in the environment, made whole. Raises ConfigError naming the variable.

    A file for each key unless said otherwise: that lost nothing under either kind of master, while buckets lose what
    is in them under a master without --offload_on_evict (32 of 256 objects), and a client cannot see its flags.
    """
    if not segment_nbytes:
        raise ConfigError(
            "store enable_ssd_offload is on but global_segment_size is 0: a rank offloads its own segment"
        )
    backend = environ.get(_BACKEND, FILE_PER_KEY)
    buffer = _size(environ, _BUFFER, 64 * MIB)
    chosen = {_BACKEND: backend, _HEARTBEAT: environ.get(_HEARTBEAT, "1"), _BUFFER: str(buffer)}
    warnings = list(_doubts(chosen, buffer, segment_nbytes))
    if backend == BUCKET:
        nbytes = _size(environ, _BUCKET_NBYTES, max(MIB, segment_nbytes // _SAFE_SHARE))
        chosen |= {_BUCKET_NBYTES: str(nbytes), _BUCKET_KEYS: environ.get(_BUCKET_KEYS, "500")}
        warnings += _bucket_doubts(nbytes, segment_nbytes)
    return Offload(chosen, buffer, tuple(warnings))


def _size(environ: Mapping[str, str], name: str, otherwise: int) -> int:
    """Given in any way that pdctl reads; the wheel reads plain bytes only."""
    try:
        nbytes = parse_size(environ[name]) if name in environ else otherwise
    except ValueError as error:
        raise ConfigError(f"{name}={environ[name]}: {error}") from None
    if nbytes < MIB:
        raise ConfigError(f"{name} is {nbytes} bytes: give at least 1 MiB")
    return nbytes


def _doubts(chosen: Mapping[str, str], buffer: int, segment_nbytes: int) -> list[str]:
    found = []
    if chosen[_BACKEND] not in (FILE_PER_KEY, BUCKET):
        found.append(f"{_BACKEND} is {chosen[_BACKEND]}: pdctl has shown {FILE_PER_KEY} and {BUCKET} to work, no other")
    if chosen[_HEARTBEAT] != "1":
        slow = "room is made that seldom, and writes are dropped meanwhile; 1 lost nothing in speed"
        found.append(f"{_HEARTBEAT} is {chosen[_HEARTBEAT]}: {slow}")
    if buffer > max(segment_nbytes, 256 * MIB):
        found.append(f"{_BUFFER} is {buffer}, more than the segment: all of it is touched at set-up")
    return found


def _bucket_doubts(nbytes: int, segment_nbytes: int) -> list[str]:
    """Raises ConfigError where no bucket would ever be full."""
    if nbytes * _LAST_SHARE > segment_nbytes:
        raise ConfigError(
            f"{_BUCKET_NBYTES} is {nbytes} and this rank's segment {segment_nbytes}: the segment would be full before "
            f"a bucket is, and every write refused for ever; give at most {segment_nbytes // _SAFE_SHARE}"
        )
    found = [
        f"{_BACKEND} is {BUCKET}: start the master with --offload_on_evict=true, else what waits in a bucket is lost"
    ]
    if nbytes * 4 > segment_nbytes:
        found.append(
            f"{_BUCKET_NBYTES} is {nbytes}, over a quarter of the segment: give {segment_nbytes // _SAFE_SHARE}"
        )
    return found
