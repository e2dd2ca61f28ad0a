"""What ranks tell of themselves: at the registry that is told, and at the rank that tells."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge


class Sent(StrEnum):
    """What became of a rank's report."""

    TAKEN = "taken"
    REFUSED = "refused"  # the registry said no
    FAILED = "failed"  # nobody answered, or not now


class ReportMetrics:
    """Of a registry: reports that came, and are held. Of a rank: reports that went."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._taken = Counter("pdctl_reports_taken_total", "Reports of ranks that were taken.", registry=registry)
        self._refused = Counter(
            "pdctl_reports_refused_total",
            "Reports of ranks that were refused: for a life that holds no seat, malformed, or over a limit.",
            registry=registry,
        )
        self._lost = Counter(
            "pdctl_reports_lost_total", "Ranks whose report has expired, since none followed.", registry=registry
        )
        self._held = Gauge("pdctl_reports_held", "Ranks whose last report is held.", registry=registry)
        self._nbytes = Gauge("pdctl_reports_bytes", "Bytes of the reports that are held.", registry=registry)
        sent = Counter(
            "pdctl_reports_sent_total",
            "Reports that this rank has sent to its registry, by what became of them.",
            ["result"],
            registry=registry,
        )
        self._sent = {result: sent.labels(result) for result in Sent}

    def taken(self) -> None:
        self._taken.inc()

    def refused(self) -> None:
        self._refused.inc()

    def lost(self) -> None:
        self._lost.inc()

    def sent(self, result: Sent) -> None:
        self._sent[result].inc()

    def follow(self, held: Callable[[], int], nbytes: Callable[[], int]) -> None:
        """Read these at every scrape."""
        self._held.set_function(held)
        self._nbytes.set_function(nbytes)
