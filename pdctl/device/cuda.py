"""
CUDA, by the driver's own library: `libcuda.so.1` comes with the driver, whatever version the engine's wheel is for.

The device's primary context is the one that the runtime API uses (an engine, torch, cupy): making it current on a
thread is what cudaSetDevice does there. Calls that only look, name or open leave the thread's context as it was.

Not run on hardware yet (docs/hardware.md); the calls are held against a driver in C with the same signatures.
"""

from __future__ import annotations

import base64
import ctypes
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import Any, NoReturn

import structlog

from pdctl.core.device import HOST, DeviceKind, DeviceSpec, same_device
from pdctl.core.handover import Handed, Mapped, Memory, Store
from pdctl.core.layout import Region
from pdctl.device.cpu import Cpu
from pdctl.errors import BadField, ConfigError, DeviceUnavailable

log = structlog.get_logger(__name__)

LIBRARY = "libcuda.so.1"
HANDLE_NBYTES = 64
_LAZY_PEER_ACCESS = 1
_NAME_NBYTES = 96

INVALID_VALUE, INVALID_CONTEXT = 1, 201
_MEMORY_TYPE, _IS_MANAGED, _ORDINAL, _CAN_BE_SHARED = 2, 8, 9, 10  # CU_POINTER_ATTRIBUTE_*
_DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE

_REMEDIES = {
    2: "free memory of the device, or choose another",
    100: "the driver sees no device: check CUDA_VISIBLE_DEVICES, and that the container was given a GPU",
    101: "check CUDA_VISIBLE_DEVICES: it numbers the devices anew",
    802: "the system is not ready: start the fabric manager (nvidia-fabricmanager)",
    803: "the driver's library and its kernel module differ: restart the host, or the container with the host's driver",
    804: "this driver does not run on this hardware: install the driver that the device needs",
    999: "the driver does not say why: see dmesg, and whether nvidia-smi works",
}


class _Uuid(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


class _Handle(ctypes.Structure):
    """CUipcMemHandle; cuIpcOpenMemHandle takes it by value."""

    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE_NBYTES),)


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (POINTER(_Uuid), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuMemGetAddressRange_v2": (POINTER(c_uint64), POINTER(c_size_t), c_uint64),
    "cuIpcGetMemHandle": (POINTER(_Handle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), _Handle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuCtxSynchronize": (),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}


class DriverSaid(Exception):
    """A code other than 0. Never leaves this package: each caller says what it means there."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.call, self.code, self.name = call, code, name


class Driver:
    """The driver's calls with their types; each raises DriverSaid."""

    def __init__(self, load: Callable[[str], Any]) -> None:
        """Raises DeviceUnavailable where there is no driver, or one too old."""
        try:
            self._library = load(LIBRARY)
        except OSError as error:
            raise DeviceUnavailable(
                f"{LIBRARY} is not on this host ({error}): install the NVIDIA driver; in a container, start it with "
                "the NVIDIA container toolkit (--gpus)"
            ) from error
        for name, types in _SIGNATURES.items():
            try:
                call = getattr(self._library, name)
            except AttributeError as error:
                raise DeviceUnavailable(f"{LIBRARY} has no {name}: install a driver for CUDA 11.4 or later") from error
            call.argtypes, call.restype = types, c_int

    def __call__(self, name: str, *args: Any) -> None:
        if code := getattr(self._library, name)(*args):
            raise DriverSaid(name, code, self._name(code))

    def number(self, name: str, *args: Any) -> int:
        """The int that the call gives by its first argument."""
        value = c_int()
        self(name, ctypes.byref(value), *args)
        return value.value

    def attribute(self, which: int, pointer: int) -> int:
        value = c_int()
        self("cuPointerGetAttribute", ctypes.byref(value), which, pointer)
        return value.value

    def _name(self, code: int) -> str:
        name = c_char_p()
        known = self._library.cuGetErrorName(code, ctypes.byref(name)) == 0 and name.value
        return known.decode() if known else "unknown error"


@dataclass(slots=True)
class Cuda:
    """One device, by its primary context."""

    spec: DeviceSpec
    uuid: str
    name: str
    driver: Driver
    _context: c_void_p
    _before: c_void_p  # this thread's context when the device was opened: another library's, or none
    _ordinal: int
    _shared: set[str] = field(default_factory=set)
    _opened: dict[str, Region] = field(default_factory=dict)

    @classmethod
    def opened(cls, wanted: DeviceSpec, load: Callable[[str], Any]) -> Cuda:
        """Set on this thread. Raises DeviceUnavailable."""
        driver = Driver(load)
        try:
            driver("cuInit", 0)
            index = _find(driver, wanted)
            ordinal = driver.number("cuDeviceGet", index)
            name = ctypes.create_string_buffer(_NAME_NBYTES)
            driver("cuDeviceGetName", name, _NAME_NBYTES, ordinal)
            context, before = c_void_p(), c_void_p()
            driver("cuCtxGetCurrent", ctypes.byref(before))
            driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
        except DriverSaid as said:
            raise _unavailable(wanted, said) from said
        spec = DeviceSpec(DeviceKind.CUDA, index)
        device = cls(spec, _uuid(driver, ordinal), name.value.decode(), driver, context, before, ordinal)
        device.bind()
        log.info("device opened", device=str(spec), name=device.name, uuid=device.uuid)
        return device

    def bind(self) -> None:
        try:
            self.driver("cuCtxSetCurrent", self._context)
        except DriverSaid as said:
            raise _unavailable(self.spec, said) from said

    def where(self, region: Region) -> DeviceSpec:
        first, last = self._owner(region.pointer), self._owner(region.end - 1)
        if first != last:
            raise BadField("pointer", f"{region} begins on {first} and ends on {last}: give each its own region")
        return first

    def engine_name(self, host: str, port: int | None = None) -> str:
        return host if port is None else f"{host}:{port}"

    def check_protocol(self, protocol: str) -> None:
        if protocol == "ascend":
            raise ConfigError(
                f"engine.protocol is ascend but the device is {self.spec}: open npu:N, or set tcp or rdma"
            )

    def share(self, region: Region) -> Handed:
        if self.where(region).is_host:
            raise BadField(
                "pointer", f"{region} is host memory: hand it over by its name, with Arena(shared=...).handed"
            )
        try:
            with self._current():
                if not self.driver.attribute(_CAN_BE_SHARED, region.pointer):
                    _cannot_be_shared(region, "it was not allocated by cudaMalloc")
                base, size = self._allocation(region.pointer)
                handle = _Handle()
                self.driver("cuIpcGetMemHandle", ctypes.byref(handle), region.pointer)
        except DriverSaid as said:
            _cannot_be_shared(region, str(said))
        if region.end > base + size:
            raise BadField("nbytes", f"{region} reaches out of its allocation of {size} bytes: share what is allocated")
        text = base64.b64encode(bytes(handle.bytes)).decode()
        self._shared.add(text)
        return Handed(Memory(Store.CUDA_IPC, text, region.nbytes, region.pointer - base, self.uuid), region)

    def open_shared(self, memory: Memory, field: str) -> Mapped:
        if not same_device(memory.device, self.uuid):
            raise BadField(f"{field}.device", f"is {memory.device}, and {self.spec} is {self.uuid}: open that device")
        if memory.name in self._shared:
            raise BadField(f"{field}.handle", "is of this process's own memory: reach it by its pointer")
        if (whole := self._opened.get(memory.name)) is None:
            whole = self._opened[memory.name] = self._import(memory, field)
        if memory.offset + memory.nbytes > whole.nbytes:
            raise BadField(
                f"{field}.nbytes",
                f"ends at {memory.offset + memory.nbytes}, but the allocation has {whole.nbytes} bytes: stay inside",
            )
        return Mapped(Region(whole.pointer + memory.offset, memory.nbytes), self)

    def close(self) -> None:
        """On the thread that opened it, which has its own context back then. Whoever still uses the device in this
        process, such as torch, keeps it: the primary context is counted."""
        for region in self._opened.values():
            with self._complaining(), self._current():
                self.driver("cuIpcCloseMemHandle", region.pointer)
        self._opened.clear()
        with self._complaining():
            self.driver("cuCtxSetCurrent", self._before)
            self.driver("cuDevicePrimaryCtxRelease_v2", self._ordinal)

    # ---

    def _owner(self, pointer: int) -> DeviceSpec:
        try:
            kind = self.driver.attribute(_MEMORY_TYPE, pointer)
            if kind != _DEVICE_MEMORY or self.driver.attribute(_IS_MANAGED, pointer):
                return HOST  # pinned, or managed: a processor may follow the pointer
            return DeviceSpec(DeviceKind.CUDA, self.driver.attribute(_ORDINAL, pointer))
        except DriverSaid as said:
            if said.code == INVALID_VALUE:  # no memory of CUDA's
                return Cpu().where(Region(pointer, 1))
            raise _unavailable(self.spec, said) from said

    def _allocation(self, pointer: int) -> tuple[int, int]:
        base, size = c_uint64(), c_size_t()
        self.driver("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
        return base.value, size.value

    def _import(self, memory: Memory, field: str) -> Region:
        handle, pointer = _Handle.from_buffer_copy(_decoded(memory.name, f"{field}.handle")), c_uint64()
        try:
            with self._current():
                self.driver("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), handle, _LAZY_PEER_ACCESS)
                _, size = self._allocation(pointer.value)
        except DriverSaid as said:
            if pointer.value:
                with self._complaining(), self._current():
                    self.driver("cuIpcCloseMemHandle", pointer.value)
            raise BadField(f"{field}.handle", _why_not_opened(said)) from said
        return Region(pointer.value, size)

    @contextmanager
    def _current(self) -> Iterator[None]:
        self.driver("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.driver("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        """Closing goes on, whatever the driver says of one step."""
        try:
            yield
        except DriverSaid as said:
            log.warning("device did not close cleanly", device=str(self.spec), said=str(said))


def _find(driver: Driver, wanted: DeviceSpec) -> int:
    """This process's number of the device."""
    n = driver.number("cuDeviceGetCount")
    if not wanted.uuid:
        if wanted.index < n:
            return wanted.index
        raise DeviceUnavailable(
            f"{wanted} is not there: this process sees {n} CUDA device{'s' * (n != 1)}, numbered from 0: "
            "check CUDA_VISIBLE_DEVICES, which numbers them anew"
        )
    seen = [_uuid(driver, driver.number("cuDeviceGet", index)) for index in range(n)]
    for index, uuid_there in enumerate(seen):
        if same_device(uuid_there, wanted.uuid):
            return index
    raise DeviceUnavailable(
        f"{wanted} is not there: this process sees {', '.join(seen) or 'no CUDA device'}: check CUDA_VISIBLE_DEVICES"
    )


def _uuid(driver: Driver, ordinal: int) -> str:
    value = _Uuid()
    driver("cuDeviceGetUuid_v2", ctypes.byref(value), ordinal)
    return f"GPU-{uuid.UUID(bytes=bytes(value.bytes))}"


def _unavailable(wanted: DeviceSpec, said: DriverSaid) -> DeviceUnavailable:
    remedy = _REMEDIES.get(said.code, "see what nvidia-smi says of the device")
    return DeviceUnavailable(f"{wanted} cannot be opened ({said}): {remedy}")


def _cannot_be_shared(region: Region, why: str) -> NoReturn:
    raise BadField(
        "pointer",
        f"{region} cannot be shared with another process ({why}): allocate it with cudaMalloc (PyTorch: without "
        "expandable_segments and without the cudaMallocAsync backend)",
    )


def _decoded(text: str, field: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raise BadField(field, "is no base64: give the bytes of cudaIpcMemHandle_t in base64") from None
    if len(raw) != HANDLE_NBYTES:
        raise BadField(field, f"has {len(raw)} bytes: give the {HANDLE_NBYTES} of cudaIpcMemHandle_t in base64")
    return raw


def _why_not_opened(said: DriverSaid) -> str:
    if said.code == INVALID_CONTEXT:  # what the driver answers to who exported it
        return f"cannot be opened ({said}): it is of this process's own memory, reach it by its pointer"
    return (
        f"cannot be opened ({said}): the process that gave it has ended, has freed the memory, or lives in another "
        "container without a shared IPC and PID namespace: hand over memory that is there now"
    )
