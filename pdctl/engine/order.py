"""
Which of one peer's transfers submits its blocks next. No engine, no clock: whoever submits asks, and says what went.

Transfers of about one size stand in one queue, and the queues take turns by what blocks take of the peer, not block by
block: 256 blocks of 4 KiB beside blocks of 1 MiB took 200 to 370 ms that way, 20 alone, and 34 to 51 this way. So
nothing waits for what is much larger, and nothing much larger is starved.

Within a queue only a quarter of those that wait take turns, until they are over. When all did, all ended at once:
nothing moved until the event loop had brought the next ones, and each room ended as late as the last. When none did,
the loop woke for each end alone: for 64 rooms of 8 MiB that took a third more of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pdctl.engine.blocks import Transfer
from pdctl.errors import Cause

# Of a queue's turn, in bytes. A block costs about 30 us whatever its size (MOONCAKE_FACTS 3.4), so it counts for no
# fewer bytes than move in that time.
_SHARE, _BLOCK_COST = 256 << 10, 32 << 10
_APART = 4  # one in so many of those that wait


@dataclass(slots=True, eq=False)
class _Queue:
    """Transfers of one size, to a factor of 2. `credit`: bytes until the next queue's turn; `together`: how many take
    turns now, the one whose turn it is among them."""

    size: int
    credit: int = _SHARE
    together: int = 0
    waiting: deque[Transfer] = field(default_factory=deque)


_NONE = _Queue(0)


class Order:
    """Transfers to one peer that have blocks to submit. `take` one, tell `went` of its blocks, then `put_back`."""

    def __init__(self) -> None:
        self._queues: deque[_Queue] = deque()
        self._taken = _NONE  # of which one is taken

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, transfer: Transfer) -> None:
        size = max(transfer.nbytes, transfer.total * _BLOCK_COST).bit_length()
        queue = next((queue for queue in self._queues if queue.size == size), None)
        if queue is None:
            self._queues.append(queue := _Queue(size))
        queue.waiting.append(transfer)

    def take(self) -> Transfer:
        """Whose turn it is. It stands in no queue until `put_back`."""
        while (queue := self._queues[0]).credit <= 0:
            queue.credit += _SHARE
            self._queues.rotate(-1)
        self._taken = queue
        queue.together = queue.together or max(1, len(queue.waiting) // _APART)
        return queue.waiting.popleft()

    def went(self, nbytes: int) -> bool:
        """A block of the one that was taken; whether that was the end of its turn."""
        queue = self._taken
        # One block of debt at most: who was alone for long owes nothing to who comes then.
        queue.credit = max(queue.credit, 0) - max(nbytes, _BLOCK_COST)
        return queue.credit <= 0 and (len(self._queues) > 1 or queue.together > 1)

    def put_back(self, transfer: Transfer) -> bool:
        """Behind those that take turns with it, if it has blocks to submit; whether it has."""
        queue, self._taken = self._taken, _NONE
        if transfer.exhausted:
            queue.together -= 1
            self._sweep()
            return False
        queue.waiting.insert(queue.together - 1, transfer)
        return True

    def stop(self, cause: Cause, detail: str) -> None:
        """None of those that wait submits any more."""
        for queue in self._queues:
            for transfer in queue.waiting:
                transfer.stop(cause, detail, by_another=True)

    def prune(self) -> list[Transfer]:
        """Take out those that submit no more, and return them."""
        stopped: list[Transfer] = []
        for queue in self._queues:
            waiting, queue.waiting = queue.waiting, deque()
            for transfer in waiting:  # each is asked once: another thread may stop it meanwhile
                (stopped if transfer.exhausted else queue.waiting).append(transfer)
            queue.together = min(queue.together, len(queue.waiting) + (queue is self._taken))
        self._sweep()
        return stopped

    def _sweep(self) -> None:
        self._queues = deque(queue for queue in self._queues if queue.waiting or queue is self._taken)
