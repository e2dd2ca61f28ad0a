"""
What ranks have told the other registries of their fleet: copies of reports, each with its age and with who was told.

No sockets, no clock: `now` is an argument. Bounded as a registry's own reports are. A copy is shown and nothing else:
no event is made of it, as the registry that was told has made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pdctl.core.capacity import ReportLimits
from pdctl.core.overview import Place


@dataclass(frozen=True, slots=True)
class Copied:
    """One rank's last word at another registry: `body` as JSON on one line, `at` by this registry's clock."""

    epoch: int
    at: float
    body: bytes


@dataclass(slots=True)
class Elsewhere:
    """By rank, and by the registry that was told; a rank that has turned to another one may be known at both."""

    limits: ReportLimits = field(default_factory=ReportLimits)
    nbytes: int = 0
    _told: dict[Place, dict[str, Copied]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._told)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._told)

    def of(self, registry: str) -> set[Place]:
        return {place for place, told in self._told.items() if registry in told}

    def take(self, registry: str, place: Place, copied: Copied) -> bool:
        """Whether there was room for it."""
        before = self._told.get(place, {}).get(registry)
        nbytes = self.nbytes + len(copied.body) - (0 if before is None else len(before.body))
        is_full = place not in self._told and len(self._told) >= self.limits.max_reports
        if is_full or nbytes > self.limits.max_nbytes:
            return False
        self.nbytes = nbytes
        self._told.setdefault(place, {})[registry] = copied
        return True

    def drop(self, registry: str, places: Iterable[Place]) -> None:
        """They are not held there any more."""
        for place in places:
            self._forget(place, registry)

    def over(self, place: Place, epoch: int) -> bool:
        """That life is over; whether anything was known of it."""
        gone = [registry for registry, copied in self._told.get(place, {}).items() if copied.epoch == epoch]
        for registry in gone:
            self._forget(place, registry)
        return bool(gone)

    def expire(self, now: float, after_s: float) -> list[Place]:
        """Those that nobody has said again for so long are known no more."""
        old = [(place, reg) for place, told in self._told.items() for reg, it in told.items() if now - it.at >= after_s]
        for place, registry in old:
            self._forget(place, registry)
        return [place for place, _ in old]

    def freshest(self, place: Place) -> tuple[str, Copied] | None:
        """Its last word, and which registry was told."""
        told = self._told.get(place)
        return None if not told else max(told.items(), key=lambda item: item[1].at)

    def _forget(self, place: Place, registry: str) -> None:
        told = self._told.get(place, {})
        copied = told.pop(registry, None)
        if copied is not None:
            self.nbytes -= len(copied.body)
        if not told:
            self._told.pop(place, None)
