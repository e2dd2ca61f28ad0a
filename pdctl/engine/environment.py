"""
The environment variables that say to a Mooncake engine how it is opened.

The engine takes most of its settings from the process's environment, which must hold them before `mooncake.engine` is
imported. Nothing here reads or writes `os.environ`: the mapping is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping

import structlog

from pdctl.engine import handshake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import ConfigError

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
