"""What strangers may make a prefill rank remember and do. Values only: no message and no array is loaded for them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdctl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EarlyLimits:
    """Rooms, and pages named in them, that strangers can make this side remember; beyond it the oldest room goes of
    whoever has named most, so that one decode rank cannot push out another's."""

    max_rooms: int = 4096
    max_pages: int = 16 << 20


@dataclass(frozen=True, slots=True)
class SenderLimits:
    """What strangers can make this side remember, and what one decode rank may take of it.

    max_peers: decode ranks whose memory is known; the one unused for longest is forgotten, and told so when it asks.
    max_rooms_per_peer: open rooms in which one decode rank has named pages; a further one fails, and the rank is told.
    max_nbytes_per_peer: under way to one decode rank at once; what is more waits here for its turn, room after room.
        What the engine truly has in flight is less, and it shares that out block by block. What is below a 64th of it
        does not wait behind what is larger.
    turn_nbytes: of one room until it is the next one's turn. A turn costs the loop 0.2 to 0.5 ms: with 32 MiB that is
        1 to 2 % of it, with 8 MiB it was 5 to 10.
    early: metadata that came before the engine opened the room.
    """

    max_peers: int = 4096
    max_rooms_per_peer: int = 4096
    max_nbytes_per_peer: int = 128 << 20
    turn_nbytes: int = 32 << 20
    early: EarlyLimits = field(default_factory=EarlyLimits)

    def __post_init__(self) -> None:
        for name in ("max_peers", "max_rooms_per_peer", "max_nbytes_per_peer", "turn_nbytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sender {name} is {getattr(self, name)}: give at least 1")
