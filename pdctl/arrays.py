"""
Tensors and arrays as pools, by what they say of themselves: no library of theirs is needed here.

    async with open_device("cuda:0") as device:
        kv = pool_of(device, [*keys, *values])             # one entry a tensor; item i is its row i
        arena = [region_of(device, each) for each in (*keys, *values)]

Understood are torch's tensors (by their methods), `__cuda_array_interface__` and DLPack (numpy, cupy, jax, torch), in
this order: torch's own way speaks of all its dtypes and devices, DLPack's does not. What lies anywhere but in one run
of bytes is refused by name, for a page of it would carry another's. A pool keeps its tensors alive; nothing is copied,
read or synchronised: a page may be sent when the kernels that wrote it have been waited for.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pdctl.core.device import DeviceKind, DeviceSpec
from pdctl.core.layout import Pool, Region
from pdctl.device.base import Device
from pdctl.errors import BadField

_NO_SYNC = -1  # of __dlpack__: no stream will read it by this capsule
_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
_ON = {_CPU: DeviceKind.CPU, _CUDA_HOST: DeviceKind.CPU, _CUDA_MANAGED: DeviceKind.CPU, _CUDA: DeviceKind.CUDA}


def pool_of(device: Device, arrays: Sequence[object], what: str = "pool") -> Pool:
    """A pool with an entry an array; all have the same number of rows, and a row is an item. Raises BadField."""
    found = [_read(device, array, f"{what}.{number}") for number, array in enumerate(arrays)]
    if not found:
        raise BadField(what, "has no arrays: give each entry one")
    rows = found[0].shape[0]
    for number, each in enumerate(found):
        if each.shape[0] != rows:
            raise BadField(
                f"{what}.{number}", f"has {each.shape[0]} rows, and {what}.0 {rows}: all entries have as many items"
            )
    on = {each.on for each in found}
    if len(on) > 1:
        raise BadField(what, f"is on {' and '.join(sorted(map(str, on)))}: keep all entries of a pool on one device")
    return Pool(
        tuple(each.pointer for each in found),
        tuple(each.nbytes // rows for each in found),
        rows,
        on.pop(),
        tuple(each.owner for each in found),
    )


def region_of(device: Device, array: object, what: str = "array") -> Region:
    """All bytes of it: what to register. Raises BadField."""
    found = _read(device, array, what)
    return Region(found.pointer, found.nbytes, found.owner)


@dataclass(frozen=True, slots=True)
class _Array:
    """What an array says of itself; `strides` in bytes, None where it is one run of bytes. `on`: only what it says."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    itemsize: int
    on: DeviceSpec | None
    owner: object

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class _Checked(_Array):
    on: DeviceSpec


def _read(device: Device, array: object, what: str) -> _Checked:
    said = _said(array, what)
    if not said.shape or not said.nbytes:
        raise BadField(what, f"has the shape {said.shape}: give at least one row of at least one byte")
    if said.pointer <= 0:
        raise BadField(what, "has no memory (a null pointer): give an array that is filled in")
    _check_one_run(said, what)
    on = device.where(Region(said.pointer, said.nbytes))
    if said.on is not None and said.on != on:
        raise BadField(what, f"says that it is on {said.on}, and its pointer is of {on}: open {said.on} first")
    if not on.is_host and on != device.spec:
        raise BadField(what, f"is on {on}, and the device that is open is {device.spec}: open {on}")
    return _Checked(said.pointer, said.shape, said.strides, said.itemsize, on, said.owner)


def _check_one_run(said: _Array, what: str) -> None:
    """Rows one after another, without gaps; an axis of length 1 may have any stride."""
    expected = said.itemsize
    for length, stride in zip(reversed(said.shape), reversed(said.strides or ()), strict=False):
        if length != 1 and stride != expected:
            raise BadField(
                what,
                f"of shape {said.shape} has strides of {said.strides} bytes: it is no one run of bytes in C order, "
                "give a contiguous array (of a tensor, the whole pool and no view of it)",
            )
        expected *= length


def _said(array: object, what: str) -> _Array:
    if _is_torch(array):
        return _of_torch(array, what)
    if (interface := getattr(array, "__cuda_array_interface__", None)) is not None:
        return _of_cuda(array, interface, what)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _of_dlpack(array, what)
    raise BadField(
        what,
        f"is {type(array).__name__}: give a torch tensor, or what speaks __cuda_array_interface__ or DLPack; by "
        "pointer, give a Pool",
    )


# --- torch, by its methods


def _is_torch(array: Any) -> bool:
    return all(callable(getattr(array, name, None)) for name in ("data_ptr", "element_size", "stride")) and hasattr(
        array, "device"
    )


def _of_torch(tensor: Any, what: str) -> _Array:
    """Also tensors that want a gradient, and dtypes that DLPack has no name for (fp8)."""
    layout = str(getattr(tensor, "layout", "torch.strided"))
    if layout != "torch.strided":
        raise BadField(what, f"has the layout {layout}: give a dense tensor")
    itemsize = int(tensor.element_size())
    strides = tuple(int(stride) * itemsize for stride in tensor.stride())
    kind = str(tensor.device.type)
    if kind not in tuple(DeviceKind):
        raise BadField(what, f"is on {tensor.device}: give a tensor of cpu, cuda or npu")
    on = DeviceSpec(DeviceKind(kind), 0 if kind == DeviceKind.CPU else int(tensor.device.index or 0))
    return _Array(int(tensor.data_ptr()), _shape(tensor.shape), strides, itemsize, on, tensor)


# --- __cuda_array_interface__


def _of_cuda(array: object, interface: Any, what: str) -> _Array:
    try:
        pointer, read_only = interface["data"]
        shape, typestr = _shape(interface["shape"]), str(interface["typestr"])
        itemsize = int(typestr[2:])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadField(
            what, f"has a __cuda_array_interface__ that cannot be read ({error!r}): see its version 3"
        ) from None
    if read_only:
        raise BadField(what, "is read-only: pages are written into a pool")
    if typestr[1] == "O" or interface.get("mask") is not None:
        raise BadField(what, f"is of {typestr}, masked or of objects: give plain numbers")
    strides = interface.get("strides")
    return _Array(int(pointer), shape, None if strides is None else _shape(strides), itemsize, None, array)


# --- DLPack


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """DLTensor: with it a DLManagedTensor begins, which the capsule "dltensor" points at."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _of_dlpack(array: Any, what: str) -> _Array:
    """The capsule is kept and never consumed: when the last Pool is gone, it gives back what it holds by itself."""
    kind, number = (int(part) for part in array.__dlpack_device__())
    if kind not in _ON:
        raise BadField(what, f"is on a device of DLPack's type {kind}: give memory of the host or of CUDA")
    try:
        capsule = array.__dlpack__() if _ON[kind] is DeviceKind.CPU else array.__dlpack__(stream=_NO_SYNC)
    except (BufferError, TypeError, RuntimeError) as error:
        raise BadField(what, f"gives no DLPack ({error}): give plain numbers that can be written to") from None
    at = _pointer_of(capsule, b"dltensor")
    said = ctypes.cast(at or 0, ctypes.POINTER(_Tensor)).contents
    bits = said.dtype.bits * said.dtype.lanes
    if bits % 8:
        raise BadField(what, f"has items of {bits} bits: give whole bytes, such as a view as uint8")
    shape = _shape(said.shape[: said.ndim])
    strides = tuple(n * bits // 8 for n in said.strides[: said.ndim]) if said.strides else None
    on = DeviceSpec(_ON[kind], number if _ON[kind] is DeviceKind.CUDA else 0)
    return _Array((said.data or 0) + said.byte_offset, shape, strides, bits // 8, on, (array, capsule))


def _shape(lengths: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(length) for length in lengths)
