"""
Objects on the SSD that a process was killed over: half-written files, by which the wheel refuses the whole directory.

With a file for each key the wheel reads all of them at set-up and ends at the first that is no whole record: a store
whose process was killed in mid-write could not be opened again (docs/store.md has the experiment). Nothing else tells
torn files from others: they have their last name from the start. Buckets get over it by themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import BinaryIO, Final

import structlog

from pdctl.errors import ConfigError

log = structlog.get_logger(__name__)

FOLDER: Final = "file_per_key_dir"
"""Below the rank's directory, with two levels of folders in it."""
_FIELDS: Final = (0x0A, 0x12)
"""A record is a Protocol Buffers message: key (1) and object (2), each tag, length, bytes."""
_VARINT: Final = 10
_NAMED: Final = 16


class _Form(Enum):
    WHOLE = "whole"
    TORN = "torn"
    OTHER = "no object"


def clear_torn(directory: Path) -> int:
    """Remove what is half-written; how many that were. Nobody may use the directory meanwhile.

    Raises ConfigError naming a file that is no object at all: the wheel would end by it too, and it is not ours.
    """
    torn = []
    for file in _files(directory / FOLDER):
        form = _form(file)
        if form is _Form.TORN:
            torn.append(file)
        elif form is _Form.OTHER:
            raise ConfigError(
                f"store ssd_offload_path {directory} holds {file.relative_to(directory)}, which is no object of a "
                "store, and by which none can be opened there: move it away"
            )
    for file in torn:
        file.unlink()
    if torn:
        names = [file.name for file in torn[:_NAMED]]
        log.warning("half-written objects removed", directory=str(directory), files=len(torn), names=names)
    return len(torn)


def _files(folder: Path) -> Iterator[Path]:
    for at, _, names in os.walk(folder):
        yield from (Path(at, name) for name in names)


def _form(path: Path) -> _Form:
    """By its lengths: the object itself is not read."""
    with path.open("rb") as file:
        nbytes, at = file.seek(0, os.SEEK_END), 0
        for tag in _FIELDS:
            file.seek(at)
            if (head := file.read(1)) and head[0] != tag:
                return _Form.OTHER
            length = _varint(file)
            if length is None:
                return _Form.TORN if file.tell() == nbytes else _Form.OTHER
            at = file.tell() + length
            if at > nbytes:
                return _Form.TORN
        return _Form.WHOLE if at == nbytes else _Form.OTHER


def _varint(file: BinaryIO) -> int | None:
    """None where it has no end."""
    value = 0
    for place in range(_VARINT):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << 7 * place
        if not byte[0] & 0x80:
            return value
    return None
