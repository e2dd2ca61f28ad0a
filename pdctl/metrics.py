"""
What is counted, under which name; the only file that imports prometheus_client.

Nothing is created on import: a `Metrics` owns its own registry, so that two of them in one process never clash.
One small class for each room of the house, one small method for each thing that happens there. Label values come
from enums, never from free text, room ids or addresses. Each metric is explained for operators in docs/metrics.md,
and a test holds the two against each other.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from pdctl.core.sessions import Change, ChangeKind
from pdctl.errors import Cause

# A handshake takes 0.3 ms on a local network and at most its deadline (1 s by default, tens of seconds by setting).
PROBE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# From the first question (0.1 s) to the time after which a blocked session nobody wants is forgotten (600 s).
RECOVERY_BUCKETS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """Everything that one process counts. Rooms are attributes, in alphabetical order."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._registry = CollectorRegistry() if registry is None else registry
        self.sessions = SessionMetrics(self._registry)

    def exposition(self) -> tuple[bytes, str]:
        """What /metrics answers: the body and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class SessionMetrics:
    """Transfer sessions: who is blocked and why, what the questions found, how long recovery took."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._blocked = Gauge(
            "pdctl_session_blocked", "Transfer sessions blocked now, by cause.", ["cause"], registry=registry
        )
        self._changes = Counter(
            "pdctl_session_changes_total", "Changes of a session's standing, by kind.", ["kind"], registry=registry
        )
        self._probes = Counter(
            "pdctl_session_probes_total",
            "Questions put to blocked sessions, by result: well, or the cause.",
            ["result"],
            registry=registry,
        )
        self._probe_seconds = Histogram(
            "pdctl_session_probe_seconds",
            "Seconds from a question to its answer or its deadline.",
            buckets=PROBE_BUCKETS_S,
            registry=registry,
        )
        self._recovery_seconds = Histogram(
            "pdctl_session_recovery_seconds",
            "Seconds from a session's first failure to the answer that proved it well.",
            buckets=RECOVERY_BUCKETS_S,
            registry=registry,
        )
        # The name that stock SGLang gives it: existing dashboards read it.
        self._recoveries = Counter(
            "sglang:failed_session_recoveries_total",
            "Blocked transfer sessions un-blacklisted because a question proved them well.",
            registry=registry,
        )
        for cause in Cause:  # a series that is there from the start can be alerted on
            if cause.speaks_of_peer:
                self._blocked.labels(cause)
            self._probes.labels(cause)
        self._probes.labels("well")
        for kind in ChangeKind:
            self._changes.labels(kind)

    def changed(self, change: Change) -> None:
        self._changes.labels(change.kind).inc()
        if change.before is not None:
            self._blocked.labels(change.before).dec()
        if change.kind in (ChangeKind.BLOCKED, ChangeKind.DROPPED):
            self._blocked.labels(change.cause).inc()
        if change.kind is ChangeKind.RECOVERED:
            self._recoveries.inc()
            self._recovery_seconds.observe(change.blocked_s)

    def answered(self, cause: Cause | None, seconds: float) -> None:
        """A question ended after `seconds`: None when the peer is well, else why not."""
        self._probes.labels("well" if cause is None else cause).inc()
        self._probe_seconds.observe(seconds)
