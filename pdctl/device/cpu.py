"""
Host memory: nothing has to be set, on any thread.

What can go wrong all the same is that a pointer is not the host's: a processor that follows a device's pointer dies of
it (SIGSEGV), and an engine built without CUDA reports it as its peer's failure. So the kernel is asked first.
"""

from __future__ import annotations

import ctypes
import os

from pdctl.core.device import HOST, DeviceSpec
from pdctl.core.handover import Handed, Mapped, Memory
from pdctl.core.layout import Region
from pdctl.errors import BadField, ConfigError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.write.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_libc.write.restype = ctypes.c_ssize_t


class Cpu:
    """The host, as a Device; always open."""

    @property
    def spec(self) -> DeviceSpec:
        return HOST

    @property
    def uuid(self) -> str:
        return ""

    def bind(self) -> None:
        """Every thread may touch it as it is."""

    def where(self, region: Region) -> DeviceSpec:
        for pointer in (region.pointer, region.end - 1):
            if not is_readable(pointer):
                raise BadField(
                    "pointer",
                    f"{pointer:#x} is no memory that this host's processor can read: if it is a device's, open that "
                    "device (node.accelerator, or open_device) and not cpu",
                )
        return HOST

    def engine_name(self, host: str, port: int | None = None) -> str:
        return host if port is None else f"{host}:{port}"

    def check_protocol(self, protocol: str) -> None:
        if protocol in ("ascend", "nvlink_intra"):
            wanted = "npu:N" if protocol == "ascend" else "cuda:N"
            raise ConfigError(
                f"engine.protocol is {protocol} but the device is cpu: open {wanted} (node.accelerator), or set "
                "protocol tcp or rdma"
            )

    def share(self, region: Region) -> Handed:
        raise BadField("device", f"{region} is host memory: hand it over by its name, with Arena(shared=...).handed")

    def open_shared(self, memory: Memory, field: str) -> Mapped:  # noqa: ARG002
        raise BadField(f"{field}.kind", "is memory of a device, and no device is open here: see node.accelerator")


def is_readable(pointer: int) -> bool:
    """Whether the kernel can read a byte there for us; a bad pointer is EFAULT to it, and not a signal."""
    ours, theirs = os.pipe()
    try:
        return int(_libc.write(theirs, pointer, 1)) == 1
    finally:
        os.close(ours)
        os.close(theirs)
