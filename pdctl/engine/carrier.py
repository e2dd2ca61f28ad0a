"""
The inner port of an engine: what an adapter adds to the promises.

Everything that must not differ between adapters is in promises.py and pins.py, which see nothing else of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from pdctl.core.layout import Region
from pdctl.engine.base import Capabilities
from pdctl.engine.blocks import Lane, Transfer
from pdctl.engine.handshake import Descriptor


class Carrier(Protocol):
    """What an adapter adds. Codes of the registrations: 0 is done, everything else is a refusal."""

    @property
    def session(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def is_open(self) -> bool: ...

    @property
    def gathers(self) -> bool:
        """Whether what is written may be put together first: it is host memory, and so may be what it is sent from."""

    async def register(self, region: Region) -> int: ...

    async def unregister(self, region: Region) -> int: ...

    async def describe(self, session: str, deadline_s: float) -> Descriptor:
        """Who is there? Raises TransferFailed."""

    @property
    def engines(self) -> int:
        """How many engine objects this carrier may have. All but the first only go out to peers, and are made when
        they are wanted."""

    def has_made(self, engine: int) -> bool:
        """Whether that engine object is there, so that wanting it costs nothing."""

    async def lane(self, session: str, found: Descriptor, engine: int) -> Lane:
        """A way to this life of the peer by that engine object, not shared with any other life."""

    async def knock(self, session: str, found: Descriptor, deadline_s: float) -> None:
        """Whether its data port takes connections at all. Raises NO_DATA. Costs no block and no lane."""

    def add(self, transfer: Transfer) -> None:
        """Carry it, and call its `settle` on the loop when it is at rest."""

    def nudge(self) -> None:
        """A transfer was stopped: look at once."""

    def own_fault(self, spans: Iterable[Region]) -> str | None:
        """Why a transfer from or to this memory of ours fails whoever the peer is, in words; None where nothing of
        that kind is to be found."""
