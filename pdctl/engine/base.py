"""
The engine port: what a KV transfer engine must promise, whoever makes it.

Return codes end below this line; above it there are results and `TransferFailed` with a `Cause`.
An engine's promises, held by one contract suite over all adapters:

- `write` and `read` return when every byte has landed, or raise when no block of theirs will touch local memory any
  more (`settled`), or raise with `settled=False` when the deadline came first; `settle` then waits for rest.
- Cancelling them stops submission and waits for rest (bounded by the engine's own inactivity limits).
- A destination outside the regions that the peer has announced is rejected before one byte is submitted.
- A transfer to one peer never waits for another peer that hangs.
- A session whose process was replaced is never written to until `forget(session)` says that the new life is meant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pdctl.core.kinds import Depth
from pdctl.core.layout import Region

if TYPE_CHECKING:  # who asks a peer whether it lives moves nothing
    from pdctl.core.plan import CopyPlan


@dataclass(frozen=True, slots=True)
class PeerCard:
    """What a peer shows of its process: enough to tell one life from the next.

    `boot` is the id that the process drew when it opened its engine; empty where it was not read, or a stock engine has
    none.
    """

    session: str
    data_port: int
    regions: tuple[Region, ...] = field(repr=False)
    boot: bytes = b""

    def same_life(self, later: PeerCard) -> bool:
        """Whether `later` can be the same process: same data port, and at least one region that stood before.

        Two boot ids decide; one alone says nothing.

        Processes register and unregister as they live, so regions may come and go; a process that shares no region
        with its past, while it had some, is another one.
        """
        if self.data_port != later.data_port or (self.boot and later.boot and self.boot != later.boot):
            return False
        return not self.regions or bool(set(self.regions) & set(later.regions))

    def covers(self, pointer: int, nbytes: int) -> bool:
        """Whether the bytes lie inside ONE announced region (the engine refuses a span over two)."""
        return any(Region(pointer, nbytes) in region for region in self.regions)


@dataclass(frozen=True, slots=True)
class Announced:
    """What a peer has said of itself elsewhere, before its handshake was ever asked: where its memory begins.

    Less than a card, but enough to refuse another process: `pointers` are base addresses that the life registered.
    """

    session: str
    pointers: tuple[int, ...]

    def same_life(self, later: PeerCard) -> bool:
        """Whether the life that announced these can be the one that shows `later`: it holds every one of them."""
        return all(later.covers(pointer, 1) for pointer in self.pointers)


@dataclass(frozen=True, slots=True)
class Proof:
    """How well a peer has been proven: by what, how deep, and what had to be mended on this side for it.

    `how` and `cured` are constant phrases, fit for a log's key or a metric's label.
    """

    card: PeerCard
    depth: Depth
    how: str
    cured: str | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the installed engine can do, found once at open."""

    name: str
    version: str
    send_probe: bool
    async_read: bool


class Engine(Protocol):
    """A local engine, already open. `session` is the id under which peers reach it (`ip:port`)."""

    @property
    def session(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    async def register(self, region: Region) -> None:
        """Let peers reach `region`. Raises CallerError for an empty or overlapping region, or a null pointer."""

    async def unregister(self, region: Region) -> None:
        """Take back a `register`. No fence: a body already in flight may still land (MOONCAKE_FACTS H12)."""

    async def write(self, session: str, plan: CopyPlan, *, deadline_s: float) -> None:
        """Copy local `plan.src` to the peer's `plan.dst`. Raises TransferFailed."""

    async def read(self, session: str, plan: CopyPlan, *, deadline_s: float) -> None:
        """Copy the peer's `plan.dst` to local `plan.src`. Raises TransferFailed."""

    async def probe(self, session: str, *, deadline_s: float) -> PeerCard:
        """Ask the peer's handshake who it is. Raises TransferFailed (REFUSED, TIMED_OUT, NOT_AN_ENGINE, ...).

        Cancellable at any moment; a hung peer costs nothing but its own deadline.
        """

    async def prove(self, session: str, *, deadline_s: float) -> Proof:
        """Prove the peer as deep as can be: it answers, it is the life that is pinned, its memory can be reached.

        Pins nothing: where no life is pinned yet, whoever asks compares the card. Raises TransferFailed (as `probe`
        does, and PEER_CHANGED for another life, NO_DATA where only the memory cannot be reached).
        """

    def card(self, session: str) -> PeerCard | None:
        """The life that `session` stands for here: who answered when it was first used; None before that."""

    def forget(self, session: str) -> None:
        """The peer has announced itself anew: pin whoever answers next as the life that is meant."""

    async def settle(self, session: str) -> None:
        """Return when no submitted block of any transfer with `session` can touch local memory any more."""
