"""
An engine's ports taken at once after a crash: `bind`, as the Mooncake wheel calls it in this process, reuses addresses.

A killed engine's ports are not free for a minute, which hides what happens to whoever still writes to them. Older
engines set the option themselves, and a container's network that is made anew forgets what was connected. The wheel's
libraries find `bind` through a slot of their own; this puts a function of ours into that slot.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_SYMBOLS, _RELOCATIONS = 11, 4
_libc = ctypes.CDLL(None, use_errno=True)


def _bind(fd: int, address: int, length: int) -> int:
    on = ctypes.c_int(1)
    _libc.setsockopt(fd, socket.SOL_SOCKET, socket.SO_REUSEADDR, ctypes.byref(on), ctypes.sizeof(on))
    return int(_libc.bind(fd, ctypes.c_void_p(address), length))


_BIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, use_errno=True)(_bind)


def reuse_addresses() -> None:
    """After the engine's module was imported, in a process that lives for a test."""
    found = [slot for path, base in _libraries() for slot in _slots(path.read_bytes(), base, b"bind")]
    assert found, "no library of the wheel calls bind"
    for slot in found:
        ctypes.c_void_p.from_address(slot).value = ctypes.cast(_BIND, ctypes.c_void_p).value


def _libraries() -> Iterator[tuple[Path, int]]:
    """Those of the wheel, and where each begins in this process."""
    seen = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and "/mooncake/" in words[5] and words[5] not in seen and words[5].endswith(".so"):
            seen.add(words[5])
            yield Path(words[5]), int(words[0].split("-")[0], 16)


def _slots(image: bytes, base: int, name: bytes) -> Iterator[int]:
    """Where the library keeps the address of the function `name`."""
    (at,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    sections = [_SECTION.unpack_from(image, at + n * size) for n in range(count)]
    symbols = next(section for section in sections if section[1] == _SYMBOLS)
    names = sections[symbols[6]]
    for relocations in (section for section in sections if section[1] == _RELOCATIONS):
        for offset in range(relocations[4], relocations[4] + relocations[5], _RELOCATION.size):
            where, info, addend = _RELOCATION.unpack_from(image, offset)
            start = names[4] + _SYMBOL.unpack_from(image, symbols[4] + (info >> 32) * _SYMBOL.size)[0]
            if not addend and image[start : start + len(name) + 1] == name + b"\0":
                yield base + where
