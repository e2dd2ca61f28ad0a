"""
Lives that cannot be told apart: a process whose forks are real engines, one after another, with the same session, the
same data port, and memory at the same address. `python -m tests.faults.cradle`, driven by JSON lines.
MC_MIN_RPC_PORT and MC_MAX_RPC_PORT, which the engine reads once, must leave it two ports.

`live` forks one: {"pid": ..., "session": ..., "data_port": ...} once it listens, {} if its ports cannot be had. Whoever
asked kills it by its pid, at any moment. A fork takes milliseconds where a new process takes half a second, so the next
life stands at the address before anybody has noticed that the last one ended. Its memory is a file, so that it can be
read whatever befalls the life.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import mmap
import os
import signal
import sys
from typing import Any

import psutil
from mooncake.engine import TransferEngine

from pdctl.core.layout import Region
from pdctl.device.cpu import Cpu
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from tests.engine.processes import die_with_parent
from tests.faults.reuse import reuse_addresses

AT = 0x6000_0000_0000  # far from where the kernel puts anything by itself
_ATTEMPTS = 60  # an engine takes the two ports of its range in an order of its own, and a killed one needs milliseconds
_MAP_FIXED_NOREPLACE = 0x100000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def main() -> None:
    reuse_addresses()
    print(json.dumps({"at": AT}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(live(**asked) if asked.pop("do") == "live" else {}), flush=True)


def live(memory: str, rpc: int | None, kind: str) -> dict[str, Any]:
    """`rpc`: at which of the two ports its session must be."""
    for _ in range(_ATTEMPTS):
        bury()
        said, saying = os.pipe()
        pid = os.fork()
        if not pid:
            be_born(saying, memory, rpc, kind)
        os.close(saying)
        with os.fdopen(said) as words:
            told = words.readline()
        if told:
            return {"pid": pid, **json.loads(told)}
    return {}


def bury() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def be_born(saying: int, memory: str, rpc: int | None, kind: str) -> None:
    """The fork's whole life. Says nothing and ends if its ports are not the ones that are meant."""
    die_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(Exception):
        region = mapped(memory)
        if kind == "stock":
            stock(saying, region, rpc)
        else:
            asyncio.run(ours(saying, region, rpc))
    os._exit(0)


def mapped(memory: str) -> Region:
    file = os.open(memory, os.O_RDWR)
    nbytes = os.fstat(file).st_size
    got = _libc.mmap(AT, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED_NOREPLACE, file, 0)
    if got != AT:
        raise OSError(ctypes.get_errno(), "the address is not free")
    return Region(AT, nbytes)


def stock(saying: int, region: Region, rpc: int | None) -> None:
    engine = TransferEngine()
    code = engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    code = code or engine.register_memory(region.pointer, region.nbytes)
    if code == 0 and rpc in (None, engine.get_rpc_port()):
        tell(saying, engine.get_rpc_port())
        while True:
            signal.pause()
    os._exit(0)  # its destructor would take a second


async def ours(saying: int, region: Region, rpc: int | None) -> None:
    async with open_mooncake(MooncakeSettings(), Cpu()) as engine:
        at = int(engine.session.rpartition(":")[2])
        if rpc in (None, at):
            await engine.register(region)
            tell(saying, at)
            await asyncio.Event().wait()
        os._exit(0)


def tell(saying: int, rpc: int) -> None:
    listening = {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    (data_port,) = listening - {rpc}
    os.write(saying, json.dumps({"session": f"127.0.0.1:{rpc}", "data_port": data_port}).encode() + b"\n")
    os.close(saying)


if __name__ == "__main__":
    die_with_parent()
    main()
