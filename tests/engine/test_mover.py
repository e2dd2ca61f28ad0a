"""When the mover says that a transfer is over: never while a block of it is still to go, or on its way."""

from __future__ import annotations

import asyncio
import itertools

from pdctl.engine.blocks import Block, Direction, Lane, Transfer
from pdctl.engine.mover import DONE, PENDING, Calls, Submit, _Window


class Engine:
    """Tickets that end when a test says so; what was submitted, in order."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Direction, object]] = []
        self.over: set[int] = set()

    def calls(self) -> Calls:
        return Calls({way: self._submit(way) for way in Direction}, lambda t: DONE if t in self.over else PENDING)

    def _submit(self, way: Direction) -> Submit:
        def submit(*block: object) -> int:
            self.submitted.append((way, block[2]))
            return len(self.submitted)

        return submit

    def end_all(self) -> None:
        self.over.update(range(1, len(self.submitted) + 1))


async def test_a_block_that_ends_together_with_anothers_greeting_does_not_end_their_transfer() -> None:
    """Seen: of a write that had returned, blocks landed later, and would have been sent from memory in use again."""
    engine, told = Engine(), list[Transfer]()
    lane = Lane((f"way {n}" for n in itertools.count()), greets=True)
    plan: list[Block] = [(n, 4096 * n, 8) for n in range(1, 3)]
    transfer = Transfer(lane, 0, Direction.WRITE, iter(plan), 2, asyncio.get_running_loop().create_future())
    window = _Window(2, 1.0, engine.calls(), told.append)
    window.add(transfer)
    window.turn(prune=False)
    engine.end_all()  # the first way's greeting: its block goes, and then a second greeting
    window.turn(prune=False)
    window.turn(prune=False)
    assert engine.submitted == [(Direction.READ, 4096), (Direction.WRITE, 4096), (Direction.READ, 8192)]
    engine.end_all()  # that block, and in the same look the second greeting
    window.turn(prune=False)
    assert engine.submitted[3:] == [(Direction.WRITE, 8192)]
    assert told == [], "its second block is on its way"
    engine.end_all()
    window.turn(prune=False)
    assert told == [transfer]
    assert window.empty
