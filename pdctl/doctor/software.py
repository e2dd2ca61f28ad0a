"""Python and its packages, Mooncake's wheel and what it links to, its CUDA and the driver's, the device."""

from __future__ import annotations

import asyncio
import ctypes
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from pdctl import config
from pdctl.config import Settings
from pdctl.core.device import DeviceKind, DeviceSpec
from pdctl.device.cuda import LIBRARY
from pdctl.doctor.base import Said, fail, ok, warn
from pdctl.doctor.rehearsal import rehearsed
from pdctl.engine import wheel

OLDEST = (3, 11)
_LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1", "/lib64/ld64.so.2")
_NOT_FOUND = re.compile(r"^\s*(\S+) => not found", re.MULTILINE)
_BROKEN = re.compile(r"error while loading shared libraries: ([^:]+): (.+)")
_NEEDS = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(?:>=([0-9][0-9.]*))?")
_CUDA_OF = {"mooncake-transfer-engine": 12, "mooncake-transfer-engine-cuda13": 13}
_NO_WHEEL = "pip install 'pdctl[cpu]' (or [cuda], [cuda13]) where a rank or an agent runs; pdctl serve needs none"


def python(_: Settings) -> Said:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST:
        return fail(f"Python {version}", "install Python 3.11 or later, and pdctl into it")
    return ok(f"Python {version} at {sys.executable}, pdctl {metadata.version('pdctl')}")


def packages(_: Settings) -> Said:
    """What pdctl itself needs, as its own metadata say; extras are looked at elsewhere."""
    needed = [text for text in metadata.requires("pdctl") or () if "extra ==" not in text]
    wrong = [said for text in needed if (said := _lacks(text)) is not None]
    if wrong:
        return fail("; ".join(wrong), "install pdctl again into this environment: pip install --upgrade pdctl")
    return ok(f"all {len(needed)} packages that pdctl needs are there")


def _lacks(requirement: str) -> str | None:
    said = _NEEDS.match(requirement)
    if said is None:
        return None
    name, oldest = said[1], said[2]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    return f"{name} is {version}, below {oldest}" if oldest and _numbers(version) < _numbers(oldest) else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def engine_wheel(_: Settings) -> Said:
    found = wheel.installed()
    if not found:
        return warn("no Mooncake wheel is installed: no KV can be moved from here", _NO_WHEEL)
    if len(found) > 1:
        keep = "uninstall all of them, then install the one for this host's CUDA"
        return fail(f"{' and '.join(found)} are installed together and write over each other's files", keep)
    return ok(found[0])


async def shared_objects(_: Settings) -> Said:
    """Every library that the loader cannot find, asked without loading any of it."""
    paths = wheel.libraries()
    if not paths:
        return warn("no Mooncake wheel is installed: nothing to link", _NO_WHEEL)
    loader = _loader()
    if loader is None:
        return warn("the dynamic loader is not where it usually is: not looked at", "see what the check engine says")
    missing: dict[str, list[str]] = {}
    for path in paths:
        for lack in await _missing(loader, path):
            missing.setdefault(lack, []).append(path.name)
    lacking = {lack: users for lack, users in missing.items() if wheel.runtime_of_pip(_soname(lack)) is None}
    if lacking:
        which = "; ".join(f"{' and '.join(users)} need {lack}" for lack, users in lacking.items())
        return fail(which, "; ".join(dict.fromkeys(wheel.package_of(_soname(lack)) for lack in lacking)))
    also = f"; {', '.join(map(_soname, missing))} come with pip's CUDA runtime" if missing else ""
    return ok(f"{', '.join(path.name for path in paths)} find every library that they link to{also}")


def _loader() -> str | None:
    return next((each for each in _LOADERS if Path(each).exists()), None)


async def _missing(loader: str, path: Path) -> list[str]:
    """`libnuma.so.1, which is not found`, and the like. At one that cannot be read the loader goes no further."""
    environ = {**config.environment(), "LD_TRACE_LOADED_OBJECTS": "1"}
    child = await asyncio.create_subprocess_exec(
        loader, str(path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environ
    )
    said = (await child.communicate())[0].decode(errors="replace")
    broken = [f"{name}, and it cannot be loaded ({why.strip()})" for name, why in _BROKEN.findall(said)]
    return [f"{name}, which is not found" for name in _NOT_FOUND.findall(said)] + broken


def _soname(lack: str) -> str:
    return lack.partition(",")[0].rpartition("/")[2]


def cuda(settings: Settings) -> Said:
    """Whether the wheel is for the CUDA that the driver speaks."""
    wheels = [name for name in (text.partition(" ")[0] for text in wheel.installed()) if name in _CUDA_OF]
    driver, wants_gpu = driver_cuda(), DeviceSpec.parse(settings.node.accelerator).kind is DeviceKind.CUDA
    if not wheels:
        if driver and wants_gpu:
            fix = f"pip install 'pdctl[{'cuda' if driver[0] < 13 else 'cuda13'}]' instead"
            return fail(f"the driver speaks CUDA {_dotted(driver)}, and the wheel is for the CPU", fix)
        there = f"a driver for CUDA {_dotted(driver)}" if driver else "no NVIDIA driver"
        return ok(f"{there}; the wheel is for the CPU")
    major = _CUDA_OF[wheels[0]]
    if driver is None:
        fix = "install the driver (in a container: --gpus, the NVIDIA container toolkit), or take pdctl[cpu]"
        return fail(f"the wheel is for CUDA {major}, and {LIBRARY} is not on this host", fix)
    if driver[0] < major:
        fix = f"take a newer driver, or the wheel for its CUDA: pip install 'pdctl[{'cuda' if major == 13 else 'cpu'}]'"
        return fail(f"the wheel is for CUDA {major}, the driver only for {_dotted(driver)}", fix)
    return ok(f"the wheel is for CUDA {major}, the driver for {_dotted(driver)}")


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver speaks; nothing is initialised by asking."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


async def device(settings: Settings) -> Said:
    """`node.accelerator`, opened in a child; what else there is, by its files."""
    wanted = settings.node.accelerator
    seen = ", ".join(_seen()) or "no device files of an accelerator or an RDMA adapter"
    if settings.engine.protocol == "rdma" and not _adapters():
        fix = "pass the adapter into this container (/dev/infiniband), or set engine.protocol tcp"
        return fail("engine.protocol is rdma, and there is no adapter in /sys/class/infiniband", fix)
    if DeviceSpec.parse(wanted).kind is DeviceKind.CPU:
        return ok(f"node.accelerator is cpu; {seen}")
    told = await rehearsed("device", settings)
    return ok(f"{wanted} opens; {seen}") if told.works else split_of(told.words, seen)


def split_of(sentence: str, seen: str) -> Said:
    what, _, fix = sentence.rpartition(": ")
    return fail(f"{what or sentence}; {seen}", fix)


def _seen() -> Iterator[str]:
    for pattern in ("nvidia[0-9]*", "davinci[0-9]*"):
        found = sorted(path.name for path in Path("/dev").glob(pattern))
        yield from (f"/dev/{name}" for name in found[:8])
    yield from (f"RDMA {name}" for name in _adapters()[:8])


def _adapters() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
