"""
What is read from files and read again when they change: tokens, certificates, keys.

The first reading must succeed, so that a wrong path is met at the start. A later change that cannot be used keeps what
was there before and says so once. Nothing is watched by itself: whoever holds one asks it to `refresh`, which costs one
stat a file. No secret is ever part of a text here; keys with a passphrase are refused.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NoReturn, Protocol, TypeVar

import structlog

from pdctl.core.access import Rules, Tokens, TrustList, check_token, open_paths
from pdctl.errors import ConfigError

log = structlog.get_logger(__name__)

T = TypeVar("T")

FOLLOW_EVERY_S = 1.0
"""How soon a change is seen: a stat of four files takes 10 us, and nobody notices a rotation one second late."""

MAX_TOKEN_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """Whom the service admits.

    trust          who may speak without a token: networks, addresses, or the words private (loopback, private and
                   link-local ranges), loopback, any; separated by commas
    token_file     lines of `name:token` or `name:sha256:<hex>`, of those who may drain and deregister what others
                   have registered `name:admin:...`; with it, /v1 needs a token
    open_paths     what everybody may ask, token or not: probes and scrapers have none, nor has a browser that opens the
                   page, which is the same for everybody and asks /v1 for the fleet
    tls_cert       certificate chain, PEM; with it the service speaks TLS and nothing else
    tls_key        its key, PEM; where it does not stand in the same file
    tls_client_ca  PEM; with it, only clients with a certificate of these authorities get through the handshake
    """

    trust: str = "private"
    token_file: Path | None = None
    open_paths: str = "/,/livez,/readyz,/metrics"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def __post_init__(self) -> None:
        TrustList.parse(self.trust)
        open_paths(self.open_paths)
        for name in ("tls_key", "tls_client_ca"):
            if getattr(self, name) is not None and self.tls_cert is None:
                raise ConfigError(f"{name} is given without tls_cert: give the service's certificate as well")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client shows the registry, and whose certificate it believes.

    token       sent with every question; better in a file, where it can be changed while we run
    token_file  one line, the token alone; read again when it changes
    tls_ca      PEM: authorities of the registry's certificate, instead of the system's
    tls_cert    our own certificate, for a registry that asks for one
    tls_key     its key, where it does not stand in the same file
    """

    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        if self.token is not None:
            check_token(self.token)
        if self.token is not None and self.token_file is not None:
            raise ConfigError("token and token_file are both given: keep the file")
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigError("tls_key is given without tls_cert: give the client's certificate as well")


class Reloaded(Generic[T]):
    """`value` as the files last had it in a form that could be used; `trouble` says what is wrong with them now."""

    def __init__(self, what: str, files: Sequence[Path | None], read: Callable[[], T]) -> None:
        """Raises what `read` raises."""
        self.what = what
        self._files = [file for file in files if file is not None]
        self._read = read
        self._stamps = self._now()
        self._value = read()
        self._trouble: str | None = None

    @property
    def value(self) -> T:
        return self._value

    @property
    def trouble(self) -> str | None:
        return self._trouble

    def refresh(self) -> T:
        """The value, read anew if a file has changed since it was last tried."""
        # Stamped before it is read: what is written meanwhile is another change, and the next one looks again
        if self._files and (stamps := self._now()) != self._stamps:
            self._stamps = stamps
            self._reload()
        return self._value

    def _reload(self) -> None:
        names = [str(file) for file in self._files]
        try:
            self._value = self._read()
        except ConfigError as error:
            self._trouble = str(error)
            log.error("changed file cannot be used, the old one holds", what=self.what, files=names, cause=str(error))
        else:
            self._trouble = None
            log.info("file read again", what=self.what, files=names)

    def _now(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in self._files]


class Refreshable(Protocol):
    def refresh(self) -> object: ...


async def follow(
    *files: Refreshable, every_s: float = FOLLOW_EVERY_S, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> NoReturn:
    """Refresh them until cancelled: beside a server, which should learn of a change without being asked."""
    while True:
        for file in files:
            file.refresh()
        await sleep(every_s)


def rules(settings: AccessSettings) -> Reloaded[Rules]:
    """Raises ConfigError for a token file that cannot be used."""
    trust, paths, file = TrustList.parse(settings.trust), open_paths(settings.open_paths), settings.token_file

    def read() -> Rules:
        return Rules(trust, None if file is None else _read(file, Tokens.parse), paths)

    return Reloaded("tokens", [file], read)


def own_token(credentials: Credentials) -> Reloaded[str | None]:
    """The token that a client shows. Raises ConfigError for a file that cannot be used."""
    file = credentials.token_file

    def read() -> str | None:
        return credentials.token if file is None else _read(file, lambda text: check_token(text.strip()))

    return Reloaded("token", [file], read)


def server_tls(settings: AccessSettings) -> Reloaded[ssl.SSLContext] | None:
    """What the service proves itself with, None for plain HTTP. Raises ConfigError."""
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if cert is None:
        return None
    return Reloaded("certificate", [cert, key, client_ca], lambda: _server_context(cert, key, client_ca))


def listening(tls: Reloaded[ssl.SSLContext]) -> ssl.SSLContext:
    """For a listener, which keeps one context for ever: each handshake is handed over to the newest."""
    first = tls.value

    def newest(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:  # noqa: ARG001
        connection.context = tls.value

    first.sni_callback = newest  # called for every handshake, with a server name or without
    return first


def client_tls(credentials: Credentials) -> Reloaded[ssl.SSLContext]:
    """What a client believes and proves itself with. Raises ConfigError."""
    ca, cert, key = credentials.tls_ca, credentials.tls_cert, credentials.tls_key
    return Reloaded("certificate", [ca, cert, key], lambda: _client_context(ca, cert, key))


def _server_context(cert: Path, key: Path | None, client_ca: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_chain(context, cert, key)
    if client_ca is not None:
        # A resumed session is not verified again: an authority taken out of the file would be believed for hours.
        # Nothing is resumed without tickets in TLS 1.3, and our own clients and curl speak it.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authorities(context, client_ca)
    return context


def _client_context(ca: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context() if ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is not None:
        _load_authorities(context, ca)
    if cert is not None:
        _load_chain(context, cert, key)
    return context


def _load_chain(context: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except OSError as error:  # ssl.SSLError is one
        where = cert if key is None else f"{cert} with key {key}"
        raise ConfigError(f"certificate {where} cannot be used ({_why(error)}): give a PEM pair that fits") from error


def _load_authorities(context: ssl.SSLContext, file: Path) -> None:
    try:
        context.load_verify_locations(cafile=file)
    except OSError as error:
        raise ConfigError(f"authorities {file} cannot be used ({_why(error)}): give certificates as PEM") from error


def _no_passphrase() -> str:
    """Without this, OpenSSL asks the terminal, and a service hangs before it serves."""
    raise ConfigError("the TLS key has a passphrase, and nobody is there to type it: give a key without one")


def _read(file: Path, parse: Callable[[str], T]) -> T:
    try:
        if file.stat().st_size > MAX_TOKEN_FILE_BYTES:
            raise ConfigError(f"it has more than {MAX_TOKEN_FILE_BYTES} bytes: is it a token file?")
        return parse(file.read_text())
    except UnicodeDecodeError:
        raise ConfigError(f"token file {file} is no text: write one name:token a line") from None
    except (OSError, ConfigError) as error:
        raise ConfigError(f"token file {file} cannot be used: {_why(error)}") from None


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no PEM").replace("_", " ").lower()
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes when the file does, through links as Kubernetes mounts secrets; None where it is not there."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
