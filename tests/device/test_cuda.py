"""
CUDA through ctypes: calls, order, threads and errors, held against a driver in C that has the real signatures and no
device (libcuda.c). Its memory cannot be read by a processor, as a device's cannot.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdctl.core.device import HOST, DeviceSpec
from pdctl.core.handover import Memory, Store
from pdctl.core.layout import Region
from pdctl.device.cpu import Cpu
from pdctl.device.cuda import Cuda
from pdctl.device.open import open_device
from pdctl.errors import BadField, ConfigError, DeviceUnavailable
from pdctl.memory import Arena, map_shared
from tests.device.paper import UUIDS, Exporter, Paper, allocate, build, free, read, remove_memory, write

NBYTES = 1 << 16


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(library: Path, tmp_path: Path) -> Iterator[Paper]:
    """One of its own: the loader tells libraries apart by their files."""
    yield Paper(Path(shutil.copy(library, tmp_path)))
    remove_memory(os.getpid())


@pytest.fixture
def cuda(driver: Paper) -> Iterator[Cuda]:
    device = Cuda.opened(DeviceSpec.parse("cuda:0"), driver.load)
    yield device
    device.close()


@pytest.fixture
def exporter(driver: Paper) -> Iterator[Exporter]:
    running = Exporter(driver.path)
    yield running
    running.kill()


async def test_opening_initialises_the_driver_and_sets_the_device_on_this_thread(driver: Paper) -> None:
    async with open_device("cuda:1", load=driver.load) as device:
        assert str(device.spec) == "cuda:1"
        assert device.uuid == UUIDS[1]
        assert [call.split()[0] for call in driver.seen()] == ["cuInit", "retain", "set"]
        assert driver.has_context()
        assert driver.library.fake_retained(1) == 1
    assert driver.library.fake_retained(1) == 0


async def test_closing_gives_the_thread_back_what_it_had(driver: Paper) -> None:
    """Another library's device on this thread stays its device; where there was none, none dangles."""
    before = driver.context()
    async with open_device("cuda:1", load=driver.load) as torch:
        hers = driver.context()
        async with open_device("cuda:0", load=driver.load):
            assert driver.context() not in (before, hers)
        assert driver.context() == hers
        torch.bind()
    assert driver.context() == before


async def test_a_device_is_found_by_its_uuid_whatever_its_number(driver: Paper) -> None:
    for name in (UUIDS[1], UUIDS[1].replace("GPU", "MIG")):  # a part of a device, as nvidia-smi calls it
        async with open_device(f"cuda:{name}", load=driver.load) as device:
            assert str(device.spec) == "cuda:1"


def test_each_thread_has_the_device_once_it_has_bound_it_and_not_before(cuda: Cuda, driver: Paper) -> None:
    seen: list[bool] = []

    def work() -> None:
        seen.append(driver.has_context())
        cuda.bind()
        cuda.bind()
        seen.append(driver.has_context())

    thread = threading.Thread(target=work, name="mover")
    thread.start()
    thread.join()
    assert seen == [False, True]


def test_naming_and_opening_need_no_bound_thread_and_leave_it_as_it_was(cuda: Cuda, driver: Paper) -> None:
    region, found = allocate(cuda.driver, NBYTES), list[object]()

    def work() -> None:
        found.append(cuda.share(region).memory.offset)
        found.append(driver.has_context())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0, False]
    free(cuda.driver, region)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "cuda:2",
            "cuda:2 is not there: this process sees 2 CUDA devices, numbered from 0: check CUDA_VISIBLE_DEVICES",
        ),
        (f"cuda:{UUIDS[0].replace('a0', 'ff')}", f"this process sees {UUIDS[0]}, {UUIDS[1]}"),
    ],
)
async def test_a_device_that_is_not_there_is_an_operators_error_with_what_is(
    driver: Paper, spec: str, says: str
) -> None:
    with pytest.raises(DeviceUnavailable, match=says):
        async with open_device(spec, load=driver.load):
            pass


async def test_no_driver_says_what_to_install() -> None:
    def load(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(DeviceUnavailable, match=r"libcuda\.so\.1 is not on this host.*install the NVIDIA driver.*--g"):
        async with open_device("cuda:0", load=load):
            pass


async def test_an_old_driver_says_which_call_it_lacks() -> None:
    with pytest.raises(DeviceUnavailable, match=r"has no cuDeviceGetUuid_v2: install a driver for CUDA 11\.4"):
        async with open_device("cuda:0", load=lambda _: Old()):
            pass


class Old:
    """A library with the calls of a driver before 11.4."""

    def __getattr__(self, name: str) -> object:
        if name == "cuDeviceGetUuid_v2":
            raise AttributeError(name)
        return lambda *_: 0


@pytest.mark.parametrize(
    ("code", "says"), [(100, "the driver sees no device"), (802, "fabricmanager"), (7, "nvidia-smi")]
)
async def test_a_driver_that_does_not_start_says_why(driver: Paper, code: int, says: str) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            return (lambda *_: code) if name == "cuInit" else getattr(driver.library, name)

    with pytest.raises(DeviceUnavailable, match=rf"cuda:0 cannot be opened \(cuInit: .*\({code}\)\): .*{says}"):
        async with open_device("cuda:0", load=lambda _: Broken()):
            pass


# --- whose memory


def test_memory_is_known_by_its_device_and_the_host_by_what_a_processor_can_read(cuda: Cuda, driver: Paper) -> None:
    other = Cuda.opened(DeviceSpec.parse("cuda:1"), driver.load)
    there = allocate(other.driver, NBYTES)
    cuda.bind()
    here = allocate(cuda.driver, NBYTES)
    with Arena(NBYTES) as arena:
        assert cuda.where(arena.region) is HOST
        assert cuda.where(here) == cuda.spec
        assert cuda.where(there) == other.spec
        first, last = sorted((here.pointer, arena.region.pointer))
        with pytest.raises(BadField, match=r"begins on .* and ends on .*: give each its own region"):
            cuda.where(Region(first, last - first + 1))
    with pytest.raises(BadField, match="is no memory that this host's processor can read"):
        Cpu().where(here)
    other.close()


def test_an_npus_protocol_moves_no_cuda_memory(cuda: Cuda) -> None:
    cuda.check_protocol("tcp")
    cuda.check_protocol("nvlink_intra")
    with pytest.raises(ConfigError, match=r"engine\.protocol is ascend but the device is cuda:0"):
        cuda.check_protocol("ascend")


# --- between processes


def shared(said: dict[str, Any]) -> Memory:
    assert said["kind"] == "cuda_ipc"
    return Memory(Store.CUDA_IPC, said["handle"], said["nbytes"], said["offset"], said["device"])


def test_what_a_process_names_another_opens_at_its_offset_and_both_see_the_same_bytes(
    cuda: Cuda, driver: Paper, exporter: Exporter
) -> None:
    exporter.ask(allocate=NBYTES)
    memory = shared(exporter.ask(do="share", offset=4096, nbytes=8192))
    assert (memory.offset, memory.nbytes, memory.device) == (4096, 8192, UUIDS[0])
    assert len(base64.b64decode(memory.name)) == 64
    mapped = map_shared(memory, "memory.0", None, cuda.open_shared)
    assert read(cuda.driver, mapped.region) == bytes(n % 251 for n in range(4096, 4096 + 8192))
    write(cuda.driver, mapped.region.pointer, b"\x07" * 8192)
    assert exporter.ask(do="read", offset=4096, nbytes=8192) == "07" * 8192
    assert cuda.where(mapped.region) == cuda.spec


def test_an_allocation_is_opened_once_however_many_parts_are_asked_for_and_closed_with_the_device(
    driver: Paper, exporter: Exporter
) -> None:
    """A second opening of one allocation in a process gives the same memory, and one closing takes it from both."""
    cuda = Cuda.opened(DeviceSpec.parse("cuda:0"), driver.load)
    exporter.ask(allocate=NBYTES)
    parts = [shared(exporter.ask(do="share", offset=at, nbytes=4096)) for at in (0, 4096, 12288)]
    mapped = [cuda.open_shared(part, f"memory.{n}") for n, part in enumerate(parts)]
    assert [each.region.pointer - mapped[0].region.pointer for each in mapped] == [0, 4096, 12288]
    assert [call.split()[0] for call in driver.seen()].count("open") == 1
    assert driver.library.fake_open_allocations() == 1
    cuda.close()
    assert driver.library.fake_open_allocations() == 0


def test_what_cannot_be_opened_is_named_with_its_reason(cuda: Cuda, driver: Paper, exporter: Exporter) -> None:
    exporter.ask(allocate=NBYTES)
    good = shared(exporter.ask(do="share", offset=4096, nbytes=4096))

    def refused(**changes: Any) -> str:
        with pytest.raises(BadField) as error:
            cuda.open_shared(replace(good, **changes), "memory.2")
        return str(error.value)

    assert refused(device=UUIDS[1]) == (f"memory.2.device: is {UUIDS[1]}, and cuda:0 is {UUIDS[0]}: open that device")
    assert refused(nbytes=NBYTES).startswith(
        f"memory.2.nbytes: ends at {NBYTES + 4096}, but the allocation has {NBYTES}"
    )
    assert refused(name="AAAA").startswith("memory.2.handle: has 3 bytes: give the 64 of cudaIpcMemHandle_t")
    assert refused(name="not base64").startswith("memory.2.handle: is no base64")
    exporter.kill()
    assert cuda.open_shared(good, "memory.2").region.nbytes == 4096  # it was opened before, and stays
    cuda.close()
    assert "the process that gave it has ended, has freed the memory" in refused()


def test_a_process_does_not_open_its_own_memory(cuda: Cuda) -> None:
    """The driver answers CUDA_ERROR_INVALID_CONTEXT there, which says nothing to anybody."""
    region = allocate(cuda.driver, NBYTES)
    memory = cuda.share(region).memory
    with pytest.raises(BadField, match=r"memory\.0\.handle: is of this process's own memory: reach it by its pointer"):
        cuda.open_shared(memory, "memory.0")
    cuda._shared.clear()  # as if another library had exported it
    with pytest.raises(BadField, match=r"CUDA_ERROR_INVALID_CONTEXT.*this process's own memory"):
        cuda.open_shared(memory, "memory.0")
    free(cuda.driver, region)


def test_what_cannot_be_shared_is_named_with_how_to_allocate_it(cuda: Cuda, driver: Paper) -> None:
    region = allocate(cuda.driver, NBYTES)
    with pytest.raises(BadField):  # what lies behind it is nobody's, or another's
        cuda.share(Region(region.pointer, NBYTES * 2))
    driver.library.fake_not_shareable(region.pointer)
    with pytest.raises(BadField, match=r"not allocated by cudaMalloc\): allocate it with cudaMalloc \(PyTorch: "):
        cuda.share(region)
    with Arena(4096) as arena, pytest.raises(BadField, match="is host memory: hand it over by its name"):
        cuda.share(arena.region)
    free(cuda.driver, region)


def test_the_body_of_a_handover_names_device_memory_in_base64(cuda: Cuda) -> None:
    region = allocate(cuda.driver, NBYTES)
    body = json.loads(json.dumps(cuda.share(Region(region.pointer + 256, 512)).memory.to_body()))
    assert body == {"kind": "cuda_ipc", "handle": body["handle"], "nbytes": 512, "offset": 256, "device": UUIDS[0]}
    free(cuda.driver, region)
