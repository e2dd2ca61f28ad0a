"""
The one thread that talks to a transfer engine: it submits, it polls, it says when a transfer is over.

One block a submission, because a batch call answers -1 while the rest of its blocks still move (MOONCAKE_FACTS H1). A
bounded window for each peer, because past 2048 blocks the engine wedges for ever (H2). A status is asked only for ids
that are not 0 and not yet terminal, because the engine dereferences them (H10, H11). Peers take turns, and so do the
transfers of one peer. Never spins: between two looks it sleeps.

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
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from pdctl.engine.blocks import Block, Direction, Lane, Transfer, Verdict, Way
from pdctl.errors import Cause

log = structlog.get_logger(__name__)

DONE, PENDING = 1, 0
# Greetings are read to here, and nothing is ever read from here. Not the mover's own: an engine outlives its mover.
_NOWHERE = ctypes.create_string_buffer(64)
_NO_MEMORY = 8  # an address that no peer has registered: asked for it, the peer hangs up, and so the way is closed
Submit = Callable[[str, int, int, int], int]

# 200 us keeps 16 blocks of 64 KiB in flight at full speed; a transfer that has not moved for 50 ms is looked at less.
_BRISK_S, _CALM_S, _CALM_AFTER_S = 200e-6, 2e-3, 50e-3
_GOODBYE_S = 0.1

# Transfers of one peer take turns by what their blocks take of it, not block by block: 256 blocks of 4 KiB beside
# blocks of 1 MiB took 200 to 370 ms that way, 20 alone, and 34 to 51 this way. A block costs about 30 us whatever its
# size (MOONCAKE_FACTS 3.4).
_SHARE, _BLOCK_COST = 256 << 10, 32 << 10


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
                self._windows[transfer.lane] = _Window(self._window, self._stall_s, self._calls, self._tell)
            self._windows[transfer.lane].add(transfer)

    def _part_from_all(self) -> None:
        """At the end, of engines that are kept until the process ends. A peer that hangs keeps its connections."""
        until = time.monotonic() + _GOODBYE_S
        self._part_from_those_left()
        while self._parting and time.monotonic() < until:
            time.sleep(_BRISK_S)
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
        time.sleep(_CALM_S if now - self._quiet_since > _CALM_AFTER_S else _BRISK_S)

    def _tell(self, transfer: Transfer) -> None:
        self._carried.discard(transfer)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(transfer.settle)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A block on its way; or a greeting, and the block that goes after it."""

    ticket: int
    transfer: Transfer
    way: Way
    since: float
    then: Block | None = None


@dataclass(slots=True)
class _Window:
    """What one peer has in flight, at most `size` blocks, and what waits for room."""

    size: int
    stall_s: float
    calls: Calls
    tell: Callable[[Transfer], None]
    waiting: deque[Transfer] = field(default_factory=deque)
    flying: list[_Flight] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.waiting and not self.flying

    def add(self, transfer: Transfer) -> None:
        if transfer.faith != transfer.lane.failures:
            transfer.stop(Cause.PEER_GONE, "another transfer with this peer has failed meanwhile", by_another=True)
        transfer.credit = _SHARE
        self.waiting.append(transfer)

    def turn(self, *, prune: bool) -> bool:
        """Whether anything moved."""
        if prune:
            self._prune()
        before = len(self.flying)
        self._poll()
        left = len(self.flying)
        self._fill()  # at once: what has just landed has left its way idle
        return left != before or len(self.flying) != left

    def fail(self, cause: Cause, detail: str) -> None:
        """Stop what has blocks left to submit to this peer: whoever answers there now may be another process (H6)."""
        for transfer in self.waiting:
            transfer.stop(cause, detail, by_another=True)
        self._prune()

    def _prune(self) -> None:
        stopped = [transfer for transfer in self.waiting if transfer.exhausted]
        if stopped:
            self.waiting = deque(transfer for transfer in self.waiting if not transfer.exhausted)
            self._tell_if_at_rest(stopped)

    def _fill(self) -> None:
        # One block goes first to a peer that has not proven itself since it failed: of those that went on after a
        # SIGSTOP, 27 of 46 failed a block at once when several came together, 0 of 42 when one came first.
        while self.waiting and len(self.flying) < (self.size if self.waiting[0].lane.proven else 1):
            transfer = self.waiting.popleft()
            if transfer.credit <= 0 and self.waiting:
                transfer.credit += _SHARE
                self.waiting.append(transfer)
                continue
            if not transfer.exhausted:
                self._submit(transfer)
            if not transfer.exhausted:
                self.waiting.appendleft(transfer)
            else:
                self._tell_if_at_rest([transfer])

    def _submit(self, transfer: Transfer) -> None:
        block, way = next(transfer.blocks), transfer.lane.way()
        transfer.submitted += 1
        # One block of debt at most: who was alone for long owes nothing to who comes then.
        transfer.credit = max(transfer.credit, 0) - max(block[2], _BLOCK_COST)
        if way.sure:
            self._send(transfer, way, block)
        else:
            self._took(self.calls.greet(way, block[1]), transfer, way, block)

    def _send(self, transfer: Transfer, way: Way, block: Block) -> None:
        end = transfer.lane.over()
        if end is not None:
            transfer.lane.idle.append(way)
            self._failed(transfer, Cause.PEER_GONE, end)
            return
        self._took(self.calls.submit[transfer.direction](way.name, *block), transfer, way)

    def _took(self, ticket: int, transfer: Transfer, way: Way, then: Block | None = None) -> None:
        if ticket == 0:  # refused: there is no ticket, and asking after ticket 0 is a segmentation fault (H10)
            # Of a life that was given up meanwhile, nobody answers any more under its names.
            which = f"the engine took no block {transfer.submitted} of {transfer.total}"
            end = transfer.lane.over()
            self._failed(transfer, Cause.REFUSED if end is None else Cause.PEER_GONE, end or which)
            return
        transfer.in_flight += 1
        self.flying.append(_Flight(ticket, transfer, way, time.monotonic(), then))

    def _poll(self) -> None:
        looked, self.flying = self.flying, []
        ended = []
        for flight in looked:
            status = self.calls.check(flight.ticket)
            if status == PENDING:
                self.flying.append(flight)
                continue
            # Terminal: the engine has freed the ticket, it must never be asked for again (H10).
            ended.append((flight, status))
        for flight, status in ended:
            # Not before its turn: a greeting that ended in the same look still has its block to send.
            flight.transfer.in_flight -= 1
            if status == DONE:
                self._arrived(flight)
            else:  # and its connection is closed: the way is not used again
                self._failed(flight.transfer, *self._diagnosis(flight.transfer, time.monotonic() - flight.since))
            self._tell_if_at_rest([flight.transfer])

    def _arrived(self, flight: _Flight) -> None:
        transfer, flight.way.sure = flight.transfer, True
        transfer.lane.proven = True
        if flight.then is not None and transfer.verdict is None:
            self._send(transfer, flight.way, flight.then)
        else:
            transfer.lane.idle.append(flight.way)

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

    def _tell_if_at_rest(self, transfers: list[Transfer]) -> None:
        for transfer in transfers:
            if transfer.at_rest:
                self.tell(transfer)
