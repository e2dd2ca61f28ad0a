"""How a rank of ours stands with its registry, for how long its links have been out, and how late its loop comes."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge, Histogram

# A quiet loop is late by what the scheduler needs; beyond 250 ms time-outs are not believed (ProbePolicy.lag_s).
LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


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


class LoopMetrics:
    """How late the event loop comes: everything else in this process waits as long."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = Histogram(
            "pdctl_loop_lag_seconds",
            "Seconds by which ticks of the event loop, 20 a second, came late.",
            buckets=LAG_BUCKETS_S,
            registry=registry,
        )

    def came(self, late_s: float) -> None:
        self._lag.observe(late_s)
