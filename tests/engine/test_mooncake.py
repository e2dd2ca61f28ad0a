"""The Mooncake adapter's own edges: settings, environment, wheels that are missing or old, IPv6, its end."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from pdctl.core.device import HOST, DeviceSpec
from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.device.cpu import Cpu
from pdctl.engine import wheel
from pdctl.engine.environment import environment, prepare
from pdctl.engine.mooncake import _Calls, open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import Cause, ConfigError, DeviceUnavailable, EngineUnavailable
from pdctl.memory import Arena
from tests.device.paper import build
from tests.device.recording import Recording
from tests.engine.conftest import STALL_S, mooncake_stage
from tests.engine.processes import ROOT, Peers
from tests.engine.test_contract import failure
from tests.engine.test_hazards import Refusing

# --- settings


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"host": ""}, "host"),
        ({"host": "0.0.0.0"}, "host"),
        ({"host": "::"}, "host"),
        ({"host": "127.0.0.1:99999"}, "host"),
        ({"host": "a b"}, "host"),
        ({"protocol": "rdma", "force_tcp": True}, "force_tcp"),
        ({"window": 0}, "window"),
        ({"window": 4096}, "window"),
        ({"block_limit": 0}, "block_limit"),
        ({"progress_timeout_s": 0}, "progress_timeout_s"),
        ({"handshake_timeout_s": -1}, "handshake_timeout_s"),
        ({"recheck_s": -1}, "recheck_s"),
    ],
)
def test_a_setting_that_the_engine_would_swallow_is_refused_by_name(wrong: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        MooncakeSettings(**wrong)


def test_closing_waits_as_long_as_a_hung_peer_can_hold_a_full_window() -> None:
    assert {MooncakeSettings(window=n, progress_timeout_s=5).patience.rest_s for n in (1, 16, 64)} == {11.0}
    assert MooncakeSettings(rest_timeout_s=2.0).patience.rest_s == 2.0


# --- environment


def test_the_block_is_what_the_facts_recommend() -> None:
    block = environment(MooncakeSettings(progress_timeout_s=7))
    assert block["MC_FORCE_TCP"] == "1"
    assert block["MC_TCP_PROGRESS_TIMEOUT_SEC"] == block["MC_TCP_STATUS_TIMEOUT_SEC"] == "7"
    assert block["MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER"] == block["MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER"] == "65535"
    assert block["MC_STORE_CLIENT_SETUP_RETRIES"] == "1"
    assert "MC_USE_IPV6" not in block


def test_tcp_is_forced_exactly_when_it_is_the_protocol() -> None:
    assert "MC_FORCE_TCP" not in environment(MooncakeSettings(protocol="rdma"))
    with pytest.raises(ConfigError, match="MC_FORCE_TCP"):
        prepare(MooncakeSettings(protocol="rdma"), {"MC_FORCE_TCP": "0"}, loaded=False)


def test_the_engine_asks_no_peer_again_behind_our_back_where_we_introduce_them() -> None:
    assert environment(MooncakeSettings())["MC_TE_METADATA_REFRESH_INTERVAL_SECONDS"] == "0"
    assert environment(MooncakeSettings(protocol="rdma"))["MC_TE_METADATA_REFRESH_INTERVAL_SECONDS"] == "1"


def test_an_ipv6_host_makes_the_engine_speak_ipv6() -> None:
    assert environment(MooncakeSettings(host="::1"))["MC_USE_IPV6"] == "1"
    with pytest.raises(ConfigError, match="MC_USE_IPV6"):
        prepare(MooncakeSettings(), {"MC_USE_IPV6": "1"}, loaded=False)


def test_intra_node_nvlink_is_asked_for_as_the_wheel_reads_it() -> None:
    block = environment(MooncakeSettings(protocol="nvlink_intra"))
    assert block["MC_INTRANODE_NVLINK"] == "1"
    assert "MC_FORCE_TCP" not in block
    assert "MC_INTRANODE_NVLINK" not in environment(MooncakeSettings())


def test_an_operators_own_value_wins_where_no_promise_hangs_on_it() -> None:
    environ = {"MC_LOG_LEVEL": "INFO", "MC_TCP_PROGRESS_TIMEOUT_SEC": "300", "MC_MIN_RPC_PORT": "20000"}
    prepare(MooncakeSettings(), environ, loaded=False)
    assert environ["MC_LOG_LEVEL"] == "INFO"
    assert environ["MC_TCP_PROGRESS_TIMEOUT_SEC"] == "5"
    assert environ["MC_MIN_RPC_PORT"] == "20000"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MC_TCP_PROTO", "1"),
        ("MC_TCP_ENABLE_CONNECTION_POOL", "0"),
        ("MC_TCP_ENABLE_CONNECTION_POOL", "false"),
        ("MC_DISABLE_METACACHE", "1"),
    ],
)
def test_a_variable_that_would_break_a_promise_is_an_error_that_names_it(name: str, value: str) -> None:
    environ = {name: value}
    with pytest.raises(ConfigError, match=name):
        prepare(MooncakeSettings(), environ, loaded=False)
    assert environ == {name: value}


def test_an_engine_imported_too_early_is_warned_of_once_and_only_then() -> None:
    environ: dict[str, str] = {}
    with capture_logs() as logged:
        prepare(MooncakeSettings(), environ, loaded=True)
        prepare(MooncakeSettings(), environ, loaded=True)
        prepare(MooncakeSettings(), {}, loaded=False)
    assert [line["log_level"] for line in logged] == ["warning"]
    assert "MC_FORCE_TCP" in logged[0]["variables"]


# --- wheels


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("No module named 'mooncake'", "pdctl[cpu]"),
        ("No module named 'mooncake.engine'", "pdctl[cpu]"),
        ("libibverbs.so.1: cannot open shared object file: No such file or directory", "libibverbs1"),
        ("libnuma.so.1: cannot open shared object file", "libnuma1"),
        ("libcurl.so.4: cannot open shared object file", "libcurl4"),
        ("libmlx5.so.1: cannot open shared object file", "ibverbs-providers"),
        ("libcudart.so.12: cannot open shared object file", "CUDA 12 toolkit"),
        ("libcudart.so.12: cannot open shared object file", "pdctl[cpu]"),
        ("libcuda.so.1: cannot open shared object file", "NVIDIA driver"),
        ("libnew.so.3: cannot open shared object file", "libnew.so.3"),
    ],
)
def test_an_import_that_fails_says_what_to_install(text: str, says: str) -> None:
    assert says in wheel.remedy(text)


async def test_without_a_wheel_opening_is_an_operators_error() -> None:
    def importer(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    with pytest.raises(EngineUnavailable, match=r"pdctl\[cpu\]"):
        async with open_mooncake(MooncakeSettings(), Cpu(), importer=importer, environ={}):
            pass


def test_a_cuda_runtime_that_pip_has_installed_is_found_where_no_loader_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "nvidia/cuda_runtime/lib/libcudart.so.12"
    info = tmp_path / "nvidia_cuda_runtime_cu12-1.dist-info"
    library.parent.mkdir(parents=True)
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-runtime-cu12\nVersion: 1\n")
    (info / "RECORD").write_text("nvidia/cuda_runtime/lib/libcudart.so.12,,\n")
    shutil.copy(build(tmp_path), library)
    monkeypatch.syspath_prepend(tmp_path)
    asked = 0

    def importer(name: str) -> ModuleType:
        nonlocal asked
        asked += 1
        if str(library) not in Path("/proc/self/maps").read_text():
            raise ImportError("libcudart.so.12: cannot open shared object file")
        return ModuleType(name)

    assert wheel.load(importer).__name__ == "mooncake.engine"
    assert asked == 2


def test_a_cuda_runtime_that_is_nowhere_says_what_to_install() -> None:
    def importer(name: str) -> ModuleType:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    with pytest.raises(EngineUnavailable, match=r"libcudart\.so\.13, which is not on this host: pip install nvidia"):
        wheel.load(importer)


def test_a_wheel_whose_voice_cannot_be_lowered_is_used_all_the_same() -> None:
    assert wheel.silence(ModuleType("mooncake.engine")) is False


async def test_an_old_wheel_is_warned_of_once_and_refuses_only_what_it_cannot() -> None:
    with capture_logs() as logged:
        async with open_mooncake(MooncakeSettings(), Cpu(), factory=Refusing, environ={}) as engine:
            assert not engine.capabilities.send_probe
            assert not engine.capabilities.async_read
            with Arena(4096) as arena:
                await engine.register(arena.region)
                plan = CopyPlan.of((arena.region.pointer, 4096, 1))
                assert (await failure(engine.read("127.0.0.1:1", plan, deadline_s=1))).cause is Cause.LOCAL
                await engine.unregister(arena.region)
    warnings = [line for line in logged if "lacks" in line["event"]]
    assert len(warnings) == 1
    assert {"send_probe", "batch_transfer_async_read"} <= set(warnings[0])


async def test_a_wheel_too_old_to_write_is_an_operators_error() -> None:
    class Ancient:
        def initialize(self) -> int:
            return 0

    with pytest.raises(EngineUnavailable, match="transfer_submit_write"):
        async with open_mooncake(MooncakeSettings(), Cpu(), factory=Ancient, environ={}):
            pass


async def test_an_engine_that_does_not_initialize_says_with_what_it_was_asked_to() -> None:
    class Unwilling(Refusing):
        def initialize(self, host: str, metadata: str, protocol: str, device: str) -> int:
            return -1

    with pytest.raises(EngineUnavailable, match=r"'tcp'.*code -1"):
        async with open_mooncake(MooncakeSettings(), Cpu(), factory=Unwilling, environ={}):
            pass


# --- threads


async def test_the_device_is_set_on_each_thread_of_ours_before_the_engine_is_made_or_memory_registered() -> None:
    device = Recording()

    class Made(Refusing):
        def __init__(self) -> None:
            super().__init__()
            device.note("made")

        def initialize(self, host: str, metadata: str, protocol: str, rdma_device: str) -> int:
            device.note("initialized")
            return 0

        def register_memory(self, pointer: int, nbytes: int) -> int:
            device.note("registered")
            return 0

    async with open_mooncake(MooncakeSettings(), device, factory=Made, environ={}) as engine:
        with Arena(4096) as arena:
            await engine.register(arena.region)
            await engine.unregister(arena.region)
    mover = [what for what, thread in device.seen if thread == "pdctl-mover"]
    registering = [what for what, thread in device.seen if thread.startswith("pdctl-register")]
    assert mover == ["bound", "made", "initialized"]
    assert registering[:4] == ["bound", "registered", "bound", "registered"]  # the canary, the arena
    assert len(mover) + len(registering) == len(device.seen)  # on no other thread


async def test_the_engine_is_told_the_name_that_its_device_wants_and_peers_see_an_address() -> None:
    told: list[tuple[str, ...]] = []

    class Made(Refusing):
        def initialize(self, *given: str) -> int:
            told.append(given)
            return 0

    class Npu(Recording):
        def engine_name(self, host: str, port: int | None = None) -> str:
            return f"{host}:1:npu_5"

        def check_protocol(self, protocol: str) -> None: ...

    async with open_mooncake(MooncakeSettings(protocol="ascend"), Npu(), factory=Made, environ={}) as engine:
        assert engine.session == f"127.0.0.1:{Made().get_rpc_port()}"
    assert told == [("127.0.0.1:1:npu_5", "P2PHANDSHAKE", "ascend", "")]


async def test_a_device_that_cannot_be_set_fails_the_opening() -> None:
    class Lost(Recording):
        def bind(self) -> None:
            raise DeviceUnavailable("npu:0 cannot be set (aclrtSetDevice failed, ret: 107001)")

    with pytest.raises(DeviceUnavailable, match="107001"):
        async with open_mooncake(MooncakeSettings(), Lost(), factory=Refusing, environ={}):
            pass


async def test_a_protocol_that_cannot_move_the_devices_memory_is_refused_before_an_engine_is_made() -> None:
    with pytest.raises(ConfigError, match=r"engine\.protocol is ascend but the device is cpu"):
        async with open_mooncake(MooncakeSettings(protocol="ascend"), Cpu(), factory=lambda: 1 // 0, environ={}):
            pass


@pytest.mark.parametrize(("protocol", "flag"), [("tcp", "SUPPORT_CUDA"), ("nvlink_intra", "SUPPORT_INTRA_NVLINK")])
def test_a_wheel_that_cannot_move_the_devices_memory_is_refused(protocol: str, flag: str) -> None:
    """It would register any pointer, and each transfer would end as its peer's failure."""
    module, device = ModuleType("mooncake.engine"), DeviceSpec.parse("cuda:0")
    wheel.check_can_move(module, device, protocol)  # an old wheel does not say
    setattr(module, flag, False)
    with pytest.raises(EngineUnavailable, match=rf"{flag} is False.*pdctl\[cuda13\]"):
        wheel.check_can_move(module, device, protocol)
    wheel.check_can_move(module, HOST, "tcp")


async def test_a_device_that_has_fallen_off_is_this_sides_own_fault(peers: Peers) -> None:
    """An error of the driver (a card that was reset, Xid 79) is no word against the peer."""

    class FallenOff(Recording):
        def where(self, region: Region) -> DeviceSpec:
            raise DeviceUnavailable("cuda:0 cannot be opened (cuPointerGetAttribute: CUDA_ERROR_ILLEGAL_ADDRESS (700))")

    far = peers.take()
    pointer = far.ask_now("register", nbytes=4096)["pointer"]
    with Arena(4096) as arena:
        async with open_mooncake(MooncakeSettings(), FallenOff(), factory=Refusing, environ={}) as engine:
            await engine.register(arena.region)
            plan = CopyPlan.of((arena.region.pointer, pointer, 8))
            failed = await failure(engine.write(far.session, plan, deadline_s=5))
    assert failed.cause is Cause.LOCAL
    assert "this side's device does not answer: cuda:0" in str(failed)
    peers.give_back(far)


async def test_an_engine_that_raises_ends_its_transfers_instead_of_leaving_them_waiting(peers: Peers) -> None:
    class Broken(Refusing):
        def transfer_submit_write(self, name: str, local: int, remote: int, nbytes: int) -> int:
            raise RuntimeError("broken")

    far = peers.take()
    pointer = far.ask_now("register", nbytes=4096)["pointer"]
    with Arena(4096) as arena, capture_logs() as logged:
        async with open_mooncake(MooncakeSettings(), Cpu(), factory=Broken, environ={}) as engine:
            await engine.register(arena.region)
            plan = CopyPlan.of((arena.region.pointer, pointer, 8))
            assert (await failure(engine.write(far.session, plan, deadline_s=5))).cause is Cause.LOCAL
            assert (await failure(engine.write(far.session, plan, deadline_s=5))).cause is Cause.LOCAL
    assert any("mover thread failed" in line["event"] for line in logged)
    peers.give_back(far)


def test_memory_is_not_taken_back_from_an_engine_that_is_no_more() -> None:
    """Its mover failed, and whoever closes it does not know yet. Seen: the closing failed and left its threads."""
    calls = _Calls(Refusing())
    calls.give_up(at_rest=True)
    assert calls.unregister(Region(4096, 1)) != 0
    assert calls.register(Region(4096, 1)) != 0


async def test_no_thread_of_an_engine_outlives_it() -> None:
    async with open_mooncake(MooncakeSettings(), Cpu()):
        assert any(thread.name == "pdctl-mover" for thread in threading.enumerate())
    for thread in threading.enumerate():
        if thread.name.startswith("pdctl-"):
            thread.join(60)
            assert not thread.is_alive()


# --- the end


async def test_closing_ends_what_moves_and_waits_for_its_rest(peers: Peers) -> None:
    async with AsyncExitStack() as outer:
        stack = AsyncExitStack()
        stage = await mooncake_stage(stack, peers)
        far = await stage.far()
        outer.push_async_callback(stack.aclose)
        await stage.engine.write(far.session, stage.plan(far, 1 << 16), deadline_s=5)
        far.stop()
        plan = stage.plan(far, block=1 << 20)
        writing = asyncio.create_task(failure(stage.engine.write(far.session, plan, deadline_s=30)))
        await asyncio.wait([writing], timeout=0.1)
        began = time.monotonic()
        assert await stage.engine.close()  # type: ignore[attr-defined]
        assert STALL_S * 0.5 < time.monotonic() - began < 5 * STALL_S
        assert (await writing).cause is Cause.LOCAL
        far.resume()


async def test_blocks_that_do_not_come_to_rest_cost_the_engine_its_life(peers: Peers) -> None:
    """Destroying it is the only fence there is: nobody may be told "closed" while bytes still leave."""
    far = peers.take()
    pointer = far.ask_now("register", nbytes=64 << 20)["pointer"]
    settings = MooncakeSettings(progress_timeout_s=30, rest_timeout_s=0.1)
    with Arena(64 << 20) as arena, capture_logs() as logged:
        memory = arena.array(64 << 20, np.uint8)
        memory[:] = 1
        async with open_mooncake(settings, Cpu()) as engine:
            await engine.register(arena.region)
            await engine.write(far.session, CopyPlan.of((arena.region.pointer, pointer, 1)), deadline_s=5)
            far.stop()
            plan = CopyPlan.of((arena.region.pointer, pointer, 64 << 20))
            writing = asyncio.create_task(failure(engine.write(far.session, plan, deadline_s=60)))
            await asyncio.wait([writing], timeout=0.1)
        assert (await writing).cause is Cause.LOCAL
        memory[:] = 2
    assert any("destroyed" in line["event"] for line in logged)
    far.resume()
    assert far.ask_now("count", pointer=pointer, value=2)["n"] == 0
    peers.give_back(far)


def test_a_process_that_used_an_engine_exits_at_once_and_silently() -> None:
    """The bare engine takes 0.7 s an engine at exit and writes ten lines; ours is kept, and says nothing."""
    done = subprocess.run(
        [sys.executable, "-c", QUICK], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    assert float(done.stdout) > 0


QUICK = """
import asyncio, time
from pdctl.device.cpu import Cpu
from pdctl.engine.settings import MooncakeSettings
from pdctl.engine.mooncake import open_mooncake
async def main():
    async with open_mooncake(MooncakeSettings(), Cpu()) as a, open_mooncake(MooncakeSettings(), Cpu()) as b:
        await a.probe(b.session, deadline_s=5)
asyncio.run(main())
print(time.monotonic())
"""


# --- IPv6


async def test_ipv6_from_end_to_end() -> None:
    """One family a process, so in a process of its own."""
    if not _has_ipv6():
        pytest.skip("this host has no IPv6 loopback")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", IPV6, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert (out.decode().split(), err) == (["[::1]", "True"], b"")


def _has_ipv6() -> bool:
    import socket

    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


IPV6 = """
import asyncio
import numpy as np
from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.device.cpu import Cpu
from pdctl.engine.settings import MooncakeSettings
from pdctl.engine.mooncake import open_mooncake
from pdctl.memory import Arena
async def main():
    settings = MooncakeSettings(host="::1")
    async with open_mooncake(settings, Cpu()) as a, open_mooncake(settings, Cpu()) as b:
        with Arena(4096) as here, Arena(4096) as there:
            here.array(4096, np.uint8)[:] = 5
            await a.register(here.region)
            await b.register(there.region)
            plan = CopyPlan.of((here.region.pointer, there.region.pointer, 4096))
            await a.write(b.session, plan, deadline_s=5)
            print(b.session.rpartition(":")[0], (there.array(4096, np.uint8) == 5).all())
asyncio.run(main())
"""
