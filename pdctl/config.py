"""
Every knob, once.

    flags > PDCTL_* in the environment > the field's own names (SGLANG_*, MOONCAKE_*) > --config FILE (TOML) > defaults

`PDCTL_PROBE__INTERVAL_S=2` sets `probe.interval_s`; the file has one table for each section. The sections are the value
objects that the shells take: each knob is declared beside what it decides, where it loads no server and no engine
(tests/test_loading.py), and no shell ever sees this bag. The only file that reads the environment.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pdctl.core.admission import AdmissionPolicy
from pdctl.core.allowance import SenderLimits
from pdctl.core.capacity import RegistryLimits, ReportLimits
from pdctl.core.draining import DrainPolicy
from pdctl.core.ejection import ProbePolicy
from pdctl.core.feed import WatchLimits
from pdctl.core.fleet import FleetPolicy
from pdctl.core.kvstore import CONFIG_PATH, Resolved, StoreFile, resolve
from pdctl.core.transfer import RoomTimeouts
from pdctl.core.witness import WitnessPolicy
from pdctl.credentials import AccessSettings, Credentials
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import ConfigError
from pdctl.logs import LogSettings
from pdctl.persistence.etcd_place import EtcdSettings
from pdctl.retry import RetryPolicy
from pdctl.sections import AgentSettings, MetadataSettings, NodeSettings, RankSettings, ServeSettings, StoreSettings
from pdctl.tracing import TraceSettings

PREFIX = "PDCTL_"

Nested = dict[str, Any]
"""section -> name -> value, as yet unchecked."""

ALIASES: dict[str, str] = {
    "SGLANG_ENABLE_FAILED_SESSION_PROBE": "probe.enabled",
    "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "probe.interval_s",
    "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S": "probe.max_interval_s",
    "SGLANG_FAILED_SESSION_PROBE_IDLE_TIMEOUT_S": "probe.idle_timeout_s",
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "room.bootstrap_s",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "room.waiting_s",
    "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "room.release_s",
    "SGLANG_DISAGGREGATION_BOOTSTRAP_ENTRY_CLEANUP_INTERVAL": "serve.room_ttl_s",
    "SGLANG_HOST_IP": "node.host",
    "HOST_IP": "node.host",
    "MOONCAKE_PROTOCOL": "engine.protocol",
    "MOONCAKE_DEVICE": "engine.device",
    "MC_FORCE_TCP": "engine.force_tcp",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "trace.endpoint",
}
"""What operators of the field have set already -> our name for it. The first of two names for one knob wins."""


class Settings(BaseSettings):
    """All sections; frozen. `load` makes one from everything that an operator may have said."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, env_ignore_empty=True
    )

    serve: ServeSettings = ServeSettings()
    etcd: EtcdSettings = EtcdSettings()
    metadata: MetadataSettings = MetadataSettings()
    vllm: FleetPolicy = FleetPolicy()
    access: AccessSettings = AccessSettings()
    admission: AdmissionPolicy = AdmissionPolicy()
    witness: WitnessPolicy = WitnessPolicy()
    drain: DrainPolicy = DrainPolicy()
    client: Credentials = Credentials()
    limits: RegistryLimits = RegistryLimits()
    node: NodeSettings = NodeSettings()
    rank: RankSettings = RankSettings()
    agent: AgentSettings = AgentSettings()
    store: StoreSettings = StoreSettings()
    probe: ProbePolicy = ProbePolicy()
    retry: RetryPolicy = RetryPolicy()
    room: RoomTimeouts = RoomTimeouts()
    sender: SenderLimits = SenderLimits()
    watch: WatchLimits = WatchLimits()
    reports: ReportLimits = ReportLimits()
    engine: MooncakeSettings = MooncakeSettings()
    log: LogSettings = LogSettings()
    trace: TraceSettings = TraceSettings()


class _Given(PydanticBaseSettingsSource):
    """A source whose nested values are already at hand."""

    def __init__(self, settings_cls: type[BaseSettings], values: Nested) -> None:
        super().__init__(settings_cls)
        self._values = values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        return self._values.get(field_name), field_name, False

    def __call__(self) -> Nested:
        return self._values


def load(flags: Mapping[str, object] | None = None, *, file: Path | None = None) -> Settings:
    """Settings from `flags` (dotted names), the environment and `file`, in that order of weight.

    Raises ConfigError that names the knob, what was given and, for an unknown name, the known ones.
    """
    aliases, table = _from_aliases(os.environ), _from_file(file)
    _refuse_unknown_sections(os.environ)

    class _Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings, env_settings, _Given(settings_cls, aliases), _Given(settings_cls, table))

    try:
        return _Loaded(**_nested((flags or {}).items()))
    except ValidationError as error:
        raise ConfigError(_in_words(error)) from error


def environment() -> Mapping[str, str]:
    """The process environment, for those below who take it as an argument."""
    return os.environ


def store_config(
    extra: Mapping[str, Any] | str | None = None,
    *,
    file: str = "",
    local_hostname: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    """What the store's three sources say together (docs/store.md), this process's environment among them.

    extra, file  as in StoreSettings; extra may be the object itself
    Raises ConfigError that names the key, its source and the fix.
    """
    variables = os.environ if environ is None else environ
    path = file or variables.get(CONFIG_PATH, "")
    if isinstance(extra, str) and extra.startswith("@"):
        extra = _extra_in(Path(extra[1:]))
    chosen = StoreFile(path, _text_of(Path(path), CONFIG_PATH)) if path and not _names_a_store(extra) else None
    return resolve(extra, chosen, variables, local_hostname=local_hostname)


def _names_a_store(extra: Mapping[str, Any] | str | None) -> bool:
    """Whether the file is not read at all, as in SGLang: it may belong to another."""
    try:
        found = json.loads(extra) if isinstance(extra, str) and extra.strip() else extra
    except ValueError:
        return True  # `resolve` says what is wrong with it
    return isinstance(found, Mapping) and bool(found.get("master_server_address") or found.get("client_server_address"))


def _extra_in(path: Path) -> Mapping[str, Any] | str:
    text = _text_of(path, "extra config")
    try:
        return tomllib.loads(text) if path.suffix.lower() == ".toml" else text
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"extra config {path} is no TOML ({error}): mend it there") from error


def _text_of(path: Path, what: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} cannot be read ({error}): give a readable file") from error


def state_dir(environ: Mapping[str, str]) -> Path:
    """Where a service of this user keeps what outlives it. Raises ConfigError where nobody says."""
    if ours := environ.get("STATE_DIRECTORY", "").partition(":")[0]:  # systemd's, several with colons between
        return Path(ours)
    try:
        base = environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    except RuntimeError as error:
        raise ConfigError(f"no state directory ({error}): give --journal sqlite:PATH, or --journal memory:") from error
    return Path(base, "pdctl")


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """Where a service of this user keeps its sockets. Raises ConfigError where nobody says."""
    if ours := environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]:
        return Path(ours)
    if base := environ.get("XDG_RUNTIME_DIR"):
        return Path(base, "pdctl")
    raise ConfigError("no runtime directory ($RUNTIME_DIRECTORY or $XDG_RUNTIME_DIR): give --socket PATH")


def _nested(items: Iterable[tuple[str, object]]) -> Nested:
    """{"probe.enabled": 1} -> {"probe": {"enabled": 1}}; the first of two values for one name wins."""
    result: Nested = {}
    for dotted, value in items:
        section, _, name = dotted.partition(".")
        result.setdefault(section, {}).setdefault(name, value)
    return result


def _from_aliases(environ: Mapping[str, str]) -> Nested:
    return _nested((ours, environ[theirs]) for theirs, ours in ALIASES.items() if environ.get(theirs))


def _from_file(file: Path | None) -> Nested:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"settings file {file} cannot be used ({error}): give a readable TOML file") from error


def _refuse_unknown_sections(environ: Mapping[str, str]) -> None:
    known = sorted(Settings.model_fields)
    for name in environ:
        section = name.removeprefix(PREFIX).partition("__")[0].lower()
        if name.startswith(PREFIX) and section not in known:
            raise ConfigError(
                f"{name} is no setting: its first part must be one of {', '.join(known)}, then two underscores"
            )


def _in_words(error: ValidationError) -> str:
    return "; ".join(_problem_in_words(problem) for problem in error.errors(include_url=False))


def _problem_in_words(problem: ErrorDetails) -> str:
    dotted = ".".join(str(part) for part in problem["loc"])
    variable = PREFIX + "__".join(str(part).upper() for part in problem["loc"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{dotted} is no setting: {_known(problem['loc'])}"
    given = problem["input"]
    said = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return (
        f"{dotted}: {problem['msg'].removeprefix('Value error, ')}{said}: mend it in the flag, {variable} or the file"
    )


def _known(loc: tuple[int | str, ...]) -> str:
    section = Settings.model_fields.get(str(loc[0]))
    if section is None:
        return f"the sections are {', '.join(sorted(Settings.model_fields))}"
    return f"{loc[0]} has {', '.join(f.name for f in fields(type(section.default)))}"
