"""
Ascend, by its runtime's library `libascendcl.so`: the NPU is set on a thread before anything is made there.

The order is the field's own bug: an engine that was initialised on a thread without a device died with
`aclrtGetDevice failed, ret: 107002`. The engine's name must carry the host's number of the card (`host:port:npu_N`),
the runtime takes this process's. Mooncake moves NPU memory by protocol `ascend` alone (HCCL; HIXL in newer builds).

Not run on hardware (docs/hardware.md); held against a runtime that records its calls and threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int32
from dataclasses import dataclass
from typing import Any

import structlog

from pdctl.core.device import HOST, DeviceSpec
from pdctl.core.handover import Handed, Mapped, Memory
from pdctl.core.layout import Region
from pdctl.device.cpu import is_readable
from pdctl.errors import BadField, ConfigError, DeviceUnavailable

log = structlog.get_logger(__name__)

LIBRARY = "libascendcl.so"
PROTOCOL = "ascend"
INITIALISED_BEFORE = 100002  # ACL_ERROR_REPEAT_INITIALIZE: torch_npu, or whoever else, was first
_ANY_PORT = 1  # the engine binds one of its own under P2PHANDSHAKE, whatever stands here
_REMEDIES = {
    107001: "the number is none of this process's cards: check ASCEND_RT_VISIBLE_DEVICES and npu-smi info",
    107002: "no device is set on that thread: open the device before the engine",
    507033: "the card did not start: see npu-smi info, and whether this user may open /dev/davinci*",
}
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "aclInit": (c_char_p,),
    "aclFinalize": (),
    "aclrtSetDevice": (c_int32,),
    "aclrtGetDevice": (POINTER(c_int32),),
    "aclrtResetDevice": (c_int32,),
}


@dataclass(slots=True)
class Ascend:
    """One NPU. `physical` is its number at the host."""

    spec: DeviceSpec
    physical: int
    _library: Any
    _began_it: bool

    @classmethod
    def opened(cls, wanted: DeviceSpec, physical: int, load: Callable[[str], Any]) -> Ascend:
        """Set on this thread. Raises DeviceUnavailable."""
        library = _loaded(load)
        code = library.aclInit(None)
        if code not in (0, INITIALISED_BEFORE):
            raise _unavailable(wanted, "aclInit", code)
        device = cls(wanted, physical, library, code == 0)
        try:
            device.bind()
        except DeviceUnavailable:
            device._end()
            raise
        log.info("device opened", device=str(wanted), physical=physical)
        return device

    @property
    def uuid(self) -> str:
        return ""

    def bind(self) -> None:
        """Asked back as well: it is what the engine asks, on this very thread."""
        if code := self._library.aclrtSetDevice(self.spec.index):
            raise _unavailable(self.spec, "aclrtSetDevice", code)
        found = c_int32(-1)
        if code := self._library.aclrtGetDevice(ctypes.byref(found)):
            raise _unavailable(self.spec, "aclrtGetDevice", code)
        if found.value != self.spec.index:
            raise DeviceUnavailable(f"{self.spec} was set and npu:{found.value} is: another library sets it, stop that")

    def where(self, region: Region) -> DeviceSpec:
        """The runtime is not asked whose it is: what a processor cannot read is taken for this card's."""
        return HOST if is_readable(region.pointer) and is_readable(region.end - 1) else self.spec

    def engine_name(self, host: str, port: int | None = None) -> str:
        return f"{host}:{_ANY_PORT if port is None else port}:npu_{self.physical}"

    def check_protocol(self, protocol: str) -> None:
        if protocol != PROTOCOL:
            raise ConfigError(
                f"engine.protocol is {protocol} but the device is {self.spec}: set protocol {PROTOCOL}, the only one "
                "that moves an NPU's memory"
            )

    def share(self, region: Region) -> Handed:
        raise BadField(
            "device", f"{region} is on {self.spec}, which names none for other processes: move it in process"
        )

    def open_shared(self, memory: Memory, field: str) -> Mapped:  # noqa: ARG002
        raise BadField(f"{field}.kind", f"is cuda_ipc, and the device is {self.spec}: hand over memory of the host")

    def close(self) -> None:
        """Only what was begun here: to reset a card under torch_npu would take its memory away."""
        self._end()

    def _end(self) -> None:
        if not self._began_it:
            return
        for name, args in (("aclrtResetDevice", (self.spec.index,)), ("aclFinalize", ())):
            if code := getattr(self._library, name)(*args):
                log.warning("device did not close cleanly", device=str(self.spec), call=name, code=code)


def _loaded(load: Callable[[str], Any]) -> Any:
    try:
        library = load(LIBRARY)
    except OSError as error:
        raise DeviceUnavailable(
            f"{LIBRARY} is not to be found ({error}): install the CANN toolkit or runtime and source its set_env.sh, "
            "which puts it on LD_LIBRARY_PATH"
        ) from error
    for name, types in _SIGNATURES.items():
        call = getattr(library, name)
        call.argtypes, call.restype = types, c_int
    return library


def _unavailable(wanted: DeviceSpec, call: str, code: int) -> DeviceUnavailable:
    remedy = _REMEDIES.get(code, "see the CANN log ($HOME/ascend/log) for this code")
    return DeviceUnavailable(f"{wanted} cannot be set ({call} failed, ret: {code}): {remedy}")
