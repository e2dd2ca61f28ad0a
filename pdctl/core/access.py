"""
Who may speak to the registry: by the address that a connection comes from, or by a bearer token.

    open paths    everybody: what watches the service has no token
    /v1           a token's holder where there are tokens, else trusted addresses
    other paths   trusted addresses (stock engines cannot send a token), or a token's holder

Decides and explains, nothing else: no file is read here and nothing is answered. What a caller may then do to a row
that another holds is the registry's to say. A token is held as its SHA-256 only, and no text of this module shows one.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from pdctl.core.address import Endpoint, ip_of, is_loopback
from pdctl.core.lives import Owner
from pdctl.errors import BadField, ConfigError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PRIVATE = (
    *("127.0.0.0/8", "::1/128"),
    *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"),  # RFC 1918
    *("fc00::/7", "fe80::/10"),  # unique local, link-local
)
"""What `private` stands for. Not 100.64.0.0/10: a provider's other customers live there, as some clusters' pods do."""

_NAMED = {"private": PRIVATE, "loopback": PRIVATE[:2], "any": ("0.0.0.0/0", "::/0")}

MIN_TOKEN = 16
MAX_TOKENS = 1000
"""Each is compared for each request under /v1, so that the time tells nothing: 1,000 take 0.1 ms."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)  # RFC 6750: what can stand in the header
_ADMIN = "admin:"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class TrustList:
    """Networks whose hosts may speak without a token."""

    networks: tuple[Network, ...]

    @classmethod
    def parse(cls, text: str) -> TrustList:
        """From `private,203.0.113.0/24,2001:db8::7`: networks, addresses, and the words private, loopback, any.

        Raises ConfigError for what is none of these, and for an empty list, by which nobody could register.
        """
        words = [word for word in re.split(r"[,\s]+", text) if word]
        if not words:
            raise ConfigError("trust is empty: nobody could register; give networks, or loopback for this host alone")
        return cls(tuple(_network(name) for word in words for name in _NAMED.get(word.lower(), (word,))))

    def trusts(self, host: str, here: str | None = None) -> bool:
        """Whether `host`, an address as a socket gives it, is in one of the networks. No address: no.

        `here` is where the connection came in: from the same address it comes from this very host, which counts as
        loopback. A host with a public address alone would else have to trust itself by name.
        """
        ip = ip_of(host)
        if ip is None:
            return False
        return self._holds(ip) or (ip == ip_of(here or "") and any(net.is_loopback for net in self.networks))

    def _holds(self, ip: Address) -> bool:
        return any(ip.version == net.version and ip in net for net in self.networks)

    def __str__(self) -> str:
        return ", ".join(str(network) for network in self.networks)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Who holds which token: names, and digests that are not shown. `admins` are names that have that role."""

    digests: tuple[tuple[str, bytes], ...] = field(repr=False)
    admins: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Tokens:
        """From lines of `name:token` or `name:sha256:<64 hex digits>`, an admin's `name:admin:...`; `#`: a comment.

        One name may stand twice, with its old token and its new one, while clients change over. Raises ConfigError that
        names the line, never what stands in it.
        """
        found: list[tuple[str, bytes]] = []
        holders: dict[bytes, str] = {}
        roles: dict[str, bool] = {}
        for number, line in _lines(text):
            name, is_admin, digest = _holder(number, line)
            if roles.setdefault(name, is_admin) != is_admin:
                raise ConfigError(f"line {number}: {name!r} is an admin in one line and none in another: choose one")
            if holders.setdefault(digest, name) != name:
                raise ConfigError(f"line {number}: {name!r} has the token of {holders[digest]!r}: give each its own")
            found.append((name, digest))
        if not found:
            raise ConfigError("there is no token in it: write at least one line name:token")
        if len(found) > MAX_TOKENS:
            raise ConfigError(f"{len(found)} tokens are more than {MAX_TOKENS}: let ranks of one instance share one")
        return cls(tuple(found), frozenset(name for name, is_admin in roles.items() if is_admin))

    def holder(self, token: str) -> str | None:
        """The name whose token this is; takes as long whichever it is, and where it is none."""
        given, found = _digest(token), None
        for name, digest in self.digests:
            if hmac.compare_digest(digest, given):
                found = name
        return found


class Denial(StrEnum):
    """Why somebody may not speak."""

    UNTRUSTED = "untrusted"  # comes from an address outside of the trusted networks
    NO_TOKEN = "no_token"  # noqa: S105 - the path needs one
    BAD_TOKEN = "bad_token"  # noqa: S105 - no name's
    NO_TLS = "no_tls"  # the path is served over TLS only, and this is not it


@dataclass(frozen=True, slots=True)
class Denied:
    """`why` for the counters, `text` for whoever asked, `status` of HTTP."""

    why: Denial
    text: str

    @property
    def status(self) -> int:
        return 401 if self.why in (Denial.NO_TOKEN, Denial.BAD_TOKEN) else 403


STOCK_ONLY = Denied(
    Denial.NO_TLS,
    "this listener is for stock engines, in the clear: ask for /v1 at the service's own address, over https",
)


@dataclass(frozen=True, slots=True)
class Rules:
    """`open_paths`: for everybody, exactly these. `tokens`: None where none are configured."""

    trust: TrustList
    tokens: Tokens | None = None
    open_paths: frozenset[str] = frozenset({"/", "/livez", "/readyz", "/metrics"})

    def admit(self, path: str, caller: Owner, trusted: bool, authorization: str | None) -> Owner | Denied:
        """`caller`, with the name of its token where one counts, or why not.

        `trusted` is what `trust` says of its host, which a shell remembers. A wrong token is refused on every guarded
        path: whoever sends one believes that it is valid.
        """
        if path in self.open_paths:
            return caller
        if self.tokens is None or authorization is None:
            return self._by_address(path, caller, trusted)
        token = bearer(authorization)
        principal = None if token is None else self.tokens.holder(token)
        if principal is None:
            return Denied(
                Denial.BAD_TOKEN, "the token is not known here: send `Authorization: Bearer <token>` with a valid one"
            )
        return Owner(caller.host, principal, principal in self.tokens.admins)

    def _by_address(self, path: str, caller: Owner, trusted: bool) -> Owner | Denied:
        if self.tokens is not None and is_native(path):
            return Denied(Denial.NO_TOKEN, "this path needs a token: send `Authorization: Bearer <token>`")
        if trusted:
            return caller
        return Denied(
            Denial.UNTRUSTED,
            f"{caller.host} is outside of the trusted networks: come from inside of them, "
            "or have them widened with --trust",
        )


def is_native(path: str) -> bool:
    """Whether `path` is of pdctl's own wire, whose clients can send a token."""
    return path == "/v1" or path.startswith("/v1/")


def bearer(authorization: str) -> str | None:
    """The token of an Authorization header; None for another scheme."""
    scheme, _, token = authorization.strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def check_token(token: str) -> str:
    """`token`, if it can be sent and is hard to guess. Raises ConfigError, which does not show it."""
    if not _TOKEN.fullmatch(token):
        raise ConfigError("the token has characters that no header can carry: make one with `openssl rand -hex 32`")
    if len(token) < MIN_TOKEN:
        raise ConfigError(
            f"the token has {len(token)} characters, at least {MIN_TOKEN} are needed: "
            "make one with `openssl rand -hex 32`"
        )
    return token


def check_advertised(
    address: Endpoint, host: str, field: str = "rank_ip", how: str = "--host or SGLANG_HOST_IP"
) -> None:
    """Raise BadField(field) for a loopback address that another host announces; `how` is by which setting it is mended.

    A wildcard never comes this far: it is refused from everybody.
    """
    if address.is_loopback and not is_loopback(host):
        raise BadField(
            field,
            f"is {address.host}, where only the rank's own host reaches it, but it speaks from {plain_host(host)}: "
            f"start the rank with that address ({how})",
        )


def plain_host(host: str) -> str:
    """An IPv4 peer of a dual-stack socket by its IPv4 address; everything else as it is."""
    if not host.lower().startswith("::ffff:"):
        return host
    ip = ip_of(host)
    return host if ip is None else str(ip)


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(
            f"trust: {error}: give networks as 10.0.0.0/8 or 2001:db8::/32, or one of {', '.join(sorted(_NAMED))}"
        ) from None
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        # a mapped peer is looked at as the IPv4 address that it is, so this network would never match
        mapped = network.network_address.ipv4_mapped
        raise ConfigError(f"trust: {text} is IPv4 in IPv6 clothes: write {mapped}/{max(0, network.prefixlen - 96)}")
    return network


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Line numbers, and what stands there."""
    for number, line in enumerate(text.splitlines(), start=1):
        said = line.strip()
        if said and not said.startswith("#"):
            yield number, said


def _holder(number: int, line: str) -> tuple[str, bool, bytes]:
    """Its name, whether it is an admin, and the digest. No token has a colon, so that a role cannot be one."""
    name, colon, secret = line.partition(":")
    if not colon or not _NAME.fullmatch(name):
        raise ConfigError(f"line {number}: is not name:token; a name has letters, digits, dots, dashes, at most 64")
    is_admin = secret.startswith(_ADMIN)
    secret = secret.removeprefix(_ADMIN)
    if secret.startswith("sha256:"):
        digits = secret.removeprefix("sha256:")
        if not _DIGEST.fullmatch(digits):
            raise ConfigError(f"line {number}: sha256: needs 64 hex digits: `printf %s TOKEN | sha256sum` prints them")
        return name, is_admin, bytes.fromhex(digits)
    try:
        return name, is_admin, _digest(check_token(secret))
    except ConfigError as error:
        raise ConfigError(f"line {number}: {error}") from None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def open_paths(text: str) -> frozenset[str]:
    """From `/livez,/metrics`; an empty text opens nothing. Raises ConfigError for what is no path."""
    return frozenset(_path(word) for word in re.split(r"[,\s]+", text) if word)


def _path(word: str) -> str:
    if not word.startswith("/"):
        raise ConfigError(f"open_paths: {word!r} is no path: it begins with a slash")
    return word
