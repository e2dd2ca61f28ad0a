"""How a store came up, as a span: each link of its chain, and where it ended."""

from __future__ import annotations

import pytest

from pdctl.core.trace import Span
from pdctl.device.open import open_device
from pdctl.errors import StoreCause, StoreUnusable
from pdctl.kvstore import open_store
from pdctl.spans import Spans
from tests.test_kvstore import CONFIG, PATIENCE, RANK, Troubled, failed, means


async def span_of(store: Troubled) -> Span:
    found: list[Span] = []
    async with (
        open_device("cpu") as device,
        open_store(CONFIG, RANK, device, patience=PATIENCE, means=means(store), spans=Spans(found.append)),
    ):
        assert [span.name for span in found] == ["pdctl.store"]  # it is told before the store is used
    return found[0]


async def test_a_store_that_came_up_late_says_how_each_link_went() -> None:
    span = await span_of(Troubled(put=[failed(StoreCause.NO_SPACE)] * 3))
    links = [event.name for event in span.events]
    assert links == ["master", "rehearsal", "claim", "master", "set-up", "warm-up"]
    assert (span.error, span.attributes["pdctl.attempts"]) == (None, 4)
    assert span.ended > span.began
    assert str(RANK) == span.attributes["pdctl.store_rank"]


async def test_a_store_that_never_came_up_says_at_which_step_and_why() -> None:
    found: list[Span] = []
    store = Troubled(put=[failed(StoreCause.BAD_ARGUMENT, code=-600)])
    with pytest.raises(StoreUnusable):
        async with (
            open_device("cpu") as device,
            open_store(CONFIG, RANK, device, patience=PATIENCE, means=means(store), spans=Spans(found.append)),
        ):
            pass
    (span,) = found
    assert "bad_argument" in (span.error or "")
    assert "code -600" in (span.error or "")
    assert span.events[-1].name == "warm-up"
