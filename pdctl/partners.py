"""
The decode ranks whose memory a prefill rank knows: what each has registered, and how it goes with our pools.

Paired at a rank's first room and kept until it registers anew: made for each room, the pairing took longer than the
plan. Writes nothing, and tells nobody what it refuses.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from pdctl.core.comparing import Checksum
from pdctl.core.destination import Destination, Partner
from pdctl.core.gate import Gate
from pdctl.core.layout import RankPools
from pdctl.core.wire import NOT_REGISTERED, Metadata, RegisterBuffers
from pdctl.errors import CallerError, ChecksumsMissing, LayoutMismatch, LimitReached, SessionBlocked, Unpairable


class Partners:
    """At most `max_partners`, the one unused for longest is forgotten, and at most `max_rooms` open rooms of each.

    forget  the engine's, for one that is not known any more: what it holds for a life are a port, a tether, connections
    """

    def __init__(
        self,
        pools: RankPools,
        gate: Gate,
        checksum: Checksum,
        forget: Callable[[str], None],
        max_partners: int,
        max_rooms: int,
    ) -> None:
        self._pools, self._gate, self._checksum, self._forget = pools, gate, checksum, forget
        self._max_partners, self._max_rooms = max_partners, max_rooms
        self._said: OrderedDict[str, RegisterBuffers] = OrderedDict()
        self._paired: dict[str, Partner] = {}
        self.rooms_of: Counter[str] = Counter()

    @property
    def sessions(self) -> tuple[str, ...]:
        return tuple(self._said)

    def knows(self, session: str) -> bool:
        return session in self._said

    def has(self, said: RegisterBuffers) -> bool:
        """Whether that is what its session has registered."""
        return self._said.get(said.session) == said

    def registered(self, said: RegisterBuffers) -> bool:
        """Whether it is other memory than that session had before."""
        before = self._said.get(said.session)
        self._paired.pop(said.session, None)
        self._said[said.session] = said
        self._said.move_to_end(said.session)
        while len(self._said) > self._max_partners:
            unused, _ = self._said.popitem(last=False)
            self._paired.pop(unused, None)
            if not self.rooms_of[unused]:
                self._forget(unused)
        return before is not None and before != said

    def pair(self, named: Metadata) -> Destination:
        """Raises a PdctlError, with its reason, when this decode rank cannot be served."""
        session = named.session
        said = self._said.get(session)
        if said is None:
            raise CallerError(f"{NOT_REGISTERED}: {session} must send its buffer registration before metadata")
        self._said.move_to_end(session)
        blocked = self._gate.reason_blocked(session)
        if blocked is not None:
            raise SessionBlocked(session, blocked)
        if self._checksum is Checksum.REQUIRED and not said.wants_sums:
            raise ChecksumsMissing(
                f"decode session {session} asks for no checksums, and room.checksum is required here: start that "
                "decode with room.checksum offered or required (a stock one cannot), or this prefill with offered"
            )
        partner = self._paired.get(session)
        if partner is None:
            try:
                partner = self._paired[session] = Partner.of(said, self._pools)
            except LayoutMismatch as error:
                raise Unpairable(str(error)) from error
        return partner.destination(named)

    def take_in(self, session: str) -> None:
        """One more room of this decode rank. Raises LimitReached, and then it is none."""
        if self.rooms_of[session] >= self._max_rooms:
            raise LimitReached(
                f"decode session {session} has pages in {self._max_rooms} open rooms here, as many as "
                "max_rooms_per_peer allows: send that decode rank fewer requests at once, or raise it"
            )
        self.rooms_of[session] += 1

    def leave(self, sessions: Iterable[str]) -> None:
        """A room of these is over."""
        for session in sessions:
            self.rooms_of[session] -= 1
            if not self.rooms_of[session]:
                del self.rooms_of[session]
