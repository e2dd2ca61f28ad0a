"""
A CUDA driver in C without a device (libcuda.c), built where a test wants it, and what a test asks of it beside pdctl.

`python -m tests.device.paper LIBRARY` is a process with memory on device 0, driven by JSON lines.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdctl import logs
from pdctl.core.device import DeviceSpec
from pdctl.core.layout import Region
from pdctl.device.cuda import LIBRARY, Cuda, Driver
from pdctl.logs import LogSettings
from tests.engine.processes import die_with_parent

SOURCE = Path(__file__).with_name("libcuda.c")
UUIDS = ["GPU-" + "-".join(f"a{n}" * width for width in (4, 2, 2, 2, 6)) for n in range(2)]


class Paper:
    """The built library. `load` stands in for ctypes.CDLL, so that each test has a driver of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.fake_seen.restype = ctypes.c_char_p
        self.library.fake_not_shareable.argtypes = (ctypes.c_uint64,)

    def load(self, name: str) -> Any:
        assert name == LIBRARY
        return self.library

    def seen(self) -> list[str]:
        """`call thread`, in order."""
        return str(self.library.fake_seen().decode()).splitlines()

    def context(self) -> int | None:
        """The calling thread's."""
        context = ctypes.c_void_p()
        assert self.library.cuCtxGetCurrent(ctypes.byref(context)) == 0
        return context.value

    def has_context(self) -> bool:
        return self.context() is not None


def build(folder: Path) -> Path:
    """The library. Skips where nothing here can compile C."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler here to build the driver without a device")
    path = folder / LIBRARY
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(path), str(SOURCE), "-lrt", "-lpthread"]
    subprocess.run(command, check=True, timeout=60)
    return path


def remove_memory(pid: int) -> None:
    """What a process has not freed; a killed one could not."""
    for left in Path("/dev/shm").glob(f"pdctl-fake-gpu-{pid}-*"):
        left.unlink(missing_ok=True)


def allocate(driver: Driver, nbytes: int) -> Region:
    pointer = ctypes.c_uint64()
    driver("cuMemAlloc_v2", ctypes.byref(pointer), nbytes)
    return Region(pointer.value, nbytes)


def free(driver: Driver, region: Region) -> None:
    driver("cuMemFree_v2", region.pointer)


def write(driver: Driver, pointer: int, data: bytes) -> None:
    driver("cuMemcpyHtoD_v2", pointer, data, len(data))


def read(driver: Driver, region: Region) -> bytes:
    data = ctypes.create_string_buffer(region.nbytes)
    driver("cuMemcpyDtoH_v2", data, region.pointer, region.nbytes)
    return data.raw


class Exporter:
    """A process that has memory on device 0 and names it."""

    def __init__(self, library: Path | str) -> None:
        command = [sys.executable, "-m", "tests.device.paper", str(library)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **what: Any) -> Any:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        print(json.dumps(what), file=self.child.stdin, flush=True)
        return json.loads(self.child.stdout.readline())

    def kill(self) -> None:
        self.child.kill()
        self.child.communicate()
        remove_memory(self.child.pid)


def main(library: str) -> None:
    device = Cuda.opened(DeviceSpec.parse("cuda:0"), lambda _: ctypes.CDLL(library))
    whole: Region | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "allocate" in asked:
            whole = allocate(device.driver, asked["allocate"])
            write(device.driver, whole.pointer, bytes(n % 251 for n in range(whole.nbytes)))
            print(json.dumps({}), flush=True)
            continue
        assert whole is not None
        part = Region(whole.pointer + asked["offset"], asked["nbytes"])
        said = device.share(part).memory.to_body() if asked["do"] == "share" else read(device.driver, part).hex()
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    die_with_parent()
    logs.configure(LogSettings())
    main(sys.argv[1])
