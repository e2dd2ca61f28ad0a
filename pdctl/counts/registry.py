"""The registry: who came, who asked, who was refused; its journal; and the witness of those without a lease."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdctl.core.instances import InstanceView
from pdctl.core.kinds import ChangeKind
from pdctl.core.sayings import Refusal
from pdctl.core.witness import Means, Sign

# An fsync takes 0.1 ms on a good disk and seconds on one that dies
COMMIT_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Lookup(StrEnum):
    """What a decode asked the registry for."""

    TOPOLOGY = "topology"
    RANK = "rank"
    ROOM = "room"


class Found(StrEnum):
    """What it was told."""

    SERVED = "served"
    NOT_READY = "not_ready"  # the instance is not complete, or nobody is there
    UNKNOWN = "unknown"  # no such rank, no such room


class _Lookups(Collector):
    """Look-ups are counted in plain integers, as they are most of what there is to do, and read at the scrape."""

    def __init__(self, counts: Mapping[tuple[Lookup, Found], int]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "pdctl_registry_lookups",
            "What was asked of the registry (topology, rank, or room by room), by result.",
            labels=["what", "result"],
        )
        for (what, found), count in self._counts.items():
            family.add_metric([what, found], count)
        yield family


class RegistryMetrics:
    """The registry: who came, who asked, who was refused, and how much is held."""

    def __init__(self, registry: CollectorRegistry) -> None:
        changes = Counter(
            "pdctl_registry_changes_total", "What claims of ranks changed, by kind.", ["kind"], registry=registry
        )
        refusals = Counter(
            "pdctl_registry_refusals_total",
            "Requests that the registry refused, changing nothing, by reason.",
            ["reason"],
            registry=registry,
        )
        # Children are looked up once: they stand in the path of every request
        self._changes = {kind: changes.labels(kind) for kind in ChangeKind}
        impossible = {(Lookup.TOPOLOGY, Found.UNKNOWN), (Lookup.ROOM, Found.NOT_READY)}
        pairs = [(what, found) for what in Lookup for found in Found if (what, found) not in impossible]
        self._lookups = dict.fromkeys(pairs, 0)
        registry.register(_Lookups(self._lookups))
        self._refusals = {reason: refusals.labels(reason) for reason in Refusal}
        self._instances = Gauge(
            "pdctl_registry_instances", "Instances known, by whether they are complete.", ["ready"], registry=registry
        )
        self._partial = Gauge(
            "pdctl_registry_instances_partial",
            "Instances of which some ranks are there and some are missing.",
            registry=registry,
        )
        self._seats = Gauge(
            "pdctl_registry_seats", "Seats of all instances: held, or missing.", ["state"], registry=registry
        )
        self._rooms = Gauge("pdctl_registry_rooms", "Bootstrap rooms held.", registry=registry)
        self.follow(list, int)

    def changed(self, kind: ChangeKind, times: int = 1) -> None:
        self._changes[kind].inc(times)

    def looked_up(self, what: Lookup, found: Found, times: int = 1) -> None:
        self._lookups[what, found] += times

    def refused(self, reason: Refusal) -> None:
        self._refusals[reason].inc()

    def follow(self, instances: Callable[[], Iterable[InstanceView]], rooms: Callable[[], int]) -> None:
        """Read these at every scrape: what is derived cannot disagree with what it is derived from."""
        self._rooms.set_function(rooms)
        self._instances.labels("true").set_function(lambda: sum(view.ready for view in instances()))
        self._instances.labels("false").set_function(lambda: sum(not view.ready for view in instances()))
        self._partial.set_function(lambda: sum(bool(view.alive) and not view.ready for view in instances()))
        self._seats.labels("held").set_function(lambda: sum(len(view.alive) for view in instances()))
        self._seats.labels("missing").set_function(
            lambda: sum(view.shape.n_seats - len(view.alive) for view in instances())
        )


class JournalMetrics:
    """The journal on a disk: how long it takes, and whether it takes anything."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "pdctl_journal_commit_seconds",
            "Seconds that one transaction took, the wait for the disk included, for all who shared it.",
            buckets=COMMIT_BUCKETS_S,
            registry=registry,
        )
        self._failed = Counter(
            "pdctl_journal_failed_total", "Transactions that came to nothing, retries included.", registry=registry
        )
        self._trouble = Gauge("pdctl_journal_trouble", "1 while the journal takes no rows.", registry=registry)
        self._behind = Counter(
            "pdctl_journal_behind_total",
            "Groups that were decided again since another registry over the same journal was faster.",
            registry=registry,
        )
        self._age = Gauge(
            "pdctl_journal_age_seconds",
            "How old what is known of a shared journal may be; 0 for one that is this registry's own.",
            registry=registry,
        )

    def committed(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def failed(self) -> None:
        self._failed.inc()

    def behind(self) -> None:
        self._behind.inc()

    def follow(self, in_trouble: Callable[[], bool], age_s: Callable[[], float] | None = None) -> None:
        """Read at every scrape."""
        self._trouble.set_function(lambda: float(in_trouble()))
        if age_s is not None:
            self._age.set_function(age_s)


class WitnessMetrics:
    """The witness of ranks without a lease: what it asked, what it says, and whether it believes itself."""

    def __init__(self, registry: CollectorRegistry) -> None:
        questions = Counter(
            "pdctl_witness_questions_total",
            "Signs of life that ranks without a lease were asked for, by means and by what came of it.",
            ["means", "sign"],
            registry=registry,
        )
        verdicts = Counter(
            "pdctl_witness_verdicts_total",
            "Ranks of whom the witness has said something new, by what it says.",
            ["verdict"],
            registry=registry,
        )
        self._questions = {(means, sign): questions.labels(means, sign) for means in Means for sign in Sign}
        self._verdicts = {alive: verdicts.labels("alive" if alive else "dead") for alive in (True, False)}
        self._ranks = Gauge("pdctl_witness_ranks", "Ranks that are watched.", registry=registry)
        self._doubts = Gauge(
            "pdctl_witness_doubts", "1 while so many hosts are silent that silence is not believed.", registry=registry
        )

    def answered(self, means: Means, sign: Sign) -> None:
        self._questions[means, sign].inc()

    def said(self, alive: bool) -> None:
        self._verdicts[alive].inc()

    def follow(self, ranks: Callable[[], int], doubts: Callable[[], bool]) -> None:
        """Read these at every scrape."""
        self._ranks.set_function(ranks)
        self._doubts.set_function(doubts)
