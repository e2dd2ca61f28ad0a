"""
A host and a port that somebody listens at.

Nothing is resolved here and nothing is connected to: a host is text (IPv4, IPv6 without brackets, or a name) and stays
the text that was given.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import lru_cache

from pdctl.errors import BadField

MAX_PORT = 65_535
_SEPARATORS = frozenset(" []/@,")
_LONGEST_NAME = 253  # RFC 1035; every IPv6 text, zone included, is shorter


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """`host` without brackets, `port` from 1 on. Raises BadField("host" or "port") for what nobody can listen at."""

    host: str
    port: int

    def __post_init__(self) -> None:
        check_host(self.host)
        check_port(self.port)

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """From `name:port`, `10.0.0.1:port` or `[::1]:port`."""
        host, colon, port = text.strip().rpartition(":")
        if not colon or not (port.isascii() and port.isdigit()):
            raise BadField("address", f"{text!r} has no port: write host:port, or [host]:port for IPv6")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise BadField(
                "address", f"{text!r} can be read in two ways: put the IPv6 address in brackets, [host]:port"
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def tcp(self) -> str:
        """As ZMQ wants it."""
        return f"tcp://{self}"

    @property
    def is_wildcard(self) -> bool:
        """Whether this is "every interface": good for listening, useless for peers."""
        return is_wildcard(self.host)

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of the same host (or network namespace) can reach it."""
        return is_loopback(self.host)


@lru_cache(maxsize=4096)
def is_wildcard(host: str) -> bool:
    ip = ip_of(host)
    return host == "*" or (ip is not None and ip.is_unspecified)


@lru_cache(maxsize=4096)
def is_loopback(host: str) -> bool:
    ip = ip_of(host)
    return host.lower() in ("localhost", "localhost.") or (ip is not None and ip.is_loopback)


def check_host(host: str, field: str = "host") -> None:
    """Raise BadField(field) for a host that no address can be made of."""
    if _is_host(host):
        return
    if not host:
        raise BadField(field, "is empty: give the address that peers can reach")
    if len(host) > _LONGEST_NAME:
        raise BadField(field, f"is {len(host)} characters long, a host has at most {_LONGEST_NAME}: give one address")
    if not host.isprintable() or not _SEPARATORS.isdisjoint(host):
        raise BadField(field, f"{host!r} is no host: give an IPv4 address, a bare IPv6 address or a name")
    if ":" in host and ip_of(host) is None:
        raise BadField(field, f"{host!r} is no IPv6 address: give the host alone, the port has a field of its own")


def check_port(port: int, field: str = "port") -> None:
    """Raise BadField(field) for a port that nobody can listen at."""
    if not 1 <= port <= MAX_PORT:
        raise BadField(field, f"is {port}: give the port that is listened at, 1 to {MAX_PORT}")


@lru_cache(maxsize=4096)
def _is_host(host: str) -> bool:
    """What `check_host` says in sentences."""
    is_name = 0 < len(host) <= _LONGEST_NAME and host.isprintable() and _SEPARATORS.isdisjoint(host)
    return is_name and (":" not in host or ip_of(host) is not None)


@lru_cache(maxsize=4096)  # the same few hosts come again and again, and reading one takes 5 us
def ip_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for a name."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    # ::ffff:0.0.0.0 and ::ffff:127.0.0.1 are the IPv4 addresses inside them, which Python 3.11 does not see
    return getattr(ip, "ipv4_mapped", None) or ip
