"""
How Mooncake's store is to be reached and what this rank gives to it: from three sources, by one parser.

    extra config, where it names a master or a client  >  the file  >  MOONCAKE_* in the environment

One source is taken whole, as SGLang does, never a mixture; two keys stand above that, being a process's own: the local
host name (the process first, then the source) and the protocol (MOONCAKE_PROTOCOL where the source is silent).
Opens no file and reads no environment: both are arguments.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any, Final

from pdctl.core.address import Endpoint, check_host, is_loopback, is_wildcard
from pdctl.errors import BadField, ConfigError

GIB: Final = 1 << 30
DEFAULT_TENANT: Final = "default"
CONFIG_PATH: Final = "SGLANG_HICACHE_MOONCAKE_CONFIG_PATH"
LOCAL_HOSTNAMES: Final = ("MOONCAKE_LOCAL_HOSTNAME", "LOCAL_HOSTNAME")
PROTOCOLS: Final = (
    *("tcp", "rdma", "ascend", "barex", "cxl", "efa", "hip", "maca", "musa", "nvlink", "nvlink_intra"),
    *("nvmeof", "sunrise_link", "ubshmem"),
)
VARIABLES: Final[Mapping[str, str]] = {
    "MOONCAKE_MASTER": "master_server_address",
    "MOONCAKE_CLIENT": "client_server_address",
    "MOONCAKE_TE_META_DATA_SERVER": "metadata_server",
    "MOONCAKE_GLOBAL_SEGMENT_SIZE": "global_segment_size",
    "MOONCAKE_PROTOCOL": "protocol",
    "MOONCAKE_DEVICE": "device_name",
    "MOONCAKE_LOCAL_HOSTNAME": "local_hostname",
    "MOONCAKE_CHECK_SERVER": "check_server",
    "MOONCAKE_MASTER_METRICS_PORT": "master_metrics_port",
    "MOONCAKE_STANDALONE_STORAGE": "standalone_storage",
    "MOONCAKE_ENABLE_SSD_OFFLOAD": "enable_ssd_offload",
    "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH": "ssd_offload_path",
    "MOONCAKE_TENANT_ID": "tenant_id",
}
NOT_OURS: Final = frozenset(
    {
        *("prefetch_threshold", "prefetch_timeout_base", "prefetch_timeout_per_ki_token"),
        *("hicache_storage_pass_prefix_keys", "extra_backend_tag", "enable_group_semantics", "backend_name"),
        *("module_path", "class_name", "interface_v1"),
    }
)
"""What SGLang itself reads from the same extra config: no business of the store's set-up, and no mistake."""
_WHEELS_OWN = re.compile(
    r"MOONCAKE_(OFFLOAD|AWS|BUCKET|DFS|DISK|DISTRIBUTED|NVME_KV|OFFSET|SCANMETA|USE|STORE|CONFIG|LOCAL_BUFFER)(_.*)?"
)
"""Variables that the wheel reads by itself (MOONCAKE_FACTS 8.5)."""
_KUBERNETES = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)")
"""Kubernetes puts MOONCAKE_MASTER_SERVICE_HOST there for a service named mooncake-master."""
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)i?b?)\s*", re.ASCII | re.IGNORECASE)
_POWER = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_TRUE, _FALSE = ("true", "1", "yes", "y", "on"), ("false", "0", "no", "n", "off")


@dataclass(frozen=True, slots=True)
class StoreRank:
    """Which rank of its instance opens the store; known before the first attempt, and in every line that is logged."""

    tp: int = 0
    pp: int = 0
    dp: int = 0
    cp: int = 0
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "cp"):
            if getattr(self, name) < 0:
                raise ConfigError(f"store rank {name} is {getattr(self, name)}: ranks count from 0")
        for name in ("tp", "pp"):
            size = getattr(self, f"{name}_size")
            if getattr(self, name) >= size:
                raise ConfigError(
                    f"store rank {name} is {getattr(self, name)} of {size}: ranks count from 0, raise one"
                )

    def __str__(self) -> str:
        return f"dp{self.dp}/cp{self.cp}/tp{self.tp}/pp{self.pp}"


@dataclass(frozen=True, slots=True)
class KVStoreConfig:
    """What the store's set-up needs, of the whole instance; named as in SGLang's extra config.

    master_server_address  the master's RPC port, `host:port`; or what the wheel takes for HA (`etcd://...`)
    global_segment_size    bytes of DRAM that all TP x PP ranks of an instance give together
    local_buffer_size      bytes through which put and get of small values go; pages need none
    device_name            RDMA devices, by commas; or one text for each TP rank, as a JSON object
    master_metrics_port    where the master answers HTTP; 0: it is not asked there
    check_server           refuse to start without its HTTP answer; else a port that nobody listens at is no obstacle
    """

    master_server_address: str = ""
    client_server_address: str = ""
    local_hostname: str = "localhost"
    metadata_server: str = "P2PHANDSHAKE"
    global_segment_size: int = 4 * GIB
    local_buffer_size: int = 16 << 20
    protocol: str = "rdma"
    device_name: str | Mapping[int, str] = ""
    master_metrics_port: int = 9003
    check_server: bool = False
    standalone_storage: bool = False
    enable_ssd_offload: bool = False
    ssd_offload_path: str | None = None
    tenant_id: str = DEFAULT_TENANT

    def __post_init__(self) -> None:
        for key, problem in _problems(self):
            raise ConfigError(f"store {key}: {problem}")

    @property
    def master(self) -> Endpoint | None:
        """Where the master can be asked; None for an address that only the wheel can read."""
        return None if "://" in self.master_server_address else Endpoint.parse(self.master_server_address)

    def segment_of(self, rank: StoreRank) -> int:
        """This rank's share of the segment."""
        return self.global_segment_size // (rank.tp_size * rank.pp_size)

    def device_of(self, rank: StoreRank) -> str:
        """Raises ConfigError where each rank has a device but this one: the wheel would pick any."""
        if isinstance(self.device_name, str):
            return self.device_name
        if rank.tp not in self.device_name:
            known = ", ".join(map(str, sorted(self.device_name)))
            raise ConfigError(f"store device_name has none for TP rank {rank.tp}, only for {known}: add it")
        return self.device_name[rank.tp]


KEYS: Final = tuple(f.name for f in fields(KVStoreConfig))


@dataclass(frozen=True, slots=True)
class Resolved:
    """A config, where each value came from, and what an operator may want to hear of it."""

    config: KVStoreConfig
    sources: Mapping[str, str]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreFile:
    """The JSON file at `path`, as text."""

    path: str
    text: str


@dataclass(slots=True)
class _Source:
    """One of the three: raw values by our key, and how each is called there."""

    name: str
    values: dict[str, Any]
    called: Callable[[str], str]
    warnings: list[str] = field(default_factory=list)


def resolve(
    extra: Mapping[str, Any] | str | None = None,
    file: StoreFile | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    local_hostname: str | None = None,
) -> Resolved:
    """The config that these make together. `local_hostname`: the process knows its own address, and that counts first.

    Raises ConfigError that names the key, its source and the fix.
    """
    variables = environ or {}
    given = _from_extra(extra)
    source = _chosen(given, file, variables)
    if given.values and source.name != given.name:
        unused = ", ".join(sorted(given.values))
        source.warnings.append(f"extra config names no master_server_address: its {unused} are not used")
    values, sources = _parsed(source)
    _of_the_process(values, sources, variables, local_hostname)
    _from_the_wheels_environment(values, sources, variables)
    config = _checked(values, sources, source)
    return Resolved(config, {key: sources.get(key, "default") for key in KEYS}, (*source.warnings, *_doubts(config)))


def _chosen(extra: _Source, file: StoreFile | None, environ: Mapping[str, str]) -> _Source:
    if extra.values.get("master_server_address") or extra.values.get("client_server_address"):
        return extra
    return _from_file(file) if file is not None else _from_environment(environ)


def _from_extra(extra: Mapping[str, Any] | str | None) -> _Source:
    name = "extra config"
    if isinstance(extra, str):
        extra = _json_object(extra, name) if extra.strip() else {}
    return _source(name, extra or {}, NOT_OURS)


def _from_file(file: StoreFile) -> _Source:
    name = f"file {file.path}"
    return _source(name, _json_object(file.text, name))


def _source(name: str, given: Mapping[str, Any], others: frozenset[str] = frozenset()) -> _Source:
    for key in given:
        if key not in KEYS and key not in others:
            raise ConfigError(f"{key} in {name} is no setting of the store: {_instead(key, KEYS)}")
    return _Source(
        name, {k: v for k, v in given.items() if k in KEYS and v is not None}, lambda key: f"{key} in {name}"
    )


def _from_environment(environ: Mapping[str, str]) -> _Source:
    for name in environ:
        if name.startswith("MOONCAKE_") and name not in VARIABLES and not _is_anothers(name):
            raise ConfigError(f"{name} in the environment is no setting of the store: {_instead(name, VARIABLES)}")
    variable = {key: name for name, key in VARIABLES.items()}
    values = {key: environ[name] for key, name in variable.items() if environ.get(name)}
    return _Source("the environment", values, lambda key: f"{variable.get(key, key)} in the environment")


def _is_anothers(name: str) -> bool:
    return bool(_WHEELS_OWN.fullmatch(name) or _KUBERNETES.fullmatch(name))


def _instead(key: str, known: Mapping[str, str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f"is {near[0]} meant?" if near else f"remove it; there are {', '.join(known)}"


def _json_object(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is no JSON ({error}): mend it there") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is a JSON {type(value).__name__}: give an object, {{...}}")
    return value


def _parsed(source: _Source) -> tuple[dict[str, Any], dict[str, str]]:
    values, sources = {}, {}
    for key, raw in source.values.items():
        try:
            values[key] = PARSERS[key](raw)
        except ValueError as error:
            raise ConfigError(f"{source.called(key)} is {raw!r}: {error}") from error
        sources[key] = source.called(key).removeprefix(f"{key} in ")
    return values, sources


def _of_the_process(
    values: dict[str, Any], sources: dict[str, str], environ: Mapping[str, str], local_hostname: str | None
) -> None:
    for name in reversed(LOCAL_HOSTNAMES):
        if environ.get(name):
            values["local_hostname"], sources["local_hostname"] = environ[name], f"{name} in the environment"
    if local_hostname:
        values["local_hostname"], sources["local_hostname"] = local_hostname, "the process"
    if "protocol" not in values and environ.get("MOONCAKE_PROTOCOL"):
        values["protocol"], sources["protocol"] = environ["MOONCAKE_PROTOCOL"], "MOONCAKE_PROTOCOL in the environment"


def _from_the_wheels_environment(values: dict[str, Any], sources: dict[str, str], environ: Mapping[str, str]) -> None:
    """With offload on and no path given, the wheel itself goes by this variable, whatever the source of the rest."""
    name = "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH"
    if values.get("enable_ssd_offload") and "ssd_offload_path" not in values and environ.get(name):
        values["ssd_offload_path"], sources["ssd_offload_path"] = environ[name], f"{name} in the environment"


def _checked(values: dict[str, Any], sources: Mapping[str, str], source: _Source) -> KVStoreConfig:
    if "master_server_address" not in values and not values.get("standalone_storage"):
        raise ConfigError(_no_master(source, "client_server_address" in values))
    unchecked = SimpleNamespace(**{f.name: f.default for f in fields(KVStoreConfig)} | values)
    for key, problem in _problems(unchecked):
        raise ConfigError(f"{key} from {sources.get(key, source.name)}: {problem}")
    return KVStoreConfig(**values)


def _no_master(source: _Source, has_client: bool) -> str:
    where = source.called("master_server_address")
    if has_client:
        client = source.called("client_server_address")
        return f"{where} is not given but {client} is: switch standalone_storage on, or give the master's host:port"
    return f"{where} is not given: give the master's host:port (mooncake_master listens at 50051)"


def _problems(config: KVStoreConfig | SimpleNamespace) -> Iterator[tuple[str, str]]:
    """Each with the key that has to change."""
    yield from _address_problems(config)
    if config.global_segment_size < 0 or config.local_buffer_size < 0:
        yield "global_segment_size", "is below 0: give bytes, or a size like 4gb"
    if not 0 <= config.master_metrics_port <= 65535:
        yield "master_metrics_port", f"is {config.master_metrics_port}: give 1 to 65535, or 0 to leave it unasked"
    if config.protocol not in PROTOCOLS:
        yield "protocol", f"{config.protocol!r} is none that Mooncake knows: give one of {', '.join(PROTOCOLS)}"
    yield from _offload_problems(config)


def _address_problems(config: KVStoreConfig | SimpleNamespace) -> Iterator[tuple[str, str]]:
    for key in ("master_server_address", "client_server_address"):
        address = getattr(config, key)
        try:
            if address and "://" not in address and Endpoint.parse(address).is_wildcard:
                yield key, f"{address} is every address and none: give the host that listens there"
        except BadField as error:
            yield key, str(error)
    if not (config.master_server_address or config.standalone_storage):
        yield "master_server_address", "is not given: give the master's host:port (mooncake_master listens at 50051)"
    if config.standalone_storage and not config.client_server_address:
        yield "client_server_address", "is not given but standalone_storage is on: give the client's host:port"
    yield from _hostname_problems(config.local_hostname)


def _hostname_problems(name: str) -> Iterator[tuple[str, str]]:
    host = re.sub(r":\d+(:npu_\d+)?$", "", name) if name.count(":") in (1, 2) or name.startswith("[") else name
    try:
        check_host(host.strip("[]"))
    except BadField as error:
        yield "local_hostname", str(error)
        return
    if is_wildcard(host.strip("[]")):
        yield "local_hostname", f"{name} names no host: give the address at which the other ranks reach this one"


def _offload_problems(config: KVStoreConfig | SimpleNamespace) -> Iterator[tuple[str, str]]:
    path = config.ssd_offload_path
    if path is not None and not config.enable_ssd_offload:
        yield "ssd_offload_path", "is given but enable_ssd_offload is off: switch it on, or leave the path out"
    if config.enable_ssd_offload and path is None:
        yield "ssd_offload_path", "is not given but enable_ssd_offload is on: give a directory on the SSD"
    if path is not None and not path.startswith("/"):
        yield "ssd_offload_path", f"{path!r} is relative: the wheel takes absolute paths only, begin it with /"


def _doubts(config: KVStoreConfig) -> Iterator[str]:
    master = None if config.standalone_storage else config.master
    if master is not None and is_loopback(config.local_hostname.partition(":")[0]) and not master.is_loopback:
        yield (
            f"local_hostname is {config.local_hostname} but the master is at {master}: other hosts would dial "
            "themselves for this rank's segment; set MOONCAKE_LOCAL_HOSTNAME to this host's address"
        )


@dataclass(frozen=True, slots=True)
class SetUp:
    """What the wheel's own set-up is called with: by position what it has always taken, by name what came later."""

    local_hostname: str
    metadata_server: str
    segment_nbytes: int
    buffer_nbytes: int
    protocol: str
    device: str
    master: str
    options: Mapping[str, Any] = field(default_factory=dict)


def set_up(config: KVStoreConfig, rank: StoreRank, known: frozenset[str]) -> tuple[SetUp, tuple[str, ...]]:
    """How this rank's store is set up with a wheel that knows the parameters `known`, and what had to be left out.

    Raises ConfigError for what cannot be done, and must not be left out: without its tenant data would land in the
    wrong place.
    """
    share = config.segment_of(rank)
    if config.global_segment_size and not share:
        raise ConfigError(f"store global_segment_size is {config.global_segment_size}, nothing for each rank: raise it")
    wanted: dict[str, Any] = {}
    if config.enable_ssd_offload:
        wanted |= {"enable_ssd_offload": True, "ssd_offload_path": config.ssd_offload_path}
    if config.tenant_id != DEFAULT_TENANT:
        wanted["tenant_id"] = config.tenant_id
    left_out = tuple(name for name in wanted if name not in known)
    if "tenant_id" in left_out:
        raise ConfigError(
            f"store tenant_id is {config.tenant_id} but the installed Mooncake wheel's setup has no tenant_id: "
            "install a newer wheel, or use the default tenant"
        )
    if left_out:  # a path without the switch, or a switch without the path, is not what was asked for
        wanted = {name: value for name, value in wanted.items() if name == "tenant_id"}
    plan = SetUp(
        config.local_hostname,
        config.metadata_server,
        share,
        config.local_buffer_size,
        config.protocol,
        config.device_of(rank),
        config.master_server_address,
        wanted,
    )
    return plan, left_out


def parse_size(raw: object) -> int:
    """Bytes from 4294967296, "4294967296", "4gb", "4 GB", "512MiB" or "1.5g"; as in SGLang a gb is 2**30."""
    if isinstance(raw, bool) or not isinstance(raw, int | str):
        raise ValueError("give bytes, or a size like 4gb or 512MiB")
    if isinstance(raw, int):
        if raw < 0:
            raise ValueError("is below 0: give bytes, or a size like 4gb")
        return raw
    match = _SIZE.fullmatch(raw)
    if match is None:
        raise ValueError("give bytes, or a size like 4gb or 512MiB")
    nbytes = float(match[1]) * (1 << _POWER[match[2].lower()]) if "." in match[1] else None
    return int(match[1]) << _POWER[match[2].lower()] if nbytes is None else int(nbytes)


def parse_devices(raw: object) -> str | dict[int, str]:
    """One text for all, or one for each TP rank from a JSON object (as text, or as it stands in JSON)."""
    if isinstance(raw, str) and not raw.strip().startswith("{"):
        return raw.strip()
    try:
        devices = json.loads(raw) if isinstance(raw, str) else raw
    except json.JSONDecodeError as error:
        raise ValueError(f'is no JSON ({error}): give {{"0": "mlx5_0", "1": "mlx5_1"}}') from error
    if not isinstance(devices, Mapping) or not all(_names_a_rank(k) and isinstance(v, str) for k, v in devices.items()):
        raise ValueError('give one text, or one for each TP rank: {"0": "mlx5_0", "1": "mlx5_1"}')
    return {int(rank): device for rank, device in devices.items()}


def _names_a_rank(key: object) -> bool:
    return str(key).isascii() and str(key).isdigit()


def _text(raw: object) -> str:
    if not isinstance(raw, str):
        raise ValueError("give a text")
    return raw.strip()


def _number(raw: object) -> int:
    if isinstance(raw, bool) or not (
        isinstance(raw, int) or (isinstance(raw, str) and re.fullmatch(r"\s*\d+\s*", raw))
    ):
        raise ValueError("give a whole number")
    return int(raw)


def _switch(raw: object) -> bool:
    word = str(raw).strip().lower()
    if word not in _TRUE + _FALSE:
        raise ValueError("give true or false")
    return word in _TRUE


def _tenant(raw: object) -> str:
    return str(raw).strip() or DEFAULT_TENANT


PARSERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(KEYS, _text),
    **dict.fromkeys(("check_server", "standalone_storage", "enable_ssd_offload"), _switch),
    **dict.fromkeys(("global_segment_size", "local_buffer_size"), parse_size),
    "master_metrics_port": _number,
    "device_name": parse_devices,
    "tenant_id": _tenant,
}
