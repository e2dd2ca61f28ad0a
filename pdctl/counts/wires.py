"""The books of the other wires: vLLM's workers and Mooncake's metadata keys."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge


class FleetChange(StrEnum):
    """What became of a worker of vLLM."""

    JOINED = "joined"
    LEFT = "left"  # replaced, gone when somebody asked, or dropped by an operator


class FleetMetrics:
    """vLLM's prefill workers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._workers = Gauge("pdctl_vllm_workers", "Prefill workers of vLLM held.", registry=registry)
        self._prefills = Gauge(
            "pdctl_vllm_prefills", "Prefills of vLLM, by whether they are complete.", ["complete"], registry=registry
        )
        changes = Counter(
            "pdctl_vllm_changes_total", "Prefill workers of vLLM that came or went.", ["kind"], registry=registry
        )
        self._changes = {kind: changes.labels(kind) for kind in FleetChange}

    def changed(self, kind: FleetChange) -> None:
        self._changes[kind].inc()

    def follow(self, workers: Callable[[], int], prefills: Callable[[bool], int]) -> None:
        """Read these at every scrape."""
        self._workers.set_function(workers)
        self._prefills.labels("true").set_function(lambda: prefills(True))
        self._prefills.labels("false").set_function(lambda: prefills(False))


class KeyChange(StrEnum):
    """What became of a Mooncake metadata key."""

    WRITTEN = "written"
    TAKEN_OVER = "taken_over"  # from an engine that does not answer any more
    REMOVED = "removed"  # its engine said so
    EXPIRED = "expired"  # its engine was asked too often in vain


class KeyMetrics:
    """Mooncake's metadata keys."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._keys = Gauge("pdctl_metadata_keys", "Mooncake metadata keys held.", registry=registry)
        self._nbytes = Gauge(
            "pdctl_metadata_bytes", "Bytes of the values of Mooncake metadata keys.", registry=registry
        )
        changes = Counter(
            "pdctl_metadata_changes_total", "Changes of Mooncake metadata keys, by kind.", ["kind"], registry=registry
        )
        self._changes = {kind: changes.labels(kind) for kind in KeyChange}

    def changed(self, kind: KeyChange) -> None:
        self._changes[kind].inc()

    def follow(self, keys: Callable[[], int], nbytes: Callable[[], int]) -> None:
        """Read these at every scrape."""
        self._keys.set_function(keys)
        self._nbytes.set_function(nbytes)
