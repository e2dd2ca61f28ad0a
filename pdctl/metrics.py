"""
What is counted, under which name; with pdctl/counts/, all that imports prometheus_client.

Nothing is created on import: a `Metrics` owns its own registry, so that two of them in one process never clash. What
each part of the house counts stands in pdctl/counts/.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from pdctl.counts.nodes import LoopMetrics, OutMetrics, RegistrationMetrics
from pdctl.counts.registry import JournalMetrics, RegistryMetrics, WitnessMetrics
from pdctl.counts.reports import ReportMetrics
from pdctl.counts.rooms import LinkMetrics, RoomMetrics
from pdctl.counts.service import AccessMetrics, AdmissionMetrics, WatchMetrics
from pdctl.counts.sessions import SessionMetrics
from pdctl.counts.store import StoreCounts
from pdctl.counts.wires import FleetMetrics, KeyMetrics


class Metrics:
    """Everything that one process counts. Rooms are attributes, in alphabetical order.

    store   of one that is opened elsewhere in this process; without it those are 0 here
    """

    def __init__(self, registry: CollectorRegistry | None = None, store: StoreCounts | None = None) -> None:
        self._registry = CollectorRegistry() if registry is None else registry
        self.access = AccessMetrics(self._registry)
        self.admission = AdmissionMetrics(self._registry)
        self.fleet = FleetMetrics(self._registry)
        self.journal = JournalMetrics(self._registry)
        self.keys = KeyMetrics(self._registry)
        self.link = LinkMetrics(self._registry)
        self.loop = LoopMetrics(self._registry)
        self.out = OutMetrics(self._registry)
        self.registration = RegistrationMetrics(self._registry)
        self.registry = RegistryMetrics(self._registry)
        self.reports = ReportMetrics(self._registry)
        self.rooms = RoomMetrics(self._registry)
        self.sessions = SessionMetrics(self._registry)
        kept = StoreCounts() if store is None else store
        self.store, self.store_traffic = kept.warmup, kept.traffic
        self._registry.register(kept)
        self.witness = WitnessMetrics(self._registry)
        self.watch = WatchMetrics(self._registry)

    def exposition(self) -> tuple[bytes, str]:
        """What /metrics answers: the body and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
