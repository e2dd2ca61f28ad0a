"""How a rank of ours stands with its registry, and for how long its links have been out. Read at the scrape."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge


class RegistrationMetrics:
    """Whether a rank is registered. A process that registers nobody has no series: it is not unregistered."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registered = Gauge(
            "pdctl_registered",
            "1 while the registry's last answer about this rank was yes, by the rank's role.",
            ["role"],
            registry=registry,
        )

    def follow(self, role: str, is_registered: Callable[[], bool]) -> None:
        """Read at every scrape; `role` is prefill or decode."""
        self._registered.labels(role).set_function(lambda: float(is_registered()))


class OutMetrics:
    """The session that has been blocked for longest: a number of blocked ones cannot tell one from another."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Gauge(
            "pdctl_session_out_seconds",
            "Seconds for which the session that has been blocked for longest has been; 0 while none is.",
            registry=registry,
        )

    def follow(self, longest_s: Callable[[], float]) -> None:
        """Read at every scrape."""
        self._seconds.set_function(longest_s)
