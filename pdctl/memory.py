"""
Where KV bytes live in this process: one big page-aligned arena, cut into numpy arrays; or memory of another process,
mapped here by its name.

Registering is quadratic in the number of regions (50 s for 30,000, MOONCAKE_FACTS 2), so an arena is registered as one
region, never page by page. Nothing here knows an engine, or a device: who can open a device's memory is asked to.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pdctl.core.handover import Handed, Mapped, Memory, Store
from pdctl.core.layout import Region
from pdctl.errors import BadField

_ALIGNMENT = 64  # a cache line: no two arrays of an arena share one
_SHM = Path("/dev/shm")  # noqa: S108  where Linux keeps what shm_open names (shm_overview(7))


OpenShared = Callable[[Memory, str], Mapped]
"""Opens a device's memory by its IPC handle (Device.open_shared). Raises BadField below the field that it is given."""


class Arena:
    """`nbytes` of zeroed anonymous memory, rounded up to whole pages; a context manager.

    Private to this process. The memory goes back to the system when the arena is closed and the last array cut from it
    is gone, whichever comes later: no array can ever dangle.
    """

    def __init__(self, nbytes: int, *, shared: str | Path | None = None) -> None:
        """`shared`: not private, but named for another process to map: a Path is a file in a directory that both see, a
        text the name of POSIX shared memory. What a killed process left there is replaced, what one holds is not."""
        if nbytes <= 0:
            raise BadField("nbytes", f"is {nbytes}: an arena needs at least one byte")
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._file = None if shared is None else _File(shared, size)
        fd, flags = (-1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if self._file is None else (self._file.fd, 0)
        self._map = mmap.mmap(fd, size, flags=flags or mmap.MAP_SHARED)
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._map, dtype=np.uint8)
        self._region = Region(self._bytes.ctypes.data, size)
        self._taken = 0

    @property
    def region(self) -> Region:
        """All of it: what to register."""
        return self._region

    @property
    def handed(self) -> Handed:
        """All of it, by its name: what to hand over to the mover in another process."""
        if self._file is None:
            raise BadField("arena", "is private to this process: make it with shared=NAME to hand it over")
        return Handed(Memory(self._file.store, self._file.name, self._region.nbytes), self._region)

    @property
    def free(self) -> int:
        """Bytes that no array has been cut from yet."""
        return self._region.nbytes - self._taken

    def array(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A zeroed array of the next free bytes, at a multiple of 64."""
        if self._bytes is None:
            raise BadField("arena", "is closed: cut arrays while it is open")
        kind = np.dtype(dtype)
        nbytes = kind.itemsize * (shape if isinstance(shape, int) else math.prod(shape))
        start = -(-self._taken // _ALIGNMENT) * _ALIGNMENT
        if start + nbytes > self._region.nbytes:
            raise BadField("shape", f"{shape} of {kind} is {nbytes} bytes, {self.free} are left: make a larger arena")
        self._taken = start + nbytes
        return self._bytes[start : start + nbytes].view(kind).reshape(shape)

    def close(self) -> None:
        self._bytes = None
        with contextlib.suppress(BufferError):  # arrays still look at it; the last of them takes it along
            self._map.close()
        if self._file is not None:
            self._file.remove()
            self._file = None

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _File:
    """A new file of `nbytes` under a name, locked for as long as its maker lives."""

    def __init__(self, shared: str | Path, nbytes: int) -> None:
        self.store = Store.FILE if isinstance(shared, Path) else Store.SHM
        self.name = str(shared)
        self._path = _path(self.store, self.name, "shared")
        self.fd = self._made()
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self.fd, 0, nbytes)  # memory that is not there kills whoever touches it first (SIGBUS)
        except OSError as error:
            self.remove()
            raise BadField("nbytes", f"{nbytes} are not to be had at {self._path} ({error.strerror})") from error

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self.fd)

    def _made(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            self._remove_a_dead_ones()
            return self._made()
        except OSError as error:
            raise BadField(
                "shared", f"{self._path} cannot be made ({error.strerror}): name a place that can be written"
            ) from error

    def _remove_a_dead_ones(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._path.unlink(missing_ok=True)
        except BlockingIOError:
            raise BadField("shared", f"{self._path} is held by another process: choose another name") from None
        finally:
            os.close(fd)


def map_shared(memory: Memory, field: str, owner: int | None, open_shared: OpenShared | None = None) -> Mapped:
    """Map another process's memory here; what either writes, both see. Bytes on their way from peers come whether an
    engine is open or not (MOONCAKE_FACTS H12): whoever has registered it keeps it until the process ends.

    `owner`: whose file it must be; None where who asks could open it as well as we can. Raises BadField with the path
    of what is wrong below `field`.
    """
    if memory.store is Store.CUDA_IPC:
        if open_shared is None:
            raise BadField(f"{field}.kind", "is cuda_ipc, and no device is open here: hand over memory of the host")
        return open_shared(memory, field)
    named = f"{field}.{'name' if memory.store is Store.SHM else 'path'}"
    path = _path(memory.store, memory.name, named)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BadField(named, f"{path} cannot be opened ({error.strerror}): name memory that this agent sees") from None
    try:
        _check(os.fstat(fd), memory, field, named, owner)
        mapped = mmap.mmap(fd, memory.nbytes, flags=mmap.MAP_SHARED, offset=memory.offset)
    except OSError as error:
        raise BadField(named, f"{path} cannot be mapped ({error.strerror}): check the limits of memory here") from error
    finally:
        os.close(fd)
    seen = np.frombuffer(mapped, dtype=np.uint8)
    return Mapped(Region(seen.ctypes.data, memory.nbytes), seen)


def _check(found: os.stat_result, memory: Memory, field: str, named: str, owner: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise BadField(named, f"{memory.name} is no plain file: name shared memory, or a file in a memory volume")
    if owner is not None and found.st_uid != owner:
        raise BadField(named, f"{memory.name} belongs to user {found.st_uid}, not to yours ({owner}): name your own")
    if memory.offset % mmap.ALLOCATIONGRANULARITY:
        raise BadField(f"{field}.offset", f"is {memory.offset}: give a multiple of {mmap.ALLOCATIONGRANULARITY}")
    if memory.offset + memory.nbytes > found.st_size:
        end = memory.offset + memory.nbytes
        raise BadField(f"{field}.nbytes", f"ends at {end}, but {memory.name} has {found.st_size} bytes: give its size")


def _path(store: Store, name: str, field: str) -> Path:
    if store is Store.FILE:
        if not name.startswith("/"):
            raise BadField(field, f"{name} is relative: give the whole path")
        return Path(name)
    bare = name.removeprefix("/")
    if not bare or "/" in bare or bare in (".", "..") or len(bare) > 255:
        raise BadField(field, f"{name!r} is no name of shared memory: give /name, without a second slash")
    return _SHM / bare
