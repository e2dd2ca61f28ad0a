"""The shared store: how it comes up, what is asked of it then, and whether it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric

from pdctl.core.kvstore import StoreRank
from pdctl.core.warmup import Report, Result
from pdctl.errors import StoreCause


class StoreCounts:
    """Of one store, before it is known which service shows them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.warmup = StoreMetrics(self._registry)
        self.traffic = StoreTrafficMetrics(self._registry)

    def collect(self) -> Iterable[Metric]:
        """As a collector of a registry has it."""
        return self._registry.collect()


class StoreMetrics:
    """`begun`, `failed` for each try in vain, then `opened`, however it ended; by rank: there are as many label values
    as ranks that open a store in this process."""

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


class StoreCall(StrEnum):
    """What the shared store was asked for."""

    LOOK_UP = "look_up"
    READ = "read"
    WRITE = "write"


class StoreEnd(StrEnum):
    """What became of a key."""

    DONE = "done"
    MISSING = "missing"  # a miss, as any cache has them
    FAILED = "failed"  # the store could not: a miss, or a write that was dropped
    LEFT_OUT = "left_out"  # not tried, because the store was away: the same


class StoreTrafficMetrics:
    """What is asked of the shared store once it is up, and whether it is there."""

    def __init__(self, registry: CollectorRegistry) -> None:
        keys = Counter(
            "pdctl_store_keys_total", "Keys of the shared store, by call and end.", ["call", "end"], registry=registry
        )
        failures = Counter(
            "pdctl_store_failures_total", "Keys that the shared store failed, by cause.", ["cause"], registry=registry
        )
        self._attached = Gauge("pdctl_store_attached", "1 while the shared store is asked at all.", registry=registry)
        self._left = Counter("pdctl_store_left_total", "Times that the shared store was left alone.", registry=registry)
        self._keys = {(call, end): keys.labels(call, end) for call in StoreCall for end in StoreEnd}
        self._failures = {cause: failures.labels(cause) for cause in StoreCause}

    def ended(self, call: StoreCall, end: StoreEnd, times: int) -> None:
        self._keys[call, end].inc(times)

    def failed(self, cause: StoreCause) -> None:
        self._failures[cause].inc()

    def left(self) -> None:
        self._left.inc()

    def follow(self, is_attached: Callable[[], bool]) -> None:
        """Read at every scrape."""
        self._attached.set_function(lambda: float(is_attached()))
