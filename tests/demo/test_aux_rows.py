"""A row says whose it is, and a row taken anew says nothing."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from pdctl.demo.aux_rows import AuxRow, AuxRows
from pdctl.errors import NotReady


def rows(n: int) -> AuxRows:
    return AuxRows(n, np.zeros(AuxRows.nbytes_for(n), np.uint8))


def test_a_row_copied_by_its_addresses_arrives_whole() -> None:
    here, there = rows(4), rows(9)
    told = AuxRow(first_token=77, cached_tokens=32, room=2**63 + 5)
    here.write(3, told)
    for source, destination, nbytes in zip(
        here.pool().pointers, there.pool().pointers, here.pool().item_lens, strict=True
    ):
        ctypes.memmove(destination + 8 * nbytes, source + 3 * nbytes, nbytes)
    assert there.read(8) == told
    assert there.read(7) == AuxRow(0, 0, 0)


def test_a_row_taken_anew_is_wiped() -> None:
    aux = rows(1)
    row = aux.take()
    aux.write(row, AuxRow(1, 2, 3))
    aux.give_back(row)
    assert aux.read(aux.take()) == AuxRow(0, 0, 0)


def test_more_rows_than_there_are_cannot_be_had() -> None:
    aux = rows(1)
    aux.take()
    with pytest.raises(NotReady, match="all 1 aux rows are held"):
        aux.take()
