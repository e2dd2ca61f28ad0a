"""`python -m tests.gpu.about`: what is here, a line each; 1, and why, if a rank could not use it."""

from __future__ import annotations

import asyncio
import importlib
import os
import platform
import sys

from pdctl import logs
from pdctl.core.device import DeviceSpec
from pdctl.device.cuda import Cuda
from pdctl.device.open import open_device
from pdctl.engine import wheel
from pdctl.errors import PdctlError
from pdctl.logs import LogSettings


async def about() -> None:
    async with open_device("cuda:0") as device:
        assert isinstance(device, Cuda)
        version = device.driver.number("cuDriverGetVersion")
        print(f"device    {device.spec} {device.name} {device.uuid}")
        print(f"driver    CUDA {version // 1000}.{version % 1000 // 10}")
        module = wheel.load(importlib.import_module)
        flags = [name for name in dir(module) if name.startswith("SUPPORT_") and getattr(module, name)]
        print(f"mooncake  {wheel.version()} {' '.join(flags)}")
        print(f"python    {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")
        wheel.check_can_move(module, device.spec, "tcp")


if __name__ == "__main__":
    logs.configure(LogSettings(level="warning"))
    assert DeviceSpec.parse("cuda:0")
    try:
        asyncio.run(about())
    except PdctlError as error:
        print(error)
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # the engine's own threads need no goodbye
