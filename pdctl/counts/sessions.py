"""Transfer sessions: how they stand and why, what the questions found, how long recovery took."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pdctl.core.kinds import Depth, State
from pdctl.core.standing import Change, ChangeKind
from pdctl.errors import Cause

# A handshake takes 0.3 ms on a local network and at most its deadline (1 s by default, tens of seconds by setting).
PROBE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_NO_DEPTH = "none"
# From the first question (0.1 s) to the time after which a blocked session nobody wants is forgotten (600 s).
RECOVERY_BUCKETS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


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
