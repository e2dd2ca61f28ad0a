"""How the shared store comes up, by rank: there are as many label values as ranks that open one in this process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from pdctl.core.kvstore import StoreRank
from pdctl.core.warmup import Report, Result


class StoreMetrics:
    """`begun`, `failed` for each try in vain, then `opened`, however it ended."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._attempts = Counter(
            "pdctl_store_warmup_attempts_total",
            "Attempts at putting a fresh key into the shared store and reading it back.",
            ["rank"],
            registry=registry,
        )
        self._openings = Counter(
            "pdctl_store_openings_total",
            "How openings of the shared store ended.",
            ["rank", "result"],
            registry=registry,
        )
        self._seconds = Gauge(
            "pdctl_store_opening_seconds",
            "Seconds from the first question to the store's master to the end of the last opening.",
            ["rank"],
            registry=registry,
        )
        self._failed = Gauge(
            "pdctl_store_failed_tries",
            "Tries of the last opening of the shared store that have failed; 0 once it was ready.",
            ["rank"],
            registry=registry,
        )

    def begun(self, rank: StoreRank) -> None:
        self._failed.labels(str(rank)).set(0)
        for result in Result:
            self._openings.labels(str(rank), result.value)

    def failed(self, rank: StoreRank) -> None:
        """A try at reaching the store or at warming it up came to nothing, and the next will follow or not."""
        self._failed.labels(str(rank)).inc()

    def opened(self, report: Report) -> None:
        rank = str(report.rank)
        self._attempts.labels(rank).inc(report.attempts)
        self._openings.labels(rank, report.result.value).inc()
        self._seconds.labels(rank).set(report.waited_s)
        if report.ready:
            self._failed.labels(rank).set(0)
