"""The HTTP service: who was turned away at its door, who was told to come again, and who reads its streams."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge

from pdctl.core.access import Denial
from pdctl.core.admission import Lane


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
