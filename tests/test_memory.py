"""Arenas: memory that can be registered as one region and never dangles."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from pdctl.core.layout import Region
from pdctl.errors import BadField
from pdctl.memory import Arena


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
