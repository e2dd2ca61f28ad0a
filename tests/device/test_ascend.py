"""
Ascend through ctypes: what must come first, on which thread, held against a runtime that records its calls.

The runtime behaves as the field has seen it: a thread on which no device was set has none, and an engine that asks
there hears 107002.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pdctl.core.layout import Region
from pdctl.device.ascend import INITIALISED_BEFORE
from pdctl.device.open import open_device
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import BadField, ConfigError, DeviceUnavailable
from pdctl.memory import Arena
from tests.engine.test_hazards import Refusing

NO_DEVICE = 107002


class Call:
    """A function of a library, with the attributes that ctypes gives it."""

    def __init__(self, does: Callable[..., int]) -> None:
        self._does = does

    def __call__(self, *args: Any) -> int:
        return self._does(*args)


class Runtime:
    """libascendcl with two cards. `torch_first`: another library of the process has initialised it."""

    def __init__(self, *, torch_first: bool = False, cards: int = 2) -> None:
        self.seen: list[tuple[str, str]] = []
        self.codes: dict[str, int] = {"aclInit": INITIALISED_BEFORE if torch_first else 0}
        self.cards = cards
        self.of_thread: dict[int, int] = {}
        for name in ("aclInit", "aclFinalize", "aclrtSetDevice", "aclrtGetDevice", "aclrtResetDevice"):
            setattr(self, name, Call(self._calling(name)))

    def note(self, what: str) -> None:
        self.seen.append((what, threading.current_thread().name))

    def device(self) -> int:
        """What aclrtGetDevice answers on this thread."""
        return 0 if threading.get_ident() in self.of_thread else NO_DEVICE

    def _calling(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            self.note(name)
            if code := self.codes.get(name, 0):
                return code
            if name == "aclrtSetDevice":
                if args[0] >= self.cards:
                    return 107001
                self.of_thread[threading.get_ident()] = args[0]
            if name == "aclrtGetDevice":
                args[0]._obj.value = self.of_thread.get(threading.get_ident(), -1)
                return self.device()
            return 0

        return call


async def test_the_card_is_set_before_the_engine_on_the_very_thread_that_makes_it() -> None:
    runtime = Runtime()
    told: list[str] = []

    class Engine(Refusing):
        def __init__(self) -> None:
            super().__init__()
            assert runtime.device() == 0, f"aclrtGetDevice failed, ret: {NO_DEVICE}"  # the field's bug

        def initialize(self, host: str, metadata: str, protocol: str, device: str) -> int:
            told.extend((host, protocol))
            return runtime.device()

        def register_memory(self, pointer: int, nbytes: int) -> int:
            return runtime.device()

    settings, seen = MooncakeSettings(protocol="ascend"), {"ASCEND_RT_VISIBLE_DEVICES": "4,6"}
    async with open_device("npu:1", environ=seen, load=lambda _: runtime) as device:
        async with open_mooncake(settings, device, factory=Engine, environ={}) as engine:
            with Arena(4096) as arena:
                await engine.register(arena.region)
        assert [what for what, _ in runtime.seen][:3] == ["aclInit", "aclrtSetDevice", "aclrtGetDevice"]
    assert told == ["127.0.0.1:1:npu_6", "ascend"]  # the host's number of the card; the runtime was given ours
    assert set(runtime.of_thread.values()) == {1}
    assert [what for what, _ in runtime.seen][-2:] == ["aclrtResetDevice", "aclFinalize"]


async def test_the_cards_number_that_an_operator_of_sglang_has_set_is_understood() -> None:
    environ = {"ASCEND_NPU_PHY_ID": "7", "ASCEND_RT_VISIBLE_DEVICES": "0"}
    async with open_device("npu:0", environ=environ, load=lambda _: Runtime()) as device:
        assert device.engine_name("10.0.0.7", 12345) == "10.0.0.7:12345:npu_7"


async def test_without_the_device_the_same_engine_dies_of_the_fields_bug() -> None:
    """What the order is for: the runtime above does refuse."""
    runtime, answers = Runtime(), list[int]()
    async with open_device("npu:0", environ={}, load=lambda _: runtime):
        thread = threading.Thread(target=lambda: answers.append(runtime.device()))
        thread.start()
        thread.join()
    assert answers == [NO_DEVICE]


async def test_a_card_that_torch_has_begun_is_not_taken_from_under_it() -> None:
    runtime = Runtime(torch_first=True)
    async with open_device("npu:0", environ={}, load=lambda _: runtime):
        pass
    assert [what for what, _ in runtime.seen] == ["aclInit", "aclrtSetDevice", "aclrtGetDevice"]


@pytest.mark.parametrize(
    ("call", "code", "says"),
    [
        ("aclInit", 507008, r"npu:0 cannot be set \(aclInit failed, ret: 507008\): see the CANN log"),
        ("aclrtSetDevice", 107001, r"ret: 107001\): the number is none of this process's cards"),
        ("aclrtGetDevice", 107002, r"aclrtGetDevice failed, ret: 107002\): no device is set on that thread"),
    ],
)
async def test_what_the_runtime_refuses_is_said_with_its_code(call: str, code: int, says: str) -> None:
    runtime = Runtime()
    runtime.codes[call] = code
    with pytest.raises(DeviceUnavailable, match=says):
        async with open_device("npu:0", environ={}, load=lambda _: runtime):
            pass
    ended = [what for what, _ in runtime.seen if what == "aclFinalize"]
    assert len(ended) == (call != "aclInit")


async def test_no_runtime_says_what_to_install() -> None:
    def load(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(DeviceUnavailable, match=r"libascendcl\.so is not to be found.*CANN toolkit.*set_env\.sh"):
        async with open_device("npu:0", environ={}, load=load):
            pass


async def test_a_physical_number_is_never_guessed() -> None:
    with pytest.raises(ConfigError, match=r"npu:0 needs environ=os\.environ: ASCEND_RT_VISIBLE_DEVICES"):
        async with open_device("npu:0", load=lambda _: Runtime()):
            pass


async def test_another_protocol_is_refused_by_both_values() -> None:
    runtime = Runtime()
    async with open_device("npu:0", environ={}, load=lambda _: runtime) as device:
        with pytest.raises(ConfigError, match=r"engine\.protocol is tcp but the device is npu:0: set protocol ascend"):
            async with open_mooncake(MooncakeSettings(), device, factory=Refusing, environ={}):
                pass


async def test_its_memory_is_what_a_processor_cannot_read_and_is_not_shared() -> None:
    runtime = Runtime()
    async with open_device("npu:0", environ={}, load=lambda _: runtime) as device:
        with Arena(4096) as arena:
            assert device.where(arena.region).is_host
            assert str(device.where(Region(1 << 46, 4096))) == "npu:0"
            with pytest.raises(BadField, match="names none for other processes"):
                device.share(arena.region)
