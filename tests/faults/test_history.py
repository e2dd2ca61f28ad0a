"""Nothing that registries over one etcd have acknowledged is lost, given twice or taken back, whatever fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.history import LATE_S, History, Look, Word, run


@pytest.mark.timeout(300)
def test_what_was_acknowledged_is_so_through_twenty_faults(tmp_path: Path) -> None:
    history = run(tmp_path, rounds=20, seed=1)
    assert sum(word.epoch is not None for word in history.words) > 50
    assert history.check() == []


def test_the_checker_finds_what_must_not_be() -> None:
    first, second = Word(0, 1.0, 2.0, port=1, epoch=10), Word(0, 3.0, 4.0, port=2, epoch=11)
    fine = History([first, second], [Look((0, 0), 4.0 + LATE_S + 1, 0, {0: 11})])
    assert fine.check() == []
    assert len(History([first, Word(0, 1.0, 2.0, port=2, epoch=10)]).check()) == 1
    assert len(History([first, Word(0, 3.0, 4.0, port=2, epoch=9)]).check()) == 1
    assert len(History([first, second], [Look((0, 0), 4.0 + LATE_S + 1, 0, {0: 10})]).check()) == 1
    assert len(History([], [Look((0, 0), 1.0, 0, {0: 11}), Look((0, 0), 2.0, 9, {0: 10})]).check()) == 1
    assert History([first, second], [Look((0, 0), 4.0 + LATE_S + 1, 7, {0: 10})]).check() == []
    given_back = Word(0, 5.0, 6.0, gone=True)
    assert History([first, second, given_back], [Look((0, 0), 7.0 + LATE_S + 1, 0, {})]).check() == []
