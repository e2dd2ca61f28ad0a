"""
What is said of whether a room's bytes are summed and compared; the sums themselves are in sums.py.

Apart from them because it is a setting, and a word of many reports: who only reads those has no arrays.
"""

from __future__ import annotations

from enum import StrEnum


class Checksum(StrEnum):
    """Whether the bytes of this side's rooms are summed and compared."""

    OFF = "off"
    OFFERED = "offered"  # with every peer that does so too; with others rooms go as without
    REQUIRED = "required"  # a room whose peer does not fails, before any of its pages is used

    @property
    def is_on(self) -> bool:
        return self is not Checksum.OFF


class Checked(StrEnum):
    """What became of one prefill rank's sums of one room."""

    MATCHED = "matched"
    DIFFERED = "differed"
    ABSENT = "absent"  # a stock prefill, or one of ours that was not told to
