"""
What is counted, under which name; with pdctl/counts/, all that imports prometheus_client.

Nothing is created on import: a `Metrics` owns its own registry, so that two of them in one process never clash.
One small class for each room of the house, one small method for each thing that happens there. Label values come
from enums, never from free text, room ids or addresses. Each metric is explained for operators in docs/metrics.md,
and a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdctl.core.access import Denial
from pdctl.core.admission import Lane
from pdctl.core.instances import InstanceView
from pdctl.core.lives import ChangeKind as SeatChangeKind
from pdctl.core.sayings import Refusal
from pdctl.core.sessions import Change, ChangeKind, Depth, State
from pdctl.core.sums import Checked
from pdctl.core.transfer import Phase, Side
from pdctl.core.witness import Means, Sign
from pdctl.counts.nodes import LoopMetrics, OutMetrics, RegistrationMetrics
from pdctl.counts.reports import ReportMetrics
from pdctl.counts.store import StoreMetrics
from pdctl.errors import Cause, StoreCause

# A handshake takes 0.3 ms on a local network and at most its deadline (1 s by default, tens of seconds by setting).
PROBE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_NO_DEPTH = "none"
# From the first question (0.1 s) to the time after which a blocked session nobody wants is forgotten (600 s).
RECOVERY_BUCKETS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# An fsync takes 0.1 ms on a good disk and seconds on one that dies
COMMIT_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# A page in a quiet house takes a millisecond; the waits that end a room are 300 s.
ROOM_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Everything that one process counts. Rooms are attributes, in alphabetical order."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
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
        self.store = StoreMetrics(self._registry)
        self.store_traffic = StoreTrafficMetrics(self._registry)
        self.witness = WitnessMetrics(self._registry)
        self.watch = WatchMetrics(self._registry)

    def exposition(self) -> tuple[bytes, str]:
        """What /metrics answers: the body and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class AccessMetrics:
    """The door of the service: who was turned away, and whether its keys are still those of the files."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._denied = Counter(
            "pdctl_access_denied_total", "Requests that were turned away, by reason.", ["reason"], registry=registry
        )
        self._stale = Gauge(
            "pdctl_access_files_stale",
            "1 while files have changed but cannot be used, so that the old ones hold.",
            ["what"],
            registry=registry,
        )
        for reason in Denial:
            self._denied.labels(reason)

    def denied(self, reason: Denial) -> None:
        self._denied.labels(reason).inc()

    def follow(self, what: str, is_stale: Callable[[], bool]) -> None:
        """Read this at every scrape; `what` is one of the few kinds of files: tokens, certificate."""
        self._stale.labels(what).set_function(is_stale)


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


class AdmissionMetrics:
    """The door before the registry: who came in, and who was told to come again."""

    def __init__(self, registry: CollectorRegistry) -> None:
        asked = Counter(
            "pdctl_admission_registrations_total",
            "Registrations that came to the door, by who asks and what was said.",
            ["lane", "result"],
            registry=registry,
        )
        self._admitted = {lane: asked.labels(lane, "admitted") for lane in Lane}
        self._put_off = asked.labels(Lane.LEASED, "put_off")  # stock clients never are

    def asked(self, lane: Lane, admitted: bool) -> None:
        (self._admitted[lane] if admitted else self._put_off).inc()


class LinkDrop(StrEnum):
    """Why a message of the control link came to nothing."""

    MALFORMED = "malformed"  # it cannot be read, or names what it may not
    NOT_HANDLED = "not_handled"  # a defect of ours


class LinkMetrics:
    """The control link between prefill and decode ranks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._received = Counter(
            "pdctl_link_messages_received_total", "Messages that came over the control link.", registry=registry
        )
        self._dropped = Counter(
            "pdctl_link_messages_dropped_total",
            "Messages of the control link that came to nothing, by kind.",
            ["kind"],
            registry=registry,
        )
        self._unreachable = Counter(
            "pdctl_link_unreachable_total", "Messages that no peer took within the deadline.", registry=registry
        )
        for kind in LinkDrop:
            self._dropped.labels(kind)

    def received(self) -> None:
        self._received.inc()

    def dropped(self, kind: LinkDrop) -> None:
        self._dropped.labels(kind).inc()

    def unreachable(self) -> None:
        self._unreachable.inc()


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
        self._changes = {kind: changes.labels(kind) for kind in SeatChangeKind}
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

    def changed(self, kind: SeatChangeKind, times: int = 1) -> None:
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


class RoomMetrics:
    """Rooms of either side, and the pages that finished ones still hold."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._open = Gauge("pdctl_rooms_open", "Rooms open now, by side.", ["side"], registry=registry)
        self._ended = Counter(
            "pdctl_rooms_ended_total", "Rooms that have ended, by side and phase.", ["side", "phase"], registry=registry
        )
        self._seconds = Histogram(
            "pdctl_room_seconds",
            "Seconds from opening a room to its success, by side.",
            ["side"],
            buckets=ROOM_BUCKETS_S,
            registry=registry,
        )
        self._quarantined = Gauge(
            "pdctl_room_pages_quarantined",
            "Pages of finished rooms that a peer or an engine may still touch, by side.",
            ["side"],
            registry=registry,
        )
        self._sent = Counter(
            "pdctl_room_sent_bytes_total", "Bytes of pages and aux rows that have landed at decode.", registry=registry
        )
        self._sending = Counter(
            "pdctl_room_send_seconds_total", "Seconds that writes of these bytes took, side by side.", registry=registry
        )
        self._checked = Counter(
            "pdctl_room_checksums_total",
            "Answers of prefill ranks to rooms that had asked for checksums, by result.",
            ["result"],
            registry=registry,
        )
        for result in Checked:
            self._checked.labels(result)
        for side in Side:
            self._open.labels(side)
            self._seconds.labels(side)
            self._quarantined.labels(side)
            for phase in (Phase.SUCCESS, Phase.FAILED):
                self._ended.labels(side, phase.name.lower())

    def opened(self, side: Side) -> None:
        self._open.labels(side).inc()

    def ended(self, side: Side, phase: Phase, seconds: float) -> None:
        self._open.labels(side).dec()
        self._ended.labels(side, phase.name.lower()).inc()
        if phase is Phase.SUCCESS:
            self._seconds.labels(side).observe(seconds)

    def quarantined(self, side: Side, n_pages: int) -> None:
        """`n_pages` more than before; fewer when below 0."""
        self._quarantined.labels(side).inc(n_pages)

    def sent(self, nbytes: int, seconds: float) -> None:
        self._sent.inc(nbytes)
        self._sending.inc(seconds)

    def checked(self, result: Checked) -> None:
        self._checked.labels(result).inc()


class SessionMetrics:
    """Transfer sessions: how they stand and why, what the questions found, how long recovery took."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._states = Gauge("pdctl_sessions", "Transfer sessions known, by state.", ["state"], registry=registry)
        self._blocked = Gauge(
            "pdctl_session_blocked",
            "Transfer sessions blocked or dropped now, by cause.",
            ["cause"],
            registry=registry,
        )
        self._changes = Counter(
            "pdctl_session_changes_total", "Changes of a session's standing, by kind.", ["kind"], registry=registry
        )
        self._ejections = Counter(
            "pdctl_session_ejections_total",
            "Times that failures have put a session out, by cause.",
            ["cause"],
            registry=registry,
        )
        self._probes = Counter(
            "pdctl_session_probes_total",
            "Questions put to sessions, by what a good answer proved, and by result: well, or the cause.",
            ["depth", "result"],
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
            "Seconds from a session's first failure to the answer that let it back.",
            buckets=RECOVERY_BUCKETS_S,
            registry=registry,
        )
        # The name that stock SGLang gives it: existing dashboards read it.
        self._recoveries = Counter(
            "sglang:failed_session_recoveries_total",
            "Blocked transfer sessions un-blacklisted because questions proved them well.",
            registry=registry,
        )
        self._cures = Counter(
            "pdctl_session_cures_total",
            "Links to peers that were well, mended on this side by a fresh lane or engine.",
            registry=registry,
        )
        self._threads = Gauge(
            "pdctl_session_probe_threads_held", "Threads held by questions that were given up.", registry=registry
        )
        self._panic = Gauge(
            "pdctl_session_panic_groups",
            "Groups served whole because too many of their sessions are blocked.",
            registry=registry,
        )
        self._doubt = Gauge(
            "pdctl_session_doubt", "1 while time-outs block nobody because the fault may be here.", registry=registry
        )
        self._out = {state: 0 for state in State if state is not State.TRUSTED}
        self._begin_at_0()

    def _begin_at_0(self) -> None:
        """A series that is there from the start can be alerted on."""
        for cause in Cause:
            if cause.speaks_of_peer:
                self._blocked.labels(cause)
            if cause.speaks_of_peer and cause is not Cause.PEER_CHANGED:
                self._ejections.labels(cause)
            self._probes.labels(_NO_DEPTH, cause)
        for depth in Depth:
            self._probes.labels(depth.name.lower(), "well")
        for kind in ChangeKind:
            self._changes.labels(kind)
        self._states.labels(State.TRUSTED)
        for state in self._out:
            self._states.labels(state).set_function(partial(self._out.__getitem__, state))

    def changed(self, change: Change) -> None:
        self._changes.labels(change.kind).inc()
        if change.before is not None:
            self._blocked.labels(change.before).dec()
        if change.kind in (ChangeKind.BLOCKED, ChangeKind.DROPPED):
            self._blocked.labels(change.cause).inc()
        if change.kind is ChangeKind.BLOCKED:
            self._ejections.labels(change.cause).inc()
        if change.kind is ChangeKind.RECOVERED:
            self._recoveries.inc()
            self._recovery_seconds.observe(change.blocked_s)
        for state, n in ((change.was, -1), (change.state, 1)):
            if state in self._out:
                self._out[state] += n

    def answered(self, depth: Depth | None, cause: Cause | None, seconds: float) -> None:
        """A question ended after `seconds`: the peer is well, which was proved to that depth; else why not."""
        proved = _NO_DEPTH if depth is None else depth.name.lower()
        self._probes.labels(proved, "well" if cause is None else cause).inc()
        self._probe_seconds.observe(seconds)

    def cured(self) -> None:
        self._cures.inc()

    def follow(
        self,
        known: Callable[[], int],
        panicking: Callable[[], int],
        doubting: Callable[[], bool],
        threads_held: Callable[[], int],
    ) -> None:
        """Read these at every scrape."""
        self._states.labels(State.TRUSTED).set_function(lambda: known() - sum(self._out.values()))
        self._panic.set_function(panicking)
        self._doubt.set_function(doubting)
        self._threads.set_function(threads_held)


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


class WatchEnd(StrEnum):
    """Why the service ended a watcher's stream, or did not begin it."""

    BEHIND = "behind"  # what it should be told next is not kept any more
    STUCK = "stuck"  # it has taken nothing for too long
    LIMIT = "limit"  # there are as many watchers as may be
    STOPPED = "stopped"  # the service stops


class WatchMetrics:
    """Readers of `/v1/watch`, `/v1/sessions/watch` and `/v1/overview/watch`, together."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._open = Gauge("pdctl_watch_streams_open", "Streams of changes open now.", registry=registry)
        ended = Counter(
            "pdctl_watch_streams_ended_total",
            "Streams of changes that this service ended or refused, by reason; those that left are not counted.",
            ["reason"],
            registry=registry,
        )
        self._ended = {reason: ended.labels(reason) for reason in WatchEnd}

    def came(self) -> None:
        self._open.inc()

    def went(self) -> None:
        self._open.dec()

    def ended(self, reason: WatchEnd) -> None:
        self._ended[reason].inc()
