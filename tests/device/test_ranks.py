"""A rank and its device: which one is opened, what is refused, and what an agent makes of memory on one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdctl import config
from pdctl.core.device import DeviceSpec
from pdctl.core.layout import Pool, RankPools, Region
from pdctl.core.route import Shape
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import BadField, ConfigError, DeviceUnavailable
from pdctl.memory import Arena
from pdctl.node import decode_node
from tests.agent_engine import Memory
from tests.agents import AgentProcess, agent, offer
from tests.device.paper import UUIDS, Exporter, build
from tests.device.recording import Recording

SHAPE = Shape(1, 1, 1, 1, 1, "uint8")


@contextmanager
def pools() -> Iterator[tuple[RankPools, Region]]:
    with Arena(1 << 16) as arena:
        kv, aux = arena.array((8, 64), np.uint8), arena.array((4, 16), np.uint8)
        yield RankPools(Pool((kv.ctypes.data,), (64,), 8), Pool((aux.ctypes.data,), (16,), 4)), arena.region


class Elsewhere(Recording):
    """npu:0, and whatever it is asked of is on cuda:1."""

    @property
    def spec(self) -> DeviceSpec:
        return DeviceSpec.parse("npu:0")

    def where(self, region: Region) -> DeviceSpec:
        return DeviceSpec.parse("cuda:1")


async def test_a_rank_uses_the_device_that_its_caller_keeps_open() -> None:
    device = Recording()
    with pools() as (its, arena):
        async with decode_node(config.load(), pools=its, arena=arena, shape=SHAPE, device=device):
            pass
    assert {what for what, _ in device.seen} == {"bound"}
    assert {thread.partition("_")[0] for _, thread in device.seen} == {"pdctl-mover", "pdctl-register"}


async def test_memory_of_another_device_than_the_ranks_is_refused_before_it_is_registered() -> None:
    device = Elsewhere()
    with pools() as (its, arena):
        opening = decode_node(config.load(), pools=its, arena=arena, shape=SHAPE, device=device)
        with pytest.raises(BadField, match=r"arena: .* is on cuda:1, and this rank's device is npu:0: open cuda:1"):
            await opening.__aenter__()


async def test_the_accelerator_of_the_settings_is_opened_and_its_absence_is_said() -> None:
    settings = config.load({"node.accelerator": "cuda:7"})
    with pools() as (its, arena), pytest.raises(DeviceUnavailable, match=r"libcuda\.so\.1 is not on this host|cuda:7"):
        async with decode_node(settings, pools=its, arena=arena, shape=SHAPE):
            pass


async def test_a_rank_is_not_opened_over_what_cannot_register_its_aux_rows() -> None:
    settings = config.load().model_copy(update={"engine": MooncakeSettings(protocol="nvlink_intra")})
    with pools() as (its, arena):
        opening = decode_node(settings, pools=its, arena=arena, shape=SHAPE, device=Recording())
        with pytest.raises(ConfigError, match="nvlink_intra registers device memory alone"):
            await opening.__aenter__()


def test_an_accelerator_that_is_none_is_a_settings_error() -> None:
    with pytest.raises(ConfigError, match=r"node: accelerator is 'gpu:0': give cpu, cuda:N"):
        config.load({"node.accelerator": "gpu:0"})


# --- the agent


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def exporter(driver: Path) -> Iterator[Exporter]:
    running = Exporter(driver)
    running.ask(allocate=1 << 20)
    yield running
    running.kill()


@pytest.fixture
def lone(driver: Path, tmp_path: Path) -> Iterator[AgentProcess]:
    with agent(tmp_path / "agent", LD_LIBRARY_PATH=str(driver.parent)) as it:
        yield it


async def test_an_agent_opens_the_device_that_the_handover_names_and_says_what_it_cannot(
    lone: AgentProcess, exporter: Exporter, tmp_path: Path
) -> None:
    memory = Memory(tmp_path / "kv")
    said = offer(memory)
    shared = exporter.ask(do="share", offset=4096, nbytes=said["memory"][0]["nbytes"])

    async def refused(**changes: Any) -> tuple[int, str]:
        body = json.loads(json.dumps(said))
        body["memory"][0] = shared | changes
        status, answer = await lone.ask("POST", "/v1/rank", body)
        return status, answer["error"]["message"]

    nobody = UUIDS[0].replace("a0", "ff")
    assert await refused(device=nobody) == (503, DeviceUnavailable(_not_there(nobody)).args[0])
    status, message = await refused(handle="AAAA")
    assert (status, message.partition(":")[0]) == (400, "memory.0.handle")
    status, message = await refused(offset=(1 << 20) - 1)
    assert (status, message.partition(":")[0]) == (400, "memory.0.nbytes")
    status, message = await refused(device=UUIDS[1])
    assert (status, message.partition(":")[0]) == (400, "memory.0.handle")  # it is the other device's
    assert (await lone.ask("GET", "/v1/rank"))[0] == 404  # as free as before
    status, message = await refused()
    assert status == 503
    assert "aux: is on cuda:0" in message or "SUPPORT_CUDA is False" in message  # by whichever wheel is here
    memory.arena.close()


def _not_there(uuid: str) -> str:
    return f"cuda:{uuid} is not there: this process sees {', '.join(UUIDS)}: check CUDA_VISIBLE_DEVICES"


async def test_an_agent_that_is_held_to_one_accelerator_takes_no_other_devices_pool(
    driver: Path, exporter: Exporter, tmp_path: Path
) -> None:
    memory = Memory(tmp_path / "kv")
    body = offer(memory)
    body["memory"][0] = exporter.ask(do="share", offset=0, nbytes=body["memory"][0]["nbytes"])
    with agent(tmp_path / "agent", "--accelerator", "cuda:1", LD_LIBRARY_PATH=str(driver.parent)) as lone:
        status, answer = await lone.ask("POST", "/v1/rank", body)
    assert (status, answer["error"]["message"]) == (
        400,
        f"memory.0.device: is {UUIDS[0]}, and cuda:1 is {UUIDS[1]}: open that device",
    )
    memory.arena.close()
