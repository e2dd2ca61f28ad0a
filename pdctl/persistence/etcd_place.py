"""
Where etcd is and how to get in, before anything of etcd is imported: `pdctl serve` without it needs none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

from pdctl.core.address import Endpoint
from pdctl.errors import BadField, ConfigError

ETCD: Final = "etcd://"
PREFIX: Final = "pdctl"


@dataclass(frozen=True, slots=True)
class EtcdPlace:
    """What a journal's URL says: where etcd's members listen, and what all of our keys begin with."""

    endpoints: tuple[Endpoint, ...]
    prefix: str = PREFIX

    @classmethod
    def parse(cls, url: str) -> EtcdPlace:
        """Raises ConfigError."""
        # Not by urlsplit: Python 3.11.4 and later, and what Debian has mended, refuse brackets after a comma.
        where, _, query = url.removeprefix(ETCD).partition("?")
        members, _, path = where.partition("/")
        options = dict(parse_qsl(query, keep_blank_values=True))
        prefix = options.pop("prefix", PREFIX).strip("/")
        if not url.startswith(ETCD) or not members or path or options or not prefix or not prefix.isprintable():
            raise ConfigError(f"journal is {url!r}: give {ETCD}HOST:PORT[,HOST:PORT...][?prefix=NAME]")
        try:
            endpoints = tuple(Endpoint.parse(text) for text in members.split(","))
        except BadField as error:
            raise ConfigError(f"journal is {url!r} ({error}): give {ETCD}HOST:PORT[,HOST:PORT...]") from error
        return cls(endpoints, prefix)

    def __str__(self) -> str:
        return f"{ETCD}{','.join(map(str, self.endpoints))}?prefix={self.prefix}"

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def name(self, key: str) -> str:
        """What `key` made a key of."""
        return key[len(self.prefix) + 1 :]


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """How to reach etcd. Addresses and prefix are in the journal's URL; here is what is secret, or a file.

    username, password   both or none
    ca                   file with the authorities that are trusted; with it, or `tls`, connections are encrypted
    cert, key            files with the client's own certificate and its key: both or none
    tls                  encrypt even without `ca`: the system's authorities are trusted
    timeout_s            for one call to one endpoint
    advertise            the URL by which the other registries over this etcd reach this one, to ask what its ranks
                         report; unless said, its own address, of every interface the one by which it reaches etcd
    """

    username: str | None = None
    password: str | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    tls: bool = False
    timeout_s: float = 2.0
    advertise: str | None = None

    def __post_init__(self) -> None:
        if (self.username is None) != (self.password is None):
            raise ConfigError("etcd.username and etcd.password belong together: give both, or none")
        if (self.cert is None) != (self.key is None):
            raise ConfigError("etcd.cert and etcd.key belong together: give both, or none")
        if self.advertise is not None and not self.advertise.startswith(("http://", "https://")):
            raise ConfigError(f"etcd.advertise is {self.advertise!r}: give http://host:port")
        if not self.timeout_s > 0:
            raise ConfigError(f"etcd.timeout_s is {self.timeout_s}: give seconds above 0")

    @property
    def is_encrypted(self) -> bool:
        return self.tls or self.ca is not None or self.cert is not None

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """ca, key and cert. Raises ConfigError for a file that cannot be read."""
        return _read("ca", self.ca), _read("key", self.key), _read("cert", self.cert)


def _read(name: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"etcd.{name}: {path} cannot be read ({error.strerror}): give a readable file") from error
