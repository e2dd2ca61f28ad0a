"""
The sections of the settings that are made of several rooms' knobs: a service, a rank, an agent, a store.

The other sections are the value objects of one room each; config.py has them all, and where their values come from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from pdctl.client import Exhaustion
from pdctl.core.address import Endpoint
from pdctl.core.device import DeviceSpec
from pdctl.core.kvstore import StoreRank
from pdctl.core.lives import LONGEST_TTL_S, SHORTEST_TTL_S
from pdctl.core.metadata import KeyLimits, KeyWitness
from pdctl.core.naming import DEFAULT, Hosts, Listener
from pdctl.core.native import NAME
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.core.seconds import check_seconds
from pdctl.errors import BadField, ConfigError
from pdctl.persistence.place import check
from pdctl.store.patience import UNTIL_READY, WARM_UP, StorePatience


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """The sidecar's service.

    host, port  where to listen; loopback unless told otherwise, 8998 as SGLang's own registry, 0 = any free port
    journal     where the registry's rows outlive it: `sqlite:PATH`; `etcd://HOST:PORT[,HOST:PORT...][?prefix=NAME]`,
                for several registries that are one; or `memory:`, which forgets them with the process.
                Unless said, a file for this port in the state directory ($STATE_DIRECTORY as systemd gives it, else
                $XDG_STATE_HOME/pdctl, else ~/.local/state/pdctl): ranks register once, so that a registry that forgets
                breaks what it was put up for, and forgetting should be somebody's decision. The port is what tells one
                registry of a host from another; with port 0 nothing does, and the rows are in memory.
    max_rooms   rooms remembered at most; beyond it a new one is answered 429
    listen      further addresses, each speaking for the instance it names: `prefill-a=10.0.0.1:8999`, or `[::1]:8999`
    map_host    host names that stand for an instance: `prefill-a=prefill-a.serving.svc`, or `*.pdctl.svc`, whose first
                label is the name; every other host stands for the instance `default`
    room_ttl_s  a room is dropped this long after it was announced (SGLang: 120, our prefills wait 300)
    grace_s     how long requests under way may go on after SIGTERM
    """

    host: str = "127.0.0.1"
    port: int = 8998
    journal: str = ""
    listen: tuple[str, ...] = ()
    map_host: tuple[str, ...] = ()
    max_rooms: int = 1_000_000
    room_ttl_s: float = 300.0
    grace_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: choose 0 (any free one) to 65535")
        if self.journal:
            check(self.journal)
        self.listeners()
        self.hosts()
        if self.max_rooms < 1:
            raise ValueError("max_rooms needs at least 1")
        check_seconds(self, "serve", or_zero=("grace_s",))

    def listeners(self) -> list[Listener]:
        """Raises ConfigError."""
        return [Listener.parse(text) for text in self.listen]

    def hosts(self) -> Hosts:
        """Raises ConfigError."""
        return Hosts.parse(self.map_host)


@dataclass(frozen=True, slots=True)
class MetadataSettings:
    """Mooncake's metadata server, /metadata.

    max_keys, max_value_nbytes, max_nbytes  how many keys, how large a value, and all values together; beyond: 429, 413
    witness_every_s  how often each engine that holds keys is asked whether it lives; 0 (the default): only where
                     another wants its name, since an engine that lives does not write a key again that was dropped
    witness_misses   how many times in a row it must be gone until its keys are dropped
    """

    max_keys: int = 20_000
    max_value_nbytes: int = 1 << 20
    max_nbytes: int = 256 << 20
    witness_every_s: float = 0.0
    witness_misses: int = 3

    def __post_init__(self) -> None:
        self.limits()
        self.witness()

    def limits(self) -> KeyLimits:
        return KeyLimits(self.max_keys, self.max_value_nbytes, self.max_nbytes)

    def witness(self) -> KeyWitness:
        return KeyWitness(self.witness_every_s, self.witness_misses)


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """A rank of ours: a prefill or a decode that pdctl drives.

    registry          the bootstrap registry's URL; several, with commas, where several registries are one
    instance          which instance this rank belongs to; a stock registry knows only one, and no names
    decode_instance   the same for a decode that is listed in the registry: a name has one role
    ttl_s             the lease that a rank holds, renewed every third of it: a rank that has died is gone after it.
                      15 s: an engine that stands still for 10 (a graph is captured, weights are loaded) is not lost,
                      and a decode's own pings need about as long (5 s, two in a row)
    host              the address that this rank announces and listens at; peers must be able to reach it
    accelerator       the device that this rank's pools are on: cpu (memory of the host), cuda:N, cuda:GPU-<uuid> or
                      npu:N, as this process numbers them; no network adapter, those are engine.device
    http_port         where this rank's own /metrics, /livez and /readyz answer; 0 = any free port
    announce_every_s  how often a registration is repeated at a registry without leases, so that it learns it again
    exhaustion        what the end of all registration attempts means: raise, exit or keep-trying
    report_every_s    how often this rank tells its registry how it is, besides whenever that turns (docs/overview.md);
                      0: never
    """

    registry: str = "http://127.0.0.1:8998"
    instance: str = DEFAULT
    decode_instance: str = "decode"
    ttl_s: float = 15.0
    host: str = "127.0.0.1"
    accelerator: str = "cpu"
    http_port: int = 0
    announce_every_s: float = 10.0
    exhaustion: Exhaustion = Exhaustion.RAISE
    report_every_s: float = 5.0

    def __post_init__(self) -> None:
        if any(urlsplit(url).scheme not in ("http", "https") for url in self.registry.split(",")):
            raise ValueError(f"registry is {self.registry!r}: give http://host:port")
        try:
            DeviceSpec.parse(self.accelerator)
        except BadField:
            raise ValueError(
                f"accelerator is {self.accelerator!r}: give cpu, cuda:N, cuda:GPU-<uuid> or npu:N"
            ) from None
        for name in ("instance", "decode_instance"):
            if not re.fullmatch(NAME, getattr(self, name), re.ASCII):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give letters, digits and . _ -, at most 128")
        check_seconds(self, "node", or_zero=("report_every_s",))
        if not SHORTEST_TTL_S <= self.ttl_s <= LONGEST_TTL_S:
            raise ValueError(f"ttl_s needs {SHORTEST_TTL_S} to {LONGEST_TTL_S:g}")


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """`pdctl agent`: the mover for engines in other processes.

    sockets  where engines hand their pools over: a path each, one for each rank at this host; unless said, agent.sock
             in the runtime directory ($RUNTIME_DIRECTORY as systemd gives it, else $XDG_RUNTIME_DIR/pdctl)
    users    user ids that may speak to it besides its own; their sockets are open to all who reach their directory,
             and the kernel says who asks
    """

    sockets: tuple[Path, ...] = ()
    users: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.sockets)) != len(self.sockets):
            raise ValueError("one socket is given twice: give each rank one of its own")
        if any(user < 0 for user in self.users):
            raise ValueError("users are numbers from 0: give what id -u says")


@dataclass(frozen=True, slots=True)
class RankSettings:
    """What `pdctl register` announces: one prefill rank of an engine that has no client. Fields as on SGLang's wire."""

    host: str = ""
    port: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    cp_size: int = 1
    cp_rank: int = 0
    dp_size: int = 1
    dp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    page_size: int = 1
    kv_cache_dtype: str = "auto"
    kv_layout: str | None = None
    load_balance_method: str = "follow_bootstrap_room"
    prefill_http_port: int | None = None
    hold: bool = False

    def announcement(self) -> Announcement:
        """Raises ConfigError for a rank that is not named, BadField for one that cannot be."""
        if not self.host or not self.port:
            raise ConfigError("register needs the rank's address: give --rank-host and --rank-port")
        shape = Shape(
            attn_tp_size=self.tp_size,
            attn_cp_size=self.cp_size,
            dp_size=self.dp_size,
            pp_size=self.pp_size,
            page_size=self.page_size,
            kv_cache_dtype=self.kv_cache_dtype,
            kv_layout=self.kv_layout,
            follow_bootstrap_room=self.load_balance_method == "follow_bootstrap_room",
        )
        seat = Seat(self.dp_rank, self.cp_rank, self.tp_rank, self.pp_rank)
        return Announcement(seat, shape, Endpoint(self.host, self.port), self.prefill_http_port)


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """`pdctl store`: which store, for which rank, and how long it may take.

    extra           Mooncake's part of SGLang's extra config, as JSON, or `@FILE` with it (JSON or TOML)
    file            a JSON file; unless said, what SGLANG_HICACHE_MOONCAKE_CONFIG_PATH names. Precedence as SGLang's:
                    extra where it names a master, then the file, then MOONCAKE_* in the environment
    local_hostname  this host's address for the other ranks, above MOONCAKE_LOCAL_HOSTNAME
    device          whose memory it is to carry: cpu, cuda:N, npu:N
    tp, pp, dp, cp  this rank; with tp_size and pp_size the segment is divided
    wait_s          for how long a master that is not ready is waited for
    attempts, every_s  of the warm-up: how often, and how far apart at first; the wait grows to four times that
    """

    extra: str = ""
    file: str = ""
    local_hostname: str = ""
    device: str = "cpu"
    tp: int = 0
    pp: int = 0
    dp: int = 0
    cp: int = 0
    tp_size: int = 1
    pp_size: int = 1
    wait_s: float = 60.0
    attempts: int = 10
    every_s: float = 1.0

    def __post_init__(self) -> None:
        check_seconds(self, "store")
        self.rank()
        self.patience()

    def rank(self) -> StoreRank:
        """Raises ConfigError."""
        return StoreRank(self.tp, self.pp, self.dp, self.cp, self.tp_size, self.pp_size)

    def patience(self) -> StorePatience:
        """Raises ConfigError."""
        return StorePatience(
            until_ready=replace(UNTIL_READY, give_up_after_s=self.wait_s),
            warm_up=replace(
                WARM_UP, first_wait_s=self.every_s, max_wait_s=4 * self.every_s, max_attempts=self.attempts
            ),
        )
