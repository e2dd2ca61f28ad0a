"""Arenas: memory that can be registered as one region and never dangles."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from pdctl.core.handover import Mapped, Memory, Store
from pdctl.core.layout import Region
from pdctl.errors import BadField
from pdctl.memory import Arena, map_shared


def test_an_arena_is_whole_zeroed_pages() -> None:
    with Arena(5000) as arena:
        assert arena.region.pointer % mmap.PAGESIZE == 0
        assert arena.region.nbytes == 2 * mmap.PAGESIZE
        assert not arena.array(2 * mmap.PAGESIZE, np.uint8).any()


def test_arrays_lie_inside_the_region_and_apart_from_each_other() -> None:
    with Arena(1 << 16) as arena:
        first = arena.array((3, 5), np.float32)
        second = arena.array(7, np.int64)
        spans = [Region(array.ctypes.data, array.nbytes) for array in (first, second)]
        assert all(span in arena.region for span in spans)
        assert spans[0].end <= spans[1].pointer
        assert spans[1].pointer % 64 == 0
        second[:] = -1
        assert not first.any()


def test_an_array_is_the_arenas_memory_and_no_copy() -> None:
    with Arena(4096) as arena:
        array = arena.array(1024, np.int32)
        assert array.ctypes.data == arena.region.pointer
        assert array.flags.writeable


def test_what_does_not_fit_is_refused_and_takes_nothing() -> None:
    with Arena(4096) as arena:
        with pytest.raises(BadField, match="shape"):
            arena.array(4097, np.uint8)
        assert arena.free == 4096
        arena.array(4096, np.uint8)
        assert arena.free == 0


def test_an_array_outlives_its_arenas_close() -> None:
    with Arena(4096) as arena:
        array = arena.array(4096, np.uint8)
    array[:] = 1
    assert array.sum() == 4096
    with pytest.raises(BadField, match="closed"):
        arena.array(1, np.uint8)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_arena_of_nothing_is_refused(nbytes: int) -> None:
    with pytest.raises(BadField, match="nbytes"):
        Arena(nbytes)


def test_a_shared_arena_is_the_same_bytes_for_whoever_maps_its_name(tmp_path: Path) -> None:
    for shared in (tmp_path / "kv", f"/pdctl-test-{os.getpid()}-arena"):
        with Arena(5000, shared=shared) as arena:
            array = arena.array(5000, np.uint8)
            array[:] = 7
            mapped = map_shared(arena.handed.memory, "memory.0", os.geteuid())
            assert mapped.region.nbytes == arena.region.nbytes == 2 * mmap.PAGESIZE
            assert mapped.region.pointer != arena.region.pointer
            assert mapped.region.pointer % mmap.PAGESIZE == 0
            ctypes.memset(mapped.region.pointer, 9, 5000)
            assert (array == 9).all()
            path = Path("/dev/shm", str(shared)[1:]) if isinstance(shared, str) else shared
            assert path.stat().st_mode & 0o777 == 0o600
        assert not path.exists()
        ctypes.memset(mapped.region.pointer, 8, 5000)  # the name is gone, the memory is not


def test_a_name_that_a_killed_process_left_is_taken_over_and_one_in_use_is_not(tmp_path: Path) -> None:
    (tmp_path / "kv").write_bytes(b"left by somebody")
    with Arena(4096, shared=tmp_path / "kv") as arena:
        assert not arena.array(4096, np.uint8).any()
        with pytest.raises(BadField, match="is held by another process: choose another name"):
            Arena(4096, shared=tmp_path / "kv")


def test_a_private_arena_cannot_be_handed_over() -> None:
    with Arena(4096) as arena, pytest.raises(BadField, match="make it with shared=NAME"):
        _ = arena.handed


def test_what_cannot_be_mapped_is_named(tmp_path: Path) -> None:
    kv = tmp_path / "kv"
    kv.write_bytes(bytes(8192))
    (tmp_path / "link").symlink_to(kv)
    os.mkfifo(tmp_path / "pipe")

    def refused(path: object, nbytes: int = 4096, offset: int = 0, store: Store = Store.FILE) -> str:
        with pytest.raises(BadField) as error:
            map_shared(Memory(store, str(path), nbytes, offset), "memory.3", None)
        return str(error.value)

    assert refused(tmp_path / "none") == (
        f"memory.3.path: {tmp_path}/none cannot be opened (No such file or directory): name memory that this agent sees"
    )
    assert "memory.3.path" in refused(tmp_path / "link")
    assert "is no plain file" in refused(tmp_path / "pipe")
    assert "cannot be opened (Is a directory)" in refused(tmp_path)
    assert "is relative" in refused("kv")
    assert refused(kv, 8193).startswith("memory.3.nbytes: ends at 8193, but ")
    assert refused(kv, 8192, 4096).startswith("memory.3.nbytes: ends at 12288, but ")
    assert refused(kv, 4096, 100) == "memory.3.offset: is 100: give a multiple of 4096"
    for name in ("/../tmp/kv", "/a/b", "/", "..", "x" * 256):
        assert "is no name of shared memory" in refused(name, store=Store.SHM)
    assert "memory.3.kind: is cuda_ipc, and no device is open here" in refused("ab", store=Store.CUDA_IPC)


def test_another_users_file_is_not_mapped_for_who_does_not_own_it(tmp_path: Path) -> None:
    (tmp_path / "kv").write_bytes(bytes(4096))
    with pytest.raises(BadField, match=f"belongs to user {os.geteuid()}, not to yours"):
        map_shared(Memory(Store.FILE, str(tmp_path / "kv"), 4096), "memory.0", os.geteuid() + 1)


def test_a_devices_memory_is_opened_by_who_can() -> None:
    given = Memory(Store.CUDA_IPC, "AAAA", 4096, device="GPU-1")
    opened = Mapped(Region(1 << 40, 4096), None)
    asked: list[tuple[Memory, str]] = []

    def open_shared(memory: Memory, field: str) -> Mapped:
        asked.append((memory, field))
        return opened

    assert map_shared(given, "memory.0", None, open_shared) is opened
    assert asked == [(given, "memory.0")]
