"""How a Mooncake engine is opened, and how patient it is. Values only: nothing of an engine is loaded for them."""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.core.address import check_host, is_wildcard
from pdctl.core.seconds import check_seconds
from pdctl.errors import BadField, ConfigError


@dataclass(frozen=True, slots=True)
class Patience:
    """`ask_s` bounds one question to a peer; after `recheck_s` without one, it is asked again before a transfer;
    `rest_s` bounds what closing waits for blocks in flight; `block_limit` bytes is the longest block."""

    ask_s: float
    recheck_s: float
    rest_s: float
    block_limit: int


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
