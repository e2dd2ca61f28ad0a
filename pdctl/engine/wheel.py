"""
Finding the Mooncake wheel: its import, what the failure of it means, its version, its voice.

Nothing is imported until `load` is called; nothing is called on the engine here.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from pdctl.core.device import DeviceKind, DeviceSpec
from pdctl.errors import EngineUnavailable

MODULE = "mooncake.engine"
DISTRIBUTIONS = (
    "mooncake-transfer-engine-non-cuda",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
)
_EXTRA = "pip install 'pdctl[cpu]' (or [cuda], [cuda13] on a GPU host)"
_DRIVER = "the NVIDIA driver is not on this host: install it, or take the CPU wheel with pip install 'pdctl[cpu]'"
_REMEDIES = {
    "libibverbs.so.1": "apt-get install libibverbs1",
    "libnuma.so.1": "apt-get install libnuma1",
    "libcurl.so.4": "apt-get install libcurl4",
    "libmlx5.so.1": "apt-get install ibverbs-providers",
    "libstdc++.so.6": "apt-get install libstdc++6",
    "libcudart.so.12": "pip install nvidia-cuda-runtime-cu12, or the CUDA 12 toolkit; or the CPU wheel 'pdctl[cpu]'",
    "libcudart.so.13": "pip install nvidia-cuda-runtime, or the CUDA 13 toolkit; or the CPU wheel 'pdctl[cpu]'",
    "libcuda.so.1": _DRIVER,
}
_RUNTIMES = ("nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime")
_RUNTIME = re.compile(r"libcudart\.so\.\d+")
_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[.\d]*)")
_MINLOGLEVEL = "_ZN3fLI17FLAGS_minloglevelE"  # glog's own flag; MC_LOG_LEVEL leaves two lines an engine, GLOG_* all
_FATAL_ONLY = 3


def load(importer: Callable[[str], ModuleType]) -> ModuleType:
    """`mooncake.engine`, or EngineUnavailable naming what to install."""
    try:
        return importer(MODULE)
    except ImportError as cause:
        if not _load_runtime(str(cause)):
            raise EngineUnavailable(remedy(str(cause))) from cause
    try:
        return importer(MODULE)
    except ImportError as cause:
        raise EngineUnavailable(remedy(str(cause))) from cause


def _load_runtime(text: str) -> bool:
    """Load the CUDA runtime that the import has missed, where pip has put one: no loader looks there by itself."""
    if (missing := _RUNTIME.search(text)) is None or (found := runtime_of_pip(missing[0])) is None:
        return False
    try:
        ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def runtime_of_pip(soname: str) -> Path | None:
    """The CUDA runtime of that name, where pip has put one."""
    for name in _RUNTIMES:
        try:
            for each in metadata.files(name) or ():
                if each.name == soname:
                    return Path(str(each.locate()))
        except metadata.PackageNotFoundError:
            continue
    return None


def installed() -> list[str]:
    """Which of its three names are installed, with their versions; more than one write over each other's files."""
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def libraries() -> list[Path]:
    """The shared objects that are imported: the engine's and the store's."""
    for name in DISTRIBUTIONS:
        try:
            files = metadata.files(name) or ()
        except metadata.PackageNotFoundError:
            continue
        wanted = (each for each in files if each.name.split(".")[0] in ("engine", "store") and ".so" in each.name)
        return [Path(str(each.locate())) for each in wanted if each.parts[0] == "mooncake"]
    return []


def check_can_move(module: ModuleType, device: DeviceSpec, protocol: str) -> None:
    """Raises EngineUnavailable for a wheel built without what the device or the protocol needs.

    It would register a device's pointer all the same, and each transfer would end with EFAULT as its peer's failure.
    """
    needed = ["SUPPORT_CUDA"] if device.kind is DeviceKind.CUDA else []
    needed += ["SUPPORT_INTRA_NVLINK"] if protocol == "nvlink_intra" else []
    for flag in needed:
        if getattr(module, flag, True) is False:  # older wheels have no such flags
            raise EngineUnavailable(
                f"the installed Mooncake wheel cannot move memory of {device} ({flag} is False, protocol {protocol}): "
                "uninstall it, then pip install 'pdctl[cuda]' for a driver of CUDA 12, 'pdctl[cuda13]' for one of 13"
            )


def remedy(text: str) -> str:
    """What an ImportError's text means, and what to do about it."""
    library = _LIBRARY.search(text)
    if library is None:
        return f"the Mooncake transfer engine is not installed ({text}): {_EXTRA}"
    is_there = "cannot open shared object file" not in text
    how = f"which cannot be loaded ({text})" if is_there else "which is not on this host"
    return f"the Mooncake transfer engine needs {library[1]}, {how}: {package_of(library[1])}"


def package_of(soname: str) -> str:
    """What brings a library that is not there."""
    return _REMEDIES.get(soname, f"install the package of your system that has {soname} (apt-file search {soname})")


def version() -> str:
    """The installed wheel's version; it has no __version__, and three names."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def silence(module: ModuleType) -> bool:
    """Let the engine's bundled glog say only what is fatal. False where that cannot be done; nothing is lost then."""
    where = getattr(module, "__file__", None)
    if where is None:
        return False
    site = Path(where).parent.parent
    return any(_set_level(library) for library in site.glob("mooncake_transfer_engine*.libs/libglog*"))


def _set_level(library: Path) -> bool:
    try:
        ctypes.c_int.in_dll(ctypes.CDLL(str(library)), _MINLOGLEVEL).value = _FATAL_ONLY
    except (OSError, ValueError):
        return False
    return True


def keep_until_exit(engine: Any) -> None:
    """Take one reference that is never given back.

    The engine's destructor holds the interpreter lock for 0.5 to 1 s (H9), on whatever thread it runs, and normal exit
    runs it too. An object that is never destroyed costs its two threads and five descriptors until the process ends,
    and nothing then: 20 of 20 such processes exited 0 at once, against 0.7 s an engine.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
