"""
For which instance a request on a plain path speaks: stock wires have no field for it.

    1. the listener it came in at, where that one has a name      --listen prefill-a=10.0.0.1:8998
    2. the host that the client asked for, where it is mapped     --map-host prefill-a=prefill-a.serving.svc
                                                                  --map-host '*.pdctl.svc': the first label is the name
    3. `default`

The listener comes first because an operator chose it and a client cannot: a Host header is whatever a client writes.
Hosts are mapped only where somebody said so, and not by their first label everywhere: ranks register at the address
that they were given and decodes ask at the one that the router was given, so that `10.0.0.1`, `node-7` and `localhost`
are one registry as a rule. Taking their first labels for names would split one instance in three, each never complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pdctl.core.address import MAX_PORT, check_host, is_wildcard
from pdctl.errors import ConfigError

DEFAULT = "default"

SESSION_KEY = "mooncake_session"
"""Where a rank's lease has the `ip:port` by which peers know its Mooncake engine: in the metadata, of any role."""

HTTP_KEY = "pdctl_http"
"""Likewise the URL below which the rank answers /metrics, /readyz and /livez: `http://ip:port`."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)  # RFC 1123, in small letters
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Listener:
    """A further address of the service. `port` 0 takes any free one."""

    name: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Listener:
        """From `name=host:port` or `name=[::1]:port`. Raises ConfigError."""
        name, _, where = text.partition("=")
        host, _, port = where.rpartition(":")
        if not (name and host and port.isascii() and port.isdigit() and int(port) <= MAX_PORT):
            raise ConfigError(f"listen: {text!r} is not understood: write name=host:port, or name=[host]:port for IPv6")
        host = host.removeprefix("[").removesuffix("]")
        check_host(host, "listen")
        return cls(check_name(name, "listen"), host, int(port))


@dataclass(frozen=True, slots=True)
class Hosts:
    """Which instance a host name stands for. `suffixes`: each with its leading dot; the label before it is the name."""

    exact: Mapping[str, str] = field(default_factory=dict)
    suffixes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Hosts:
        """From `name=host` and `*.suffix`. Raises ConfigError."""
        exact: dict[str, str] = {}
        suffixes: list[str] = []
        for text in texts:
            if text.startswith("*."):
                suffixes.append("." + _host(text[2:], text))
                continue
            name, equals, host = text.partition("=")
            if not equals:
                raise ConfigError(f"map_host: {text!r} is not understood: write name=host, or *.suffix")
            if exact.setdefault(_host(host, text), check_name(name, "map_host")) != name:
                raise ConfigError(f"map_host: {host} is mapped to {exact[_host(host, text)]} and to {name}: choose one")
        return cls(exact, tuple(sorted(suffixes, key=len, reverse=True)))

    def of(self, host: str) -> str | None:
        """The instance, None for a host that nobody has mapped. `host` as in the header: with its port or without."""
        plain = _plain(host)
        if plain in self.exact:
            return self.exact[plain]
        for suffix in self.suffixes:
            label = plain.removesuffix(suffix)
            if label != plain and _LABEL.fullmatch(label):
                return label
        return None


class Names:
    """The order above. `listening`: (host, port) as bound -> the listener's name."""

    def __init__(self, listening: Mapping[tuple[str, int], str], hosts: Hosts) -> None:
        self._exact = {address: name for address, name in listening.items() if not is_wildcard(address[0])}
        self._by_port = {port: name for (host, port), name in listening.items() if is_wildcard(host)}
        self._hosts = hosts
        self._remembered: dict[bytes, str] = {}
        self.says_nothing = not listening and not hosts.exact and not hosts.suffixes

    def of(self, local: tuple[str, int] | None, host: bytes) -> str:
        """`local`: the address that the connection came in at; `host`: the Host header, empty where there is none."""
        if local is not None:
            name = self._exact.get(local) or self._by_port.get(local[1])
            if name is not None:
                return name
        return self._by_host(host)

    def _by_host(self, host: bytes) -> str:
        """Remembered: clients say the same few names all the time."""
        name = self._remembered.get(host)
        if name is None:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            name = self._remembered[host] = self._hosts.of(host.decode("latin-1")) or DEFAULT
        return name


def check_name(name: str, field: str) -> str:
    """Raises ConfigError for what cannot name an instance in a URL and a log line."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{field}: {name!r} cannot name an instance: use letters, digits, dots and dashes, 128 at most"
        )
    return name


def _plain(host: str) -> str:
    """`Prefill-A.svc.:8998` -> `prefill-a.svc`; `[::1]:80` -> `::1`."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _host(host: str, text: str) -> str:
    plain = _plain(host)
    if not plain or "*" in plain:
        raise ConfigError(f"map_host: {text!r} names no host: write name=host, or *.suffix")
    return plain
