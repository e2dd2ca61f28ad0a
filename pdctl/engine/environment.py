"""
How a Mooncake engine is opened, and the environment variables that say so to it.

The engine takes most of its settings from the process's environment, which must hold them before `mooncake.engine` is
imported. Nothing here reads or writes `os.environ`: the mapping is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import structlog

from pdctl.core.address import check_host, is_wildcard
from pdctl.core.seconds import check_seconds
from pdctl.engine import handshake
from pdctl.engine.carrier import Patience
from pdctl.errors import BadField, ConfigError

log = structlog.get_logger(__name__)

ENOUGH = 65_535  # the engine's own maximum for both queues; the window is what bounds them
# Set by an operator, each of these breaks a promise silently (MOONCAKE_FACTS 1.6).
_DANGEROUS: dict[str, tuple[Callable[[str], bool], str]] = {
    "MC_TCP_PROTO": (lambda v: v == "1", "writes to nowhere would be reported as done"),
    "MC_TCP_ENABLE_CONNECTION_POOL": (lambda v: v.lower() in ("0", "false", "off"), "it is 50 times slower and fails"),
    "MC_DISABLE_METACACHE": (lambda v: v != "0", "each transfer to a hung peer would block all others for 61 s"),
}
# A store without an engine beside it: 16 pieces to an owner that hangs end after 5 s; by default 4 do after 30 s.
_STALLS = {"MC_TCP_PROGRESS_TIMEOUT_SEC": "5", "MC_TCP_STATUS_TIMEOUT_SEC": "5", "MC_TCP_LANES_PER_PEER": "16"}
# The store holds the interpreter while it waits for its master: 90 s by default, 4.5 s with these (H8).
_IMPATIENCE = {
    "MC_STORE_CLIENT_SETUP_RETRIES": "1",
    "MC_RPC_CONNECT_TIMEOUT_MS": "500",
    "MC_RPC_TIMEOUT_MS": "1000",
}


@dataclass(frozen=True, slots=True)
class MooncakeSettings:
    """How the engine is opened.

    `host`: under which peers reach it; it listens on every interface all the same (H7). IPv6 text makes the whole
    process IPv6. `force_tcp`: without it the engine takes RDMA wherever it sees an adapter, whatever `protocol` says;
    left out, it is on exactly when `protocol` is tcp.
    `window`: blocks in flight to one peer, over TCP each on a connection of its own, and 16 MiB of larger ones: 64 of
    4 or 64 KiB keep the engine busy between two looks, with 16 it waited for a fifth of the time.
    `progress_timeout_s`: how long a block may stand still; whole seconds, as the engine reads it.
    `block_limit`: longer copies are split, so that the window holds for them too, and no small room waits for a long
    block: one page beside 512 MiB took mostly 74 to 236 ms at 16 MiB, 6 to 10 at 1 MiB; the 512 MiB as long.
    `handshake_timeout_s`: for our own question; an idle connection on a peer's port delays its answer by 5 s.
    `recheck_s`: a peer not asked for so long is asked again before a transfer, 0.3 ms; a new process at the old
    address is then noticed.
    `rest_timeout_s`: how long closing waits for blocks in flight; None for what `progress_timeout_s` makes possible.
    """

    host: str = "127.0.0.1"
    protocol: str = "tcp"
    device: str = ""
    force_tcp: bool | None = None
    window: int = 64
    block_limit: int = 1 << 20
    progress_timeout_s: int = 5
    handshake_timeout_s: float = 1.0
    recheck_s: float = 5.0
    rest_timeout_s: float | None = None
    log_level: str = "ERROR"

    def __post_init__(self) -> None:
        try:
            check_host(self.host)
        except BadField as cause:
            raise ConfigError(f"mooncake {cause}") from cause
        if is_wildcard(self.host):
            raise ConfigError(f"mooncake host {self.host} names no host: give the address that peers can reach")
        if self.force_tcp and self.protocol != "tcp":
            raise ConfigError(f"mooncake protocol is {self.protocol} but force_tcp is on: switch one of them")
        if not 1 <= self.window <= 1024:
            raise ConfigError(f"mooncake window is {self.window}: give 1 to 1024 blocks (past 2048 the engine wedges)")
        if self.block_limit < 1:
            raise ConfigError(f"mooncake block_limit is {self.block_limit}: give at least 1")
        check_seconds(self, "mooncake", or_zero=("recheck_s",))

    @property
    def forces_tcp(self) -> bool:
        return self.protocol == "tcp" if self.force_tcp is None else self.force_tcp

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    @property
    def loopback(self) -> str:
        """Where this process introduces peers to its own engine: the engine speaks one family only."""
        return "::1" if self.is_ipv6 else "127.0.0.1"

    @property
    def patience(self) -> Patience:
        """Each block has a connection of its own, so those to a peer that hangs end together, whatever the window: one
        stall for a block's bytes, one for the peer's word that it has them, and a second to notice."""
        rest_s = self.rest_timeout_s
        if rest_s is None:
            rest_s = 2.0 * self.progress_timeout_s + 1.0
        return Patience(self.handshake_timeout_s, self.recheck_s, rest_s, self.block_limit)


def environment(settings: MooncakeSettings) -> dict[str, str]:
    """The engine's and the store's variables, all of them, for the process that will open an engine."""
    stall = str(settings.progress_timeout_s)
    return _defaults(settings) | {
        **({"MC_FORCE_TCP": "1"} if settings.forces_tcp else {}),
        "MC_TCP_PROGRESS_TIMEOUT_SEC": stall,
        "MC_TCP_STATUS_TIMEOUT_SEC": stall,
        "MC_TCP_LANES_PER_PEER": "1",  # each way of ours is a peer of its own there (ways.py)
        "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": str(ENOUGH),
        "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": str(ENOUGH),
        "MC_TCP_ADMISSION_TIMEOUT_MS": "600000",
        "MC_HANDSHAKE_MAX_LENGTH": str(handshake.MAX_REPLY),
        # A second after a failure the refresh asks the peer by its real name (seen: it logged a refused connection).
        # Lanes that we introduce need none, a new life gets a new name; RDMA has no other cure for stale descriptors.
        "MC_TE_METADATA_REFRESH_INTERVAL_SECONDS": "0" if settings.forces_tcp else "1",
        **({"MC_USE_IPV6": "1"} if settings.is_ipv6 else {}),
        # The CUDA wheels choose by this, and not by the protocol that they are given.
        **({"MC_INTRANODE_NVLINK": "1"} if settings.protocol == "nvlink_intra" else {}),
    }


def _defaults(settings: MooncakeSettings) -> dict[str, str]:
    """Those in which an operator's own value wins: none of them can break a promise."""
    return {
        "MC_LOG_LEVEL": settings.log_level,
        "MC_TRANSFER_TIMEOUT": "60",
        "MC_HANDSHAKE_CONNECT_TIMEOUT": "1",
        **_IMPATIENCE,
    }


def pieces_at_once(environ: Mapping[str, str]) -> int:
    """How many pieces all calls on a store may have, so that all have ended before the wheel gives a call up.

    It does so after 60 s. Pieces to an owner that hangs end one stall after another, as many at once as there are
    lanes; what was still queued lands when the owner goes on, in memory that nobody keeps for it any more (24 of 64
    reads of 1 MiB did). Half of the 60 s is used.
    """
    lanes = _number(environ, "MC_TCP_LANES_PER_PEER", 4)
    stall_s = _number(environ, "MC_TCP_PROGRESS_TIMEOUT_SEC", 30)
    return max(1, lanes * (30 // max(1, stall_s)))


def _number(environ: Mapping[str, str], name: str, otherwise: int) -> int:
    text = environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else otherwise


def prepare_store(protocol: str, environ: MutableMapping[str, str], loaded: bool) -> None:
    """Put into `environ` what a store needs that is opened without an engine; an operator's own value wins."""
    wanted = {**_IMPATIENCE, **_STALLS, "MC_LOG_LEVEL": "ERROR", **({"MC_FORCE_TCP": "1"} if protocol == "tcp" else {})}
    if protocol != "tcp" and "MC_FORCE_TCP" in environ:
        raise ConfigError(f"MC_FORCE_TCP is set but the protocol is {protocol}: unset it, or set protocol tcp")
    late = {name: value for name, value in wanted.items() if name not in environ}
    environ.update(late)
    if late and loaded:
        log.warning("mooncake.store was imported before its environment was set", variables=sorted(late))


def prepare(settings: MooncakeSettings, environ: MutableMapping[str, str], loaded: bool) -> None:
    """Put the block into `environ`. Raises ConfigError naming a variable that would break a promise."""
    for name, (is_bad, because) in _DANGEROUS.items():
        if name in environ and is_bad(environ[name]):
            raise ConfigError(f"{name}={environ[name]} is set in the environment: unset it, {because}")
    if "MC_USE_IPV6" in environ and not settings.is_ipv6:
        raise ConfigError(f"MC_USE_IPV6 is set but the host is {settings.host}: unset it, or give an IPv6 host")
    if "MC_FORCE_TCP" in environ and not settings.forces_tcp:  # the engine looks whether it is there, not what it says
        raise ConfigError(f"MC_FORCE_TCP is set but the protocol is {settings.protocol}: unset it, or set protocol tcp")
    late = _apply(settings, environ)
    if late and loaded:
        log.warning("mooncake.engine was imported before its environment was set", variables=sorted(late))


def _apply(settings: MooncakeSettings, environ: MutableMapping[str, str]) -> Mapping[str, str]:
    """What had to change."""
    free = _defaults(settings)
    changed = {
        name: value
        for name, value in environment(settings).items()
        if environ.get(name) != value and not (name in free and name in environ)
    }
    environ.update(changed)
    return changed
