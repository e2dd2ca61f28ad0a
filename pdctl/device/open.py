"""
Opens a device by its name, on the thread that asks, and closes it when nothing can use it any more.

    async with open_device("cuda:0") as device, open_mooncake(settings, device) as engine: ...

The first opening of a device in a process takes the driver 0.1 to some seconds and holds the loop meanwhile: it stands
before anything listens. Never reads the environment.
"""

from __future__ import annotations

import ctypes
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from pdctl.core.device import NPU, NPUS, DeviceKind, DeviceSpec, physical_npu
from pdctl.device.ascend import Ascend
from pdctl.device.base import Device
from pdctl.device.cpu import Cpu
from pdctl.device.cuda import Cuda
from pdctl.errors import ConfigError

Load = Callable[[str], Any]
"""A shared library by its name; raises OSError. ctypes.CDLL, or one that records."""


@asynccontextmanager
async def open_device(
    spec: str | DeviceSpec, *, environ: Mapping[str, str] | None = None, load: Load = ctypes.CDLL
) -> AsyncIterator[Device]:
    """The device `spec`, set on this thread. Raises BadField, ConfigError, and DeviceUnavailable that says what to
    install.

    `environ`: an NPU's physical number is read there (ASCEND_NPU_PHY_ID, else
    ASCEND_RT_VISIBLE_DEVICES); the CUDA driver reads its own.
    """
    wanted = DeviceSpec.parse(spec) if isinstance(spec, str) else spec
    if wanted.kind is DeviceKind.CPU:
        yield Cpu()
        return
    device = Cuda.opened(wanted, load) if wanted.kind is DeviceKind.CUDA else _ascend(wanted, environ, load)
    try:
        yield device
    finally:
        device.close()


def _ascend(wanted: DeviceSpec, environ: Mapping[str, str] | None, load: Load) -> Ascend:
    if environ is None:
        raise ConfigError(f"{wanted} needs environ=os.environ: {NPUS} says which physical card it is, if it is set")
    return Ascend.opened(wanted, physical_npu(wanted.index, environ.get(NPUS), environ.get(NPU)), load)
