"""
The one thread that talks to a transfer engine: it submits, it polls, it says when a transfer is over.

One block a submission, because a batch call answers -1 while the rest of its blocks still move (MOONCAKE_FACTS H1). A
bounded window for each peer, because past 2048 blocks the engine wedges for ever (H2). A status is asked only for ids
that are not 0 and not yet terminal, because the engine dereferences them (H10, H11). Peers take turns; which of one
peer's transfers is next, order.py says. Never spins: between two looks it sleeps.

One block a way. What the engine has to queue, it sends by the next connection that it gets, a second later if need be:
of blocks submitted before a peer was killed, three were written into the process that came after it (measured, H6). So
a block is only given to a way that nothing else is on, whose connection is known to stand, while the peer's tether
holds: it reaches that process, or none.

Knows no asyncio beyond "tell that loop"; knows no sessions, only the names under which the engine knows peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from pdctl.engine.blame import own_fault
from pdctl.engine.blocks import Block, Direction, Lane, Transfer, Verdict, Way
from pdctl.engine.gather import Stages
from pdctl.engine.order import Order
from pdctl.errors import Cause

log = structlog.get_logger(__name__)

DONE, PENDING = 1, 0
# Greetings are read to here, and nothing is ever read from here. Not the mover's own: an engine outlives its mover.
_NOWHERE = ctypes.create_string_buffer(64)
_NO_MEMORY = 8  # an address that no peer has registered: asked for it, the peer hangs up, and so the way is closed
_GONE = "memory of this side that it was to move is not there any more"
Submit = Callable[[str, int, int, int], int]

# Between two looks at a peer, so that a quarter to a half of what is in flight has ended meanwhile: of 64 blocks of
# 4 KiB, 200 us let only 8 end, and each look costs a question a block and takes a core from the engine's own thread.
_SHORTEST_S, _LONGEST_S = 50e-6, 300e-6
_CALM_S, _CALM_AFTER_S = 2e-3, 50e-3  # where nothing has moved for so long
_GOODBYE_S = 0.1
# How old a look at the tether may be when a block goes: a process takes 20 times as long to start and to take a port.
_FRESH_S = 500e-6
# Bytes in flight to one peer: more of them move no faster, and a small block beside them waits for longer.
_IN_FLIGHT, _AT_LEAST = 16 << 20, 4
# So many in a row that have not ended end a look: with 64 in flight, of which 6 had ended, to ask after the others took
# up to 5 of the 74 us of CPU that a block of 64 KiB costs both processes.
_PENDING_ENOUGH = 16


@dataclass(frozen=True, slots=True)
class Calls:
    """What the mover needs of an engine: 0 from `submit` is "not taken"; 0 from `check` is "not over"."""

    submit: Mapping[Direction, Submit]
    check: Callable[[int], int]

    def greet(self, way: Way, remote: int) -> int:
        """Read one byte from `remote` to nowhere: whoever answers, no harm is done."""
        return self.submit[Direction.READ](way.name, ctypes.addressof(_NOWHERE), remote, 1)


class Mover:
    """`add` transfers from the loop, `nudge` after stopping one, `end` when all rest; `run` is the thread's body."""

    def __init__(self, loop: asyncio.AbstractEventLoop, calls: Calls, window: int, stall_s: float) -> None:
        self._loop = loop
        self._calls = calls
        self._window = window
        self._stall_s = stall_s
        self._inbox: deque[Transfer] = deque()
        self._news = threading.Event()
        self._ending = False
        self._windows: dict[Lane, _Window] = {}
        self._stages = Stages()
        self._carried: set[Transfer] = set()
        self._over: Verdict | None = None
        self._quiet_since = 0.0
        self._leaving: deque[Lane] = deque()
        self._parting: list[int] = []

    def add(self, transfer: Transfer) -> None:
        self._inbox.append(transfer)
        self._news.set()
        if self._over is not None:  # nobody looks into the inbox any more
            transfer.stop(*self._over)
            self._tell(transfer)

    def leave(self, lane: Lane) -> None:
        """That life is not meant any more: its connections are closed, as they come to rest."""
        self._leaving.append(lane)
        self._news.set()

    def nudge(self) -> None:
        """Look again at once: something was stopped."""
        self._news.set()

    def end(self) -> None:
        self._ending = True
        self._news.set()

    def run(self) -> bool:
        """The thread's body. Returns after `end`, or when it fails: whether all is at rest."""
        try:
            while not self._ending:
                self._turn()
            self._part_from_all()
        except Exception:
            log.exception("the mover thread failed")
        return not self._carried and not self._inbox

    def let_go(self, cause: Cause, detail: str) -> None:
        """Tell everybody that it is over. Only after the engine is no more: nothing else makes that true."""
        self._over = (cause, detail)
        for transfer in [*self._carried, *self._inbox]:
            transfer.stop(cause, detail)
            self._tell(transfer)

    def _turn(self) -> None:
        news = self._news.is_set()
        self._news.clear()
        self._admit()
        moved = [window.turn(prune=news) for window in self._windows.values()]
        for lane in [lane for lane, window in self._windows.items() if window.empty]:
            del self._windows[lane]
            self._part(lane)
        self._part_from_those_left()
        self._pause(moved=any(moved) or news)

    def _admit(self) -> None:
        while self._inbox:
            transfer = self._inbox.popleft()
            self._carried.add(transfer)
            if transfer.lane not in self._windows:
                self._windows[transfer.lane] = _Window(
                    transfer.lane, self._window, self._stall_s, self._calls, self._tell, self._stages
                )
            self._windows[transfer.lane].add(transfer)

    def _part_from_all(self) -> None:
        """At the end, of engines that are kept until the process ends. A peer that hangs keeps its connections."""
        until = time.monotonic() + _GOODBYE_S
        self._part_from_those_left()
        while self._parting and time.monotonic() < until:
            time.sleep(_CALM_S)
            self._part_from_those_left()

    def _part_from_those_left(self) -> None:
        while self._leaving:
            self._part(self._leaving.popleft())
        self._parting = [ticket for ticket in self._parting if self._calls.check(ticket) == PENDING]

    def _part(self, lane: Lane) -> None:
        """Close what stands to a life that is over. The engine keeps a connection that it is never asked to use."""
        while lane.idle and lane.greets and lane.over() is not None:
            ticket = self._calls.greet(lane.idle.pop(), _NO_MEMORY)
            if ticket:
                self._parting.append(ticket)

    def _pause(self, *, moved: bool) -> None:
        if not self._windows and not self._parting:
            self._news.wait()
            return
        now = time.monotonic()
        if moved:
            self._quiet_since = now
        # Not news.wait(timeout): that takes a lock and 60 us more, and this is the hot path.
        brisk_s = min((window.nap_s for window in self._windows.values()), default=_CALM_S)
        time.sleep(_CALM_S if now - self._quiet_since > _CALM_AFTER_S else brisk_s)

    def _tell(self, transfer: Transfer) -> None:
        self._carried.discard(transfer)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(transfer.settle)


# A block on its way: ticket, transfer, way, since when, the block; or a greeting, and the block to go after it
# (`is_greeting`). A plain tuple: to make and unpack a dataclass took 2 us of the 8 that the mover takes for a block.
_Flight = tuple[int, Transfer, Way, float, Block, bool]


@dataclass(slots=True)
class _Window:
    """What one peer has in flight, at most `size` blocks, and what waits for room."""

    lane: Lane
    size: int
    stall_s: float
    calls: Calls
    tell: Callable[[Transfer], None]
    stages: Stages = field(default_factory=Stages)
    waiting: Order = field(default_factory=Order)
    flying: list[_Flight] = field(default_factory=list)
    nbytes: int = 0
    looked_at: float = -math.inf
    nap_s: float = _SHORTEST_S

    @property
    def empty(self) -> bool:
        return not self.waiting and not self.flying

    def add(self, transfer: Transfer) -> None:
        if transfer.faith != transfer.lane.failures:
            transfer.stop(Cause.PEER_GONE, "another transfer with this peer has failed meanwhile", by_another=True)
        self.waiting.add(transfer)

    def turn(self, *, prune: bool) -> bool:
        """Whether anything moved."""
        if prune:
            self._prune()
        self.looked_at = -math.inf
        ended = self._poll()
        left = len(self.flying)
        self._pace(ended, left)
        self._fill()  # at once: what has just landed has left its way idle
        return ended > 0 or len(self.flying) != left

    def _pace(self, ended: int, left: int) -> None:
        if ended > left:
            self.nap_s = max(self.nap_s * 0.7, _SHORTEST_S)
        elif 3 * ended < left:
            self.nap_s = min(self.nap_s * 1.4, _LONGEST_S)

    def fail(self, cause: Cause, detail: str) -> None:
        """Stop what has blocks left to submit to this peer: whoever answers there now may be another process (H6)."""
        self.waiting.stop(cause, detail)
        self._prune()

    def _prune(self) -> None:
        for transfer in self.waiting.prune():
            self._tell_if_at_rest(transfer)

    def _fill(self) -> None:
        while self.waiting and self._has_room():
            transfer = self.waiting.take()
            self._give(transfer)
            if not self.waiting.put_back(transfer):
                self._tell_if_at_rest(transfer)

    def _has_room(self) -> bool:
        # One block goes first to a peer that has not proven itself since it failed: of those that went on after a
        # SIGSTOP, 27 of 46 failed a block at once when several came together, 0 of 42 when one came first.
        if not self.lane.proven:
            return not self.flying
        n = len(self.flying)
        return n < self.size and n < self.lane.most and (self.nbytes < _IN_FLIGHT or n < _AT_LEAST)

    def _give(self, transfer: Transfer) -> None:
        """Submit blocks of it until there is no room, or another's turn comes, or there are no more."""
        lane, total = self.lane, transfer.total
        while transfer.submitted < total and transfer.verdict is None and self._has_room():
            block, way = next(transfer.blocks), lane.way()
            transfer.submitted += 1
            is_over = self.waiting.went(block[2])
            if way.sure:
                self._send(transfer, way, block)
            else:
                self._greet(transfer, way, block)
            if is_over:
                return

    def _send(self, transfer: Transfer, way: Way, block: Block) -> None:
        local, remote, nbytes = block
        if not isinstance(local, int):
            try:
                way.stage = self.stages.take()
                local = local.into(way.stage)
            except OSError as error:
                self._back(transfer.lane, way)
                transfer.stop(Cause.LOCAL, own_fault(error) or f"{_GONE} ({error.strerror})")
                return
        now = time.monotonic()
        if now - self.looked_at > _FRESH_S:
            end = transfer.lane.over()
            if end is not None:
                self._back(transfer.lane, way)
                self._failed(transfer, Cause.PEER_GONE, end)
                return
            self.looked_at = now
        ticket = self.calls.submit[transfer.direction](way.name, local, remote, nbytes)
        if not ticket:
            self._unstage(way)
            self._refused(transfer)
            return
        transfer.in_flight += 1
        self.nbytes += nbytes
        self.flying.append((ticket, transfer, way, now, block, False))

    def _greet(self, transfer: Transfer, way: Way, then: Block) -> None:
        ticket = self.calls.greet(way, then[1])
        if not ticket:
            self._refused(transfer)
            return
        transfer.in_flight += 1
        self.nbytes += then[2]
        self.flying.append((ticket, transfer, way, time.monotonic(), then, True))

    def _refused(self, transfer: Transfer) -> None:
        """There is no ticket, and asking after ticket 0 is a segmentation fault (H10)."""
        # Of a life that was given up meanwhile, nobody answers any more under its names.
        end = transfer.lane.over()
        which = f"the engine took no block {transfer.submitted} of {transfer.total}"
        self._failed(transfer, Cause.REFUSED if end is None else Cause.PEER_GONE, end or which)

    def _poll(self) -> int:
        """How many have ended."""
        check, pending, ended = self.calls.check, list[_Flight](), list[tuple[_Flight, int]]()
        in_a_row = 0
        for n, flight in enumerate(self.flying, 1):
            status = check(flight[0])
            if status != PENDING:  # terminal: the engine has freed the ticket, it must never be asked for again (H10)
                ended.append((flight, status))
                in_a_row = 0
                continue
            pending.append(flight)
            in_a_row += 1
            if in_a_row == _PENDING_ENOUGH:
                pending = self.flying[n:] + pending  # the others first at the next look
                break
        self.flying = pending
        for (_, transfer, way, since, block, is_greeting), status in ended:
            # Not before its turn: a greeting that ended in the same look still has its block to send.
            transfer.in_flight -= 1
            self.nbytes -= block[2]
            self._unstage(way)
            if status == DONE:
                self._arrived(transfer, way, block if is_greeting else None)
            else:  # and its connection is closed: the way is not used again
                self._failed(transfer, *self._diagnosis(transfer, time.monotonic() - since))
            if not transfer.in_flight:
                self._tell_if_at_rest(transfer)
        return len(ended)

    def _arrived(self, transfer: Transfer, way: Way, then: Block | None) -> None:
        way.sure = transfer.lane.proven = True
        if then is not None and transfer.verdict is None:
            self._send(transfer, way, then)
        else:
            transfer.lane.idle.append(way)

    def _back(self, lane: Lane, way: Way) -> None:
        """No block has gone by it."""
        self._unstage(way)
        lane.idle.append(way)

    def _unstage(self, way: Way) -> None:
        if way.stage is not None:
            self.stages.give_back(way.stage)
            way.stage = None

    def _diagnosis(self, transfer: Transfer, age_s: float) -> Verdict:
        which = f"one of {transfer.total} blocks"
        if age_s >= 0.9 * self.stall_s:  # the engine's clock began before ours: 0.999 s were seen for 1 s
            return Cause.TIMED_OUT, f"{which} did not move for {age_s:.1f} s: the peer hangs, or the way to it is cut"
        return Cause.PEER_GONE, f"{which} ended FAILED after {age_s * 1e3:.0f} ms: the connection broke"

    def _failed(self, transfer: Transfer, cause: Cause, detail: str) -> None:
        transfer.lane.failures += 1
        transfer.lane.proven = False
        transfer.stop(cause, detail)
        self.fail(cause, f"another transfer with this peer failed first: {detail}")

    def _tell_if_at_rest(self, transfer: Transfer) -> None:
        if transfer.at_rest:
            self.tell(transfer)
