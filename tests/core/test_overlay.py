"""A mapping over another reads like both in one, and leaves the one below as it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.overlay import Overlay

SMALL = st.dictionaries(st.sampled_from("abcdef"), st.integers())


@given(below=SMALL, written=SMALL)
def test_it_reads_as_one_dict_would_and_changes_nothing_below(below: dict[str, int], written: dict[str, int]) -> None:
    before, over = dict(below), Overlay(below)
    over.update(written)
    assert dict(over) == below | written
    assert len(over) == len(below | written)
    assert [over.get(key, -1) for key in "abcdef"] == [(below | written).get(key, -1) for key in "abcdef"]
    assert (below, over.own) == (before, written)


def test_what_may_stand_below_is_not_deleted() -> None:
    over = Overlay({"a": 1})
    with pytest.raises(TypeError, match="a cannot be deleted"):
        del over["a"]
