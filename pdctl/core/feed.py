"""
The last changes, by revision, for readers who were away and ask what came since.

No clock, no readers, no waiting: a reader is a number, the last revision that it has seen. So a slow reader costs
nothing here, and whoever falls behind the floor is told so instead of being given a gap.

    dropped ...  floor |  entry  entry  entry  | revision
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter

from pdctl.core.seconds import check_seconds
from pdctl.errors import ConfigError

_REVISION = itemgetter(0)


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """What watchers may cost.

    max_watchers    streams at once; one more is answered 429
    heartbeat_s     a stream that has had nothing to say for so long says that it lives
    send_within_s   a reader that takes nothing for so long is cut off
    """

    max_watchers: int = 1000
    heartbeat_s: float = 10.0
    send_within_s: float = 10.0

    def __post_init__(self) -> None:
        check_seconds(self, "watch")
        if self.max_watchers < 0:
            raise ConfigError(f"watch max_watchers is {self.max_watchers}: give at least 0")


class Feed:
    """At most `max_entries` entries of `max_nbytes` together; the newest always stays.

    Revisions rise and need not be neighbours. `start` is the revision that the first entry follows.
    """

    def __init__(self, start: int = 0, *, max_entries: int = 16_384, max_nbytes: int = 16 << 20) -> None:
        if max_entries < 1 or max_nbytes < 1:
            raise ConfigError(f"a feed of {max_entries} entries and {max_nbytes} bytes holds nothing: give 1 or more")
        self._entries: deque[tuple[int, bytes]] = deque()
        self._max_entries = max_entries
        self._max_nbytes = max_nbytes
        self._nbytes = 0
        self._floor = start
        self._revision = start

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def floor(self) -> int:
        """The lowest revision that a reader can go on from."""
        return self._floor

    @property
    def revision(self) -> int:
        """The revision of the newest entry."""
        return self._revision

    def append(self, revision: int, entry: bytes) -> None:
        """Keep `entry`, and let the oldest go for it where there is no room. Raises ValueError for a step back."""
        if revision <= self._revision:
            raise ValueError(f"revision {revision} comes after {self._revision}: revisions only rise")
        self._entries.append((revision, entry))
        self._revision = revision
        self._nbytes += len(entry)
        while len(self._entries) > self._max_entries or (self._nbytes > self._max_nbytes and len(self._entries) > 1):
            self._floor, oldest = self._entries.popleft()
            self._nbytes -= len(oldest)

    def covers(self, revision: int) -> bool:
        """Whether a reader who has seen `revision` can go on without a gap. One ahead of us has read another feed."""
        return self._floor <= revision <= self._revision

    def since(self, revision: int, limit: int) -> list[tuple[int, bytes]] | None:
        """At most `limit` entries after `revision`, oldest first; None where `covers` says no."""
        if not self.covers(revision):
            return None
        if revision == self._revision:
            return []
        first = bisect_right(self._entries, revision, key=_REVISION)
        return list(islice(self._entries, first, first + limit))
