"""A decode rank's registration and metadata become copies into exactly the pages it named, or a refusal with values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pdctl.core.address import Endpoint
from pdctl.core.destination import Destination
from pdctl.core.layout import Pool
from pdctl.core.wire import Metadata, RegisterBuffers
from pdctl.errors import LayoutMismatch

KV = Pool((1_000_000,), (64,), 16)
AUX = Pool((2_000_000,), (8,), 4)
THEIRS = 5_000_000
THEIR_AUX = 7_000_000
REPLY = Endpoint("10.0.0.7", 7001)
SESSION = "10.0.0.7:15999"


def registered(item_len: int = 64, dcp_size: int = 1) -> RegisterBuffers:
    return RegisterBuffers(
        reply=REPLY,
        session=SESSION,
        kv_pointers=(THEIRS,),
        aux_pointers=(THEIR_AUX,),
        tp_rank=0,
        tp_size=1,
        kv_item_len=item_len,
        kv_item_lens=(item_len,),
        dcp_size=dcp_size,
    )


def named(pages: Sequence[int] = (9, 2, 3), aux_row: int | None = 3) -> Metadata:
    return Metadata(5, REPLY, SESSION, np.array(pages, np.int32), aux_row)


def destination(pages: Sequence[int] = (9, 2, 3), aux_row: int | None = 3) -> Destination:
    return Destination.of(registered(), named(pages, aux_row), KV, AUX)


def test_a_chunk_goes_to_the_named_pages_that_begin_where_the_last_one_ended() -> None:
    plan = destination().chunk(KV, np.array([5, 6]), 1)
    assert plan.total == 128
    assert set(plan.dst.tolist()) == {THEIRS + 2 * 64}
    assert set(plan.src.tolist()) == {1_000_000 + 5 * 64}


def test_a_page_more_than_was_named_is_refused_with_both_numbers() -> None:
    with pytest.raises(LayoutMismatch, match="named 3 pages and page 4 is being sent"):
        destination().chunk(KV, np.array([5, 6]), 2)


@pytest.mark.parametrize("n_sent", [2, 4])
def test_the_last_copy_waits_for_as_many_pages_as_were_named(n_sent: int) -> None:
    with pytest.raises(LayoutMismatch, match=f"named 3 pages and {n_sent} were sent"):
        destination().last(AUX, n_sent, 2)


def test_the_aux_row_goes_to_the_row_that_was_named() -> None:
    plan = destination().last(AUX, 3, 2)
    assert (plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist()) == ([2_000_016], [THEIR_AUX + 24], [8])


@pytest.mark.parametrize(("ours", "theirs"), [(None, 3), (2, None)], ids=["we have none", "they want none"])
def test_without_an_aux_row_on_either_side_nothing_is_copied(ours: int | None, theirs: int | None) -> None:
    assert len(destination(aux_row=theirs).last(AUX, 3, ours)) == 0


def test_pools_that_do_not_pair_are_refused_before_anything_is_planned() -> None:
    with pytest.raises(LayoutMismatch, match="64 bytes an item and the receiver 32"):
        Destination.of(registered(item_len=32), named(), KV, AUX)


def test_what_this_prefill_does_not_move_is_refused_by_name() -> None:
    with pytest.raises(LayoutMismatch, match="wants a DCP size of 2"):
        Destination.of(registered(dcp_size=2), named(), KV, AUX)
