"""Moving KV: rooms of either side, the pages that finished ones still hold, and the control link between them."""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pdctl.core.comparing import Checked
from pdctl.core.transfer import Phase, Side, Word

# A page in a quiet house takes a millisecond; the waits that end a room are 300 s.
ROOM_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


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
        self._lost = Counter(
            "pdctl_room_words_lost_total",
            "Messages of rooms that were lost on their way and said again, by word.",
            ["word"],
            registry=registry,
        )
        for word in Word:
            self._lost.labels(word)
        for result in Checked:
            self._checked.labels(result)
        # A look-up of labels takes as long as all else that is counted of a room: each is made once.
        self._open_of = {side: self._open.labels(side) for side in Side}
        self._seconds_of = {side: self._seconds.labels(side) for side in Side}
        self._ended_in = {
            (side, phase): self._ended.labels(side, phase.name.lower())
            for side in Side
            for phase in (Phase.SUCCESS, Phase.FAILED)
        }
        for side in Side:
            self._quarantined.labels(side)

    def opened(self, side: Side) -> None:
        self._open_of[side].inc()

    def ended(self, side: Side, phase: Phase, seconds: float) -> None:
        self._open_of[side].dec()
        self._ended_in[side, phase].inc()
        if phase is Phase.SUCCESS:
            self._seconds_of[side].observe(seconds)

    def quarantined(self, side: Side, n_pages: int) -> None:
        """`n_pages` more than before; fewer when below 0."""
        self._quarantined.labels(side).inc(n_pages)

    def sent(self, nbytes: int, seconds: float) -> None:
        self._sent.inc(nbytes)
        self._sending.inc(seconds)

    def checked(self, result: Checked) -> None:
        self._checked.labels(result).inc()

    def lost(self, word: Word) -> None:
        self._lost.labels(word).inc()
