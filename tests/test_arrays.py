"""Tensors and arrays as pools: by numpy's DLPack, and by objects that speak torch's way and CUDA's array interface."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pdctl.arrays import pool_of, region_of
from pdctl.core.address import Endpoint
from pdctl.core.comparing import Checksum
from pdctl.core.device import HOST, DeviceSpec
from pdctl.core.layout import Pool, RankPools, Region
from pdctl.core.sums import Spans
from pdctl.core.transfer import RoomTimeouts
from pdctl.device.cpu import Cpu
from pdctl.device.cuda import Cuda
from pdctl.engine.checksums import sums
from pdctl.errors import BadField, ConfigError
from pdctl.metrics import Metrics
from pdctl.receiver import Receiver
from pdctl.sender import Sender
from tests.device.paper import Paper, allocate, build

CUDA = DeviceSpec.parse("cuda:0")
FAR = 0x7000_0000_0000


class Card(Cpu):
    """A device whose memory begins at FAR."""

    @property
    def spec(self) -> DeviceSpec:
        return CUDA

    def where(self, region: Region) -> DeviceSpec:
        return CUDA if region.pointer >= FAR else HOST


class Interface:
    """What speaks CUDA's array interface, and nothing else."""

    def __init__(self, pointer: int = FAR, shape: tuple[int, ...] = (8, 4), typestr: str = "<f2", **more: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (pointer, False),
            "version": 3,
            **more,
        }


class OnlyDlpack:
    """An array by its DLPack alone."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array

    def __dlpack__(self, **given: Any) -> object:
        return self._array.__dlpack__(**given)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class Device:
    def __init__(self, kind: str, index: int | None) -> None:
        self.type, self.index = kind, index

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


class Tensor:
    """A tensor as torch's is seen from outside: it wants a gradient, so that DLPack would refuse it."""

    layout = "torch.strided"

    def __init__(
        self, pointer: int, shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int, device: Device
    ) -> None:
        self.shape, self._stride, self._itemsize, self._pointer, self.device = shape, stride, itemsize, pointer, device

    def data_ptr(self) -> int:
        return self._pointer

    def element_size(self) -> int:
        return self._itemsize

    def stride(self) -> tuple[int, ...]:
        return self._stride

    def __dlpack__(self) -> object:
        raise RuntimeError("Can't export tensors that require gradient")


def test_numpy_arrays_are_pools_by_their_dlpack() -> None:
    arrays = [np.zeros((16, 4, 8), np.float16) for _ in range(3)]
    pool = pool_of(Cpu(), arrays)
    assert pool == Pool(tuple(array.ctypes.data for array in arrays), (64,) * 3, 16)
    assert pool.on is HOST
    assert pool_of(Cpu(), [OnlyDlpack(array) for array in arrays]) == pool


def test_an_offset_into_a_base_is_counted() -> None:
    base = np.zeros(100, np.int32)
    part = base[10:90].reshape(20, 4)
    assert region_of(Cpu(), part) == Region(base.ctypes.data + 40, 320)


def test_a_pool_keeps_its_arrays_alive_and_so_do_its_regions_and_no_longer() -> None:
    class Owner(np.ndarray):
        pass

    array = np.zeros((4, 8), np.uint8).view(Owner)
    gone = weakref.ref(array)
    pools = RankPools(pool_of(Cpu(), [array]), Pool((1,), (1,), 1)).placed(lambda _: HOST)
    regions = [region_of(Cpu(), array), *pools.kv.regions()]
    del array, pools
    gc.collect()
    assert gone() is not None
    regions.pop(0)
    gc.collect()
    assert gone() is not None
    regions.clear()
    gc.collect()
    assert gone() is None


def test_a_capsule_that_nobody_consumed_gives_back_what_it_holds() -> None:
    base = np.zeros((4, 8), np.uint8)
    inner = weakref.ref(base)
    pool = pool_of(Cpu(), [OnlyDlpack(base)])
    del base
    gc.collect()
    assert inner() is not None
    del pool
    gc.collect()
    assert inner() is None


def test_the_cuda_array_interface_is_a_pool_on_the_device_that_its_pointer_is_of() -> None:
    pool = pool_of(Card(), [Interface(), Interface(FAR + 4096, strides=(8, 2))])
    assert (pool.pointers, pool.item_lens, pool.n_items) == ((FAR, FAR + 4096), (8, 8), 8)
    assert pool.on == CUDA


def test_a_tensor_is_a_pool_by_its_methods() -> None:
    pool = pool_of(Card(), [Tensor(FAR, (8, 2, 4), (8, 4, 1), 1, Device("cuda", 0))])
    assert (pool.pointers, pool.item_lens, pool.n_items, pool.on) == ((FAR,), (8,), 8, CUDA)
    with pytest.raises(BadField, match=r"pool\.0: says that it is on cuda:1, and its pointer is of cuda:0"):
        pool_of(Card(), [Tensor(FAR, (8,), (1,), 1, Device("cuda", 1))])
    with pytest.raises(BadField, match=r"pool\.0: is on mps:None: give a tensor of cpu, cuda or npu"):
        pool_of(Card(), [Tensor(FAR, (8,), (1,), 1, Device("mps", None))])


@pytest.fixture
def paper(tmp_path: Path) -> Iterator[Cuda]:
    device = Cuda.opened(CUDA, Paper(build(tmp_path)).load)
    yield device
    device.close()


def test_memory_of_a_device_is_found_by_its_driver(paper: Cuda) -> None:
    there = allocate(paper.driver, 4096)
    assert pool_of(paper, [Interface(there.pointer, (8, 256))]).on == CUDA
    assert pool_of(paper, [np.zeros((8, 4))]).on is HOST
    with pytest.raises(BadField, match="is no memory that this host's processor can read"):
        pool_of(Cpu(), [Interface(there.pointer, (8, 256))])
    with pytest.raises(BadField, match=r"says that it is on cuda:0, and its pointer is of cpu"):
        pool_of(paper, [Tensor(np.zeros(8).ctypes.data, (8,), (1,), 1, Device("cuda", 0))])


def read_only() -> npt.NDArray[Any]:
    array = np.zeros((4, 4))
    array.flags.writeable = False
    return array


WRONG: list[tuple[str, object, str]] = [
    ("a column", np.zeros((8, 4))[:, :2], r"has strides of \(32, 8\) bytes: it is no one run"),
    ("every other row", np.zeros((8, 4))[::2], "no one run of bytes"),
    ("backwards", np.zeros((8, 4))[::-1], "no one run of bytes"),
    ("Fortran's order", np.zeros((8, 4), order="F"), "no one run of bytes"),
    ("repeated", np.broadcast_to(np.zeros(4), (8, 4)), "gives no DLPack"),
    ("read-only", read_only(), "gives no DLPack"),
    ("objects", np.array([[None]]), "gives no DLPack"),
    ("a number", np.array(3.0), r"has the shape \(\): give at least one row"),
    ("no rows", np.zeros((0, 4)), r"has the shape \(0, 4\)"),
    ("a list", [1, 2], "is list: give a torch tensor, or what speaks"),
    ("a view of a tensor", Tensor(FAR, (8, 4), (8, 1), 2, Device("cuda", 0)), r"strides of \(16, 2\) bytes"),
    ("no memory", Tensor(0, (8, 4), (4, 1), 2, Device("cuda", 0)), "has no memory"),
    ("a part of a device's", Interface(strides=(16, 2)), "no one run of bytes"),
    ("a device's, read-only", Interface(data=(FAR, True)), "is read-only"),
    ("masked", Interface(mask=Interface()), "masked or of objects"),
    ("a broken interface", Interface(typestr="f"), "cannot be read"),
]


@pytest.mark.parametrize(("array", "says"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_cannot_be_a_pool_is_refused_by_name(array: object, says: str) -> None:
    with pytest.raises(BadField, match=rf"kv\.0: .*{says}"):
        pool_of(Card(), [array], "kv")


def test_a_sparse_tensor_and_a_foreign_device_are_refused() -> None:
    sparse = Tensor(FAR, (8,), (1,), 1, Device("cuda", 0))
    sparse.layout = "torch.sparse_coo"
    with pytest.raises(BadField, match=r"layout torch\.sparse_coo: give a dense tensor"):
        pool_of(Card(), [sparse])

    class Vulkan(OnlyDlpack):
        def __dlpack_device__(self) -> tuple[int, int]:
            return (7, 0)

    with pytest.raises(BadField, match="DLPack's type 7"):
        pool_of(Card(), [Vulkan(np.zeros(4))])


def test_the_entries_of_a_pool_fit_each_other() -> None:
    with pytest.raises(BadField, match=r"pool\.1: has 4 rows, and pool\.0 8"):
        pool_of(Cpu(), [np.zeros((8, 4)), np.zeros((4, 4))])
    with pytest.raises(BadField, match="is on cpu and cuda:0: keep all entries of a pool on one device"):
        pool_of(Card(), [np.zeros((8, 4)), Interface()])
    with pytest.raises(BadField, match="has no arrays"):
        pool_of(Cpu(), [])


def test_what_the_hosts_processor_would_have_to_read_is_refused_for_a_devices_pool() -> None:
    here, there = Pool((1,), (8,), 4), Pool((FAR,), (8,), 4, CUDA)
    RankPools(here, here).check_summed_here()
    for pools, what in (
        (RankPools(there, here), "kv"),
        (RankPools(here, there), "aux"),
        (RankPools(here, here, states=(here, there)), r"states\.1"),
    ):
        with pytest.raises(ConfigError, match=rf"room\.checksum is on, and the {what} pool is on cuda:0"):
            pools.check_summed_here()
    with pytest.raises(BadField, match=r"aux: is on cuda:0.*keep the aux buffers in host memory"):
        RankPools(here, there).check_aux_written_here()
    RankPools(there, here).check_aux_written_here()


def test_pools_are_placed_by_who_knows_and_one_pool_is_on_one_device() -> None:
    pools = RankPools(Pool((FAR, FAR + 32), (8, 8), 4), Pool((64,), (8,), 4))
    placed = pools.placed(Card().where)
    assert (placed.kv.on, placed.aux.on) == (CUDA, HOST)
    with pytest.raises(BadField, match="kv: has entries on cpu and cuda:0"):
        RankPools(Pool((FAR, 64), (8, 8), 4), pools.aux).placed(Card().where)


def test_a_devices_pool_is_never_summed_by_the_host() -> None:
    """A pool that says nothing of its device would end the process (SIGSEGV); one that says it is refused here too."""
    spans = Spans(np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, 8, np.int64))
    with pytest.raises(ConfigError, match="a pool on cuda:0 cannot be summed"):
        sums(Pool((FAR,), (8,), 4, CUDA), np.zeros(1, np.int64), spans)


@pytest.mark.parametrize("aux_on", [HOST, CUDA])
async def test_a_rank_with_checksums_or_aux_rows_on_a_device_is_refused_before_it_serves(aux_on: DeviceSpec) -> None:
    pools = RankPools(Pool((FAR,), (8,), 4, CUDA), Pool((64,), (8,), 4, aux_on))
    timeouts = RoomTimeouts(checksum=Checksum.OFFERED)
    with pytest.raises((ConfigError, BadField), match="is on cuda:0"):
        receiver(pools, timeouts)
    with pytest.raises(ConfigError, match=r"room\.checksum is on, and the kv pool is on cuda:0"):
        Sender(None, None, pools, 0, None, timeouts, time.monotonic, Metrics())  # type: ignore[arg-type]
    if aux_on.is_host:
        receiver(pools, RoomTimeouts())
        return
    with pytest.raises(BadField, match="aux: is on cuda:0"):
        receiver(pools, RoomTimeouts())


def receiver(pools: RankPools, timeouts: RoomTimeouts) -> Receiver:
    reply = Endpoint("127.0.0.1", 1)
    return Receiver("127.0.0.1:1", _nowhere, reply, pools, 0, 1, timeouts, time.monotonic, Metrics())


async def _nowhere(to: Endpoint, frames: object) -> None:
    raise AssertionError
