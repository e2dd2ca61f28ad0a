"""
Several times its DRAM written into a store with SSD offload and read back, every object; and the same after its process
was killed.

`python -m tests.store.offload [TIMES] [SEGMENT_MIB] [KIB]` (8, 64, 1024) shows it with either kind of master. The ranks
are processes of their own: the wheel gives a directory back only with its process.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from pdctl.core.device import DeviceSpec
from pdctl.core.kvstore import KVStoreConfig, StoreRank
from pdctl.device.open import open_device
from pdctl.kvstore import open_store
from pdctl.memory import Arena
from pdctl.store.attachment import Attachment
from pdctl.store.base import Ints
from pdctl.store.patience import StorePatience
from tests.engine.processes import die_with_parent
from tests.store.master import Master, master

ON_EVICT = ("--enable_offload=true", "--offload_on_evict=true")
EAGER = ("--enable_offload=true",)
BATCH = 8


@dataclass(frozen=True)
class Size:
    segment: int
    object: int
    times: int

    @property
    def n(self) -> int:
        """Objects, `times` as much as the segment holds."""
        return self.times * self.segment // self.object


class Rank:
    """A process with a store that offloads; what it complains of goes to `said`."""

    def __init__(self, at: Master, directory: Path, size: Size, said: TextIO) -> None:
        arguments = [at.rpc, at.http, directory, size.segment, size.object]
        self._said = said
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.offload", "rank", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            preexec_fn=die_with_parent,
        )
        self._answer()  # it is there, and has opened nothing

    def open(self) -> dict[str, Any]:
        return self.ask("open", 0)

    def ask(self, what: str, n: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([what, n]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) and not line.startswith("{"):
            pass  # what it logs
        if not line:
            raise EOFError(f"the rank has ended with {self.process.wait()}: {self._last_words()}")
        told: dict[str, Any] = json.loads(line)
        return told

    def _last_words(self) -> str:
        self._said.seek(0)
        return self._said.read()[-4000:]


@contextmanager
def rank(at: Master, directory: Path, size: Size) -> Iterator[Rank]:
    """There, with nothing open yet: what takes seconds is behind it."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        made = Rank(at, directory, size, said)
        try:
            yield made
        finally:
            made.end()


def proof(size: Size, flags: tuple[str, ...], directory: Path) -> dict[str, Any]:
    """Write all, read all."""
    with master(*flags, "--default_kv_lease_ttl=500") as at, rank(at, directory, size) as one:
        one.open()
        wrote = one.ask("write", size.n)
        read = one.ask("read", size.n)
    on_disk = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return {**wrote, **read, "on_disk": on_disk, "of": size.n}


def killed_and_back(size: Size, directory: Path, *, ttl_s: int) -> dict[str, Any]:
    """Write all, die in the midst of one, come back at once, and read again when the master would have dropped
    everything."""
    flags = (*ON_EVICT, "--default_kv_lease_ttl=500", f"--client_ttl={ttl_s}")
    with master(*flags) as at, rank(at, directory, size) as again:
        with rank(at, directory, size) as one:
            one.open()
            wrote_first = one.ask("write", size.n)
        died = time.monotonic()
        tear(next(directory.rglob("*_o*")))
        again.open()
        waited_s = time.monotonic() - died
        first = again.ask("read", size.n)
        time.sleep(ttl_s + 2.0)
        later = again.ask("read", size.n)
        wrote = again.ask("write", size.n)
        last = again.ask("read", size.n)
    return {
        "wrote_first": wrote_first,
        "waited_s": waited_s,
        "first": first,
        "later": later,
        "wrote": wrote,
        "last": last,
    }


def tear(file: Path) -> None:
    """As a process leaves it that is killed over it, which now and then is so anyway."""
    os.truncate(file, file.stat().st_size // 2)


# --- the rank's own process


async def serve(rpc: int, http: int, directory: str, segment: int, nbytes: int) -> None:
    config = KVStoreConfig(
        f"127.0.0.1:{rpc}",
        local_hostname="127.0.0.1",
        protocol="tcp",
        master_metrics_port=http,
        global_segment_size=segment,
        enable_ssd_offload=True,
        ssd_offload_path=directory,
    )
    say(there=True)
    await asyncio.to_thread(sys.stdin.readline)
    at_once = StorePatience(rehearsal_s=0.0)
    async with (
        open_device(DeviceSpec.parse("cpu")) as device,
        open_store(config, StoreRank(), device, patience=at_once) as opened,
    ):
        with Arena(2 * BATCH * nbytes) as arena:
            await opened.store.register(arena.region)
            objects = Objects(opened.attachment, arena, nbytes)
            say(**opened.report.seconds)
            while line := await asyncio.to_thread(sys.stdin.readline):
                what, n = json.loads(line)
                await (objects.write(n) if what == "write" else objects.read(n))


class Objects:
    """Object i is bytes that only i gives."""

    def __init__(self, attachment: Attachment, arena: Arena, nbytes: int) -> None:
        self._attachment = attachment
        self._made = arena.array((BATCH, nbytes), np.uint8)
        self._back = arena.array((BATCH, nbytes), np.uint8)
        self._noise = np.random.default_rng(3).integers(0, 256, nbytes, np.uint8)
        self._sizes = np.full((BATCH, 1), nbytes, np.int64)

    async def write(self, n: int) -> None:
        """Each again until it is kept: with offload room is made about once a second."""
        began, dropped = time.monotonic(), 0
        for first in range(0, n, BATCH):
            missing = self._make(range(first, min(n, first + BATCH)))
            while missing:
                kept = await self._attachment.put_pages([f"o{i}" for i in missing], *self._at(self._made, missing))
                missing = [i for i, well in zip(missing, kept, strict=True) if not well]
                dropped += len(missing)
                if missing:
                    await asyncio.sleep(0.1)
        say(kept=n, write_s=time.monotonic() - began, dropped=dropped)

    async def read(self, n: int) -> None:
        began, hits, equal = time.monotonic(), 0, 0
        for first in range(0, n, BATCH):
            wanted = self._make(range(first, min(n, first + BATCH)))
            self._back[:] = 0
            found = await self._attachment.get_pages([f"o{i}" for i in wanted], *self._at(self._back, wanted))
            hits += sum(found)
            equal += sum(
                hit and bool(np.array_equal(self._back[i % BATCH], self._made[i % BATCH]))
                for i, hit in zip(wanted, found, strict=True)
            )
        say(hits=hits, equal=equal, read_s=time.monotonic() - began)

    def _make(self, numbers: range) -> list[int]:
        for i in numbers:
            self._made[i % BATCH] = self._noise
            self._made[i % BATCH].view(np.int64)[:: 4096 // 8] ^= i
        return list(numbers)

    def _at(self, array: np.ndarray[Any, np.dtype[np.uint8]], numbers: list[int]) -> tuple[Ints, Ints]:
        rows = np.array([array[i % BATCH].ctypes.data for i in numbers], np.int64)[:, None]
        return rows, self._sizes[: len(numbers)]


def say(**what: float) -> None:
    print(json.dumps(what), flush=True)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["rank"]:
        rpc, http, directory, segment, nbytes = arguments[1:]
        asyncio.run(serve(int(rpc), int(http), directory, int(segment), int(nbytes)))
        return 0
    times, segment_mib, kib = [int(given) for given in arguments] + [8, 64, 1024][len(arguments) :]
    size = Size(segment_mib << 20, kib << 10, times)
    for name, flags in (("--offload_on_evict", ON_EVICT), ("eager", EAGER)):
        with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
            print(name, proof(size, flags, Path(directory)), flush=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        print("killed and back", killed_and_back(size, Path(directory), ttl_s=10), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
