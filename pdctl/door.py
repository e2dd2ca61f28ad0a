"""
The door of a service: who may come in by HTTP, in plain or over TLS, at which of its sockets. docs/security.md.

Composes what reads the files, what judges and what serves; decides nothing itself.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from pdctl import server
from pdctl.core.access import Rules
from pdctl.credentials import AccessSettings, Reloaded, follow, listening, rules, server_tls
from pdctl.guard import Guard, Hear
from pdctl.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Door:
    """What every listener of the service is behind. `tls`: None for plain HTTP."""

    rules: Reloaded[Rules]
    certificate: Reloaded[ssl.SSLContext] | None
    tls: ssl.SSLContext | None
    metrics: Metrics

    @property
    def files(self) -> list[Reloaded[Any]]:
        return [self.rules] if self.certificate is None else [self.rules, self.certificate]

    @property
    def scheme(self) -> str:
        return "http" if self.tls is None else "https"

    def services(
        self, api: ASGIApp, socks: Sequence[socket.socket], grace_s: float, hear: Hear | None = None
    ) -> dict[str, Coroutine[Any, Any, None]]:
        """What serves `api`, and follows the files, by name. All sockets but the first are for stock engines, which
        speak no TLS. `hear` is told of each who is not let in."""
        services: dict[str, Coroutine[Any, Any, None]] = {"files": follow(*self.files)}
        if self.tls is None:
            return services | {"http": server.serve(self._around(api, hear), *socks, grace_s=grace_s)}
        own, *listeners = socks
        services["https"] = server.serve(self._around(api, hear), own, grace_s=grace_s, tls=self.tls)
        if listeners:
            services["http"] = server.serve(self._around(api, hear, stock_only=True), *listeners, grace_s=grace_s)
        return services

    def _around(self, api: ASGIApp, hear: Hear | None, *, stock_only: bool = False) -> Guard:
        counts = self.metrics.access
        return Guard(api, lambda: self.rules.value, counts, time.monotonic, stock_only=stock_only, hear=hear)


def open_door(settings: AccessSettings, metrics: Metrics) -> Door:
    """Raises ConfigError for a file that cannot be used."""
    certificate = server_tls(settings)
    door = Door(rules(settings), certificate, None if certificate is None else listening(certificate), metrics)
    for files in door.files:
        metrics.access.follow(files.what, lambda files=files: files.trouble is not None)  # type: ignore[misc]
    return door
