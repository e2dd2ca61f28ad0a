"""
The engine as it comes, without any guard: one hazard a function, each in a process of its own.

`python -m tests.engine.bare NAME ARGUMENTS_JSON` prints JSON lines; what they hold is the finding.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.engine.processes import die_with_parent

MIB = 1 << 20


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def heard() -> None:
    """Wait for the test to say go on."""
    sys.stdin.readline()


def engine() -> Any:
    from mooncake.engine import TransferEngine

    made = TransferEngine()
    assert made.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    return made


class Buffer:
    def __init__(self, nbytes: int, fill: bytes) -> None:
        self.bytes = ctypes.create_string_buffer(nbytes)
        self.at = ctypes.addressof(self.bytes)
        self.fill(fill)

    def fill(self, fill: bytes) -> None:
        ctypes.memset(self.at, fill[0], len(self.bytes))


class Ticker:
    """A thread that should run every millisecond; `longest_s` is how long it could not."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ending:
            time.sleep(0.001)
            now = time.monotonic()
            self.longest_s, last = max(self.longest_s, now - last), now

    def end(self) -> float:
        self._ending = True
        self._thread.join()
        return self.longest_s


def batch_write_fails_early(session: str, pointer: int) -> None:
    """H1. The peer is stopped once the segment is open; after -1 the source is used again."""
    local, here = Buffer(64 * MIB, b"\x01"), engine()
    assert here.transfer_sync_write(session, local.at, pointer, 1) == 0
    say(at="open")
    heard()
    at = [local.at + n * MIB for n in range(64)]
    there = [pointer + n * MIB for n in range(64)]
    began = time.monotonic()
    code = here.batch_transfer_sync_write(session, at, there, [MIB] * 64)
    local.fill(b"\x02")
    say(code=code, took_s=time.monotonic() - began)
    heard()


def queue_overflows(session: str, pointer: int, blocks: int) -> None:
    """H2. More blocks at once than the engine's two queues hold."""
    local, here = Buffer(blocks * 4096, b"\x01"), engine()
    assert here.transfer_sync_write(session, local.at, pointer, 1) == 0
    offsets = [n * 4096 for n in range(blocks)]
    code = here.batch_transfer_sync_write(
        session, [local.at + n for n in offsets], [pointer + n for n in offsets], [4096] * blocks
    )
    say(code=code)
    heard()


def wedges(session: str, pointer: int) -> None:
    """H2. Full queues, again and again, until nothing reaches the peer any more; then another engine is made."""
    blocks = 4096
    local, here = Buffer(blocks * 4096, b"\x01"), engine()
    at, there = ([first + n * 4096 for n in range(blocks)] for first in (local.at, pointer))
    for _ in range(300):
        here.batch_transfer_sync_write(session, at, there, [4096] * blocks)
        if not any(_reaches(here, session, local.at, pointer, within_s) for within_s in (0.2, 2.0)):
            break
    say(
        probe=here.send_probe(session),
        first=_reaches(here, session, local.at, pointer, 0.5),
        second=_reaches(engine(), session, local.at, pointer, 0.5),
    )
    heard()


def _reaches(here: Any, session: str, local: int, remote: int, within_s: float) -> bool:
    """Whether one byte can be read, by any number of tries."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        ticket = here.batch_transfer_async_read(session, [local], [remote], [1])
        while ticket and (status := here.transfer_check_status(ticket)) == 0 and time.monotonic() < until:
            time.sleep(0.001)
        if ticket and status == 1:
            return True
        time.sleep(0.01)
    return False


def first_open_blocks_all(hung: str, well: str, pointer: int) -> None:
    """H3. `well` is open already; what does the first word to `hung` do to it?"""
    local, here = Buffer(MIB, b"\x01"), engine()
    assert here.transfer_sync_write(well, local.at, pointer, 1) == 0
    say(at="open")
    heard()
    threading.Thread(target=here.transfer_submit_write, args=(hung, local.at, pointer, 1), daemon=True).start()
    time.sleep(0.2)
    threading.Thread(target=lambda: say(code=here.transfer_sync_write(well, local.at, pointer, 1)), daemon=True).start()
    heard()


def probe_blocks(session: str) -> None:
    """H4 and H5."""
    here = engine()
    say(at="open")
    heard()
    began = time.monotonic()
    code = here.send_probe(session)
    say(code=code, took_s=time.monotonic() - began)
    heard()


def writes_to_an_heir(session: str, pointer: int) -> None:
    """H6. `session` passes from one process to another."""
    local, here = Buffer(MIB, b"\x01"), engine()
    say(code=here.transfer_sync_write(session, local.at, pointer, 1))
    heard()
    codes = [here.transfer_sync_write(session, local.at, pointer, 1) for _ in range(6)]
    say(codes=codes, probe=here.send_probe(session))
    heard()


def listens_everywhere() -> None:
    """H7."""
    import psutil

    here = engine()
    said = psutil.Process().net_connections("tcp")
    say(hosts=sorted(c.laddr.ip for c in said if c.status == psutil.CONN_LISTEN), port=here.get_rpc_port())
    heard()


def store_setup_freezes(master: str) -> None:
    """H8. A thread says every 0.1 s that the interpreter runs, until it does not."""
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    ticker = Ticker()
    say(at="open")
    began = time.monotonic()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", 16 * MIB, 16 * MIB, "tcp", "", master)
    say(code=code, took_s=time.monotonic() - began, frozen_s=ticker.end())


def destructor_freezes() -> None:
    """H9."""
    here, ticker = engine(), Ticker()
    time.sleep(0.05)
    del here
    say(frozen_s=ticker.end())


def asks_after_ticket_0() -> None:
    """H10."""
    here = engine()
    say(at="open")
    here.transfer_check_status(0)
    say(at="survived")


def registers_before_initialize() -> None:
    """H10."""
    from mooncake.engine import TransferEngine

    here, local = TransferEngine(), Buffer(4096, b"\x01")
    say(at="open")
    here.register_memory(local.at, 4096)
    say(at="survived")


def status_of_the_first_block_only() -> None:
    """H11. One small block and 31 large ones to itself, asked about by one ticket."""
    local, remote, here = Buffer(64 * MIB, b"\x01"), Buffer(64 * MIB, b"\x00"), engine()
    session = f"127.0.0.1:{here.get_rpc_port()}"
    here.register_memory(remote.at, 64 * MIB)
    assert here.transfer_sync_write(session, local.at, remote.at, 1) == 0
    sizes = [64] + [2 * MIB] * 31
    offsets = [n * 2 * MIB for n in range(32)]
    ticket = here.batch_transfer_async_write(
        session, [local.at + n for n in offsets], [remote.at + n for n in offsets], sizes
    )
    while (code := here.transfer_check_status(ticket)) == 0:
        pass
    landed = sum(remote.bytes[offset + size - 1] == b"\x01" for offset, size in zip(offsets, sizes, strict=True))
    say(code=code, landed=landed)
    heard()


def accepts_null_and_unmapped() -> None:
    """Section 2: no validation at all."""
    here = engine()
    say(codes=[here.register_memory(0, 4096), here.register_memory(0xDEAD000, 4096)])
    heard()


if __name__ == "__main__":
    die_with_parent()
    scenario: Callable[..., None] = globals()[sys.argv[1]]
    scenario(**json.loads(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
