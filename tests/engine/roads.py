"""Real engines some of whose ways to some peers are out of order: a factory for `open_mooncake`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Literal

from pdctl.core.layout import Region

_NEVER = 1 << 62  # tickets of blocks that no engine has; a real one is a heap pointer


class Roads:
    """`make` the engine objects of one process, in order; what each does with a block is decided here first.

    A blocked region is a peer's memory, which the engine object of that number does not reach: it takes no block for
    it, or it takes them and they never come back. A lost door is the port at which a lane's names were answered for:
    no block goes by such a name any more, by any engine; by a mute one they go, and never come back.
    """

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.doors: dict[str, None] = {}
        self.lost: set[str] = set()
        self.mute: set[str] = set()
        self.broken: Exception | None = None
        self._blocked: dict[int, tuple[Literal["refuses", "swallows"], tuple[Region, ...]]] = {}
        self._swallowed = itertools.count(_NEVER)
        self._gone_on: set[int] = set()

    def block(self, engine: int, regions: Iterable[Region], how: Literal["refuses", "swallows"]) -> None:
        self._blocked[engine] = (how, tuple(regions))

    def unblock(self) -> None:
        """What was swallowed ends FAILED."""
        self._blocked.clear()
        self.mute.clear()
        self._gone_on = set(range(_NEVER, next(self._swallowed)))

    def make(self) -> Any:
        from mooncake.engine import TransferEngine

        if self.broken and self.made:
            raise self.broken
        roads, number = self, len(self.made)

        class Engine(TransferEngine):  # type: ignore[misc, unused-ignore]
            def transfer_submit_write(self, name: str, local: int, remote: int, nbytes: int) -> int:
                ticket = roads._instead(number, name, Region(remote, nbytes))
                return int(super().transfer_submit_write(name, local, remote, nbytes)) if ticket is None else ticket

            def batch_transfer_async_read(self, name: str, local: Any, remote: Any, nbytes: Any) -> int:
                ticket = roads._instead(number, name, Region(remote[0], nbytes[0]))
                return int(super().batch_transfer_async_read(name, local, remote, nbytes)) if ticket is None else ticket

            def transfer_check_status(self, ticket: int) -> int:
                if ticket >= _NEVER:
                    return -1 if ticket in roads._gone_on else 0
                return int(super().transfer_check_status(ticket))

        self.made.append(Engine())
        return self.made[-1]

    def _instead(self, engine: int, name: str, span: Region) -> int | None:
        door = name.rpartition(":")[2]
        self.doors.setdefault(door)
        how, regions = self._blocked.get(engine, ("refuses", ()))
        if door in self.lost:
            return 0
        if door in self.mute:
            return next(self._swallowed)
        if not any(span in region for region in regions):
            return None
        return 0 if how == "refuses" else next(self._swallowed)
