"""
Real memory of a real device, between real processes, byte for byte: what `./dev gpu` runs on a machine that has one.

`./dev gpu --rehearse` runs the same on a driver of paper (tests/device/libcuda.c): real processes, Mooncake's real CUDA
wheel, and memory that no processor can read, but nothing of the hardware.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pdctl.core.device import DeviceSpec
from pdctl.core.handover import Memory, Store
from pdctl.device.cpu import Cpu
from pdctl.device.cuda import LIBRARY, Cuda
from pdctl.errors import BadField
from tests.agents import agent
from tests.device.paper import Exporter, allocate, free, read, remove_memory, write
from tests.engine.processes import Child
from tests.service import service

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

CHUNKS = [[5, 3, 9], [12], [60, 61, 62, 2]]
SENT = [page for chunk in CHUNKS for page in chunk]
NAMED = [40, 41, 7, 8, 63, 0, 30, 31]


@pytest.fixture
def cuda(gpu: str) -> Iterator[Cuda]:
    device = Cuda.opened(DeviceSpec.parse(gpu), ctypes.CDLL)
    yield device
    device.close()


def rank(stack: ExitStack, **given: Any) -> Child:
    child = stack.enter_context(Child("tests.gpu.rank", json.dumps(given)))
    stack.callback(remove_memory, child.pid)
    return child


# --- two processes, one device


@pytest.mark.parametrize("way", ["node", "agent"])
async def test_pages_move_between_pools_of_two_processes_on_one_device(gpu: str, tmp_path: Path, way: str) -> None:
    with ExitStack() as stack:
        registry = stack.enter_context(service(tmp_path / "registry.log", "--journal", "memory:"))
        ranks = []
        for role in ("prefill", "decode"):
            given = {"role": role, "way": way, "registry": registry.url, "device": gpu, "shared": str(tmp_path / role)}
            if way == "agent":
                side = stack.enter_context(agent(tmp_path / f"{role}-agent", "--registry", registry.url))
                given["socket"] = str(side.socket)
            ranks.append(rank(stack, **given))
        for each in ranks:
            assert "session" in (opened := await each.ask("open")), opened
        sending, receiving = ranks
        assert sending.ask_now("registered") == {}
        for room in (11, 12):
            told, found = await asyncio.gather(
                sending.ask("send", room=room, chunks=CHUNKS),
                receiving.ask("receive", room=room, pages=NAMED, sent=SENT),
            )
            assert (told, found) == ({}, {"wrong": []})
        for each in ranks:
            assert each.ask_now("leave") == {}


async def test_an_engine_that_is_killed_lets_its_agent_open_the_next_pool(gpu: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        registry = stack.enter_context(service(tmp_path / "registry.log", "--journal", "memory:"))
        side = stack.enter_context(agent(tmp_path / "agent", "--registry", registry.url))
        for life in range(2):
            given = {"role": "prefill", "way": "agent", "device": gpu, "shared": str(tmp_path / f"kv{life}")}
            child = rank(stack, socket=str(side.socket), **given)
            assert "session" in (opened := await child.ask("open")), opened
            child.kill()


async def test_a_rank_with_checksums_is_refused(gpu: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        flags = {"room.checksum": "offered"}
        child = rank(stack, role="decode", way="node", registry="http://127.0.0.1:1", device=gpu, flags=flags)
        answer = await child.ask("open")
        assert answer["error"].startswith("ConfigError: room.checksum is on, and the kv pool is on cuda:0")


@pytest.mark.parametrize("protocol", ["tcp", "nvlink_intra"])
async def test_engines_write_from_device_to_device(gpu: str, protocol: str) -> None:
    with ExitStack() as stack:
        given = {"role": "", "way": "", "device": gpu, "protocol": protocol}
        here, there = rank(stack, **given), rank(stack, **given)
        assert there.ask_now("clear") == {}
        ours, theirs = here.ask_now("engine"), there.ask_now("engine")
        for answer in (ours, theirs):
            if "SUPPORT_INTRA_NVLINK is False" in answer.get("error", ""):
                pytest.skip("the installed wheel has no intra-node NVLink")
            assert "session" in answer, answer
        moved = await here.ask("write_to", session=theirs["session"], pointers=theirs["pointers"])
        assert moved == {}
        assert there.ask_now("all_there") == {"wrong": []}


# --- one process and its driver


def test_the_driver_knows_its_memory_and_a_processor_cannot_read_it(cuda: Cuda) -> None:
    region = allocate(cuda.driver, 1 << 21)
    assert cuda.where(region) == cuda.spec
    with pytest.raises(BadField, match="is no memory that this host's processor can read"):
        Cpu().where(region)
    write(cuda.driver, region.pointer, bytes(range(256)))
    assert read(cuda.driver, region)[:256] == bytes(range(256))
    free(cuda.driver, region)


def test_a_thread_has_a_context_when_it_has_bound_the_device_and_not_before(cuda: Cuda) -> None:
    library, found = ctypes.CDLL(LIBRARY), list[bool]()

    def has_one() -> bool:
        context = ctypes.c_void_p()
        return library.cuCtxGetCurrent(ctypes.byref(context)) == 0 and context.value is not None

    def work() -> None:
        found.append(has_one())
        cuda.bind()
        found.append(has_one())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, True]


@pytest.fixture
def exporter(gpu: str) -> Iterator[Exporter]:
    running = Exporter(LIBRARY)
    yield running
    running.kill()


def test_memory_of_another_process_is_opened_once_and_both_see_the_same_bytes(cuda: Cuda, exporter: Exporter) -> None:
    exporter.ask(allocate=1 << 21)
    parts = [_shared(exporter.ask(do="share", offset=at, nbytes=8192)) for at in (4096, 65536)]
    mapped = [cuda.open_shared(part, f"memory.{n}") for n, part in enumerate(parts)]
    assert mapped[1].region.pointer - mapped[0].region.pointer == 65536 - 4096
    assert read(cuda.driver, mapped[0].region) == bytes(n % 251 for n in range(4096, 4096 + 8192))
    write(cuda.driver, mapped[1].region.pointer, b"\x07" * 8192)
    assert exporter.ask(do="read", offset=65536, nbytes=8192) == "07" * 8192


def test_memory_of_a_dead_process_and_of_this_one_is_refused_by_name(cuda: Cuda, exporter: Exporter) -> None:
    exporter.ask(allocate=1 << 21)
    memory = _shared(exporter.ask(do="share", offset=0, nbytes=4096))
    exporter.kill()
    with pytest.raises(BadField, match="the process that gave it has ended, has freed the memory"):
        cuda.open_shared(memory, "memory.0")
    own = allocate(cuda.driver, 1 << 21)
    with pytest.raises(BadField, match="is of this process's own memory"):
        cuda.open_shared(cuda.share(own).memory, "memory.0")
    free(cuda.driver, own)


def _shared(said: dict[str, Any]) -> Memory:
    return Memory(Store.CUDA_IPC, said["handle"], said["nbytes"], said["offset"], said["device"])
