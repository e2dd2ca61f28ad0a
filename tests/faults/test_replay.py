"""Seconds of the conversation trace between real processes, and each kind of fault in them: no request is lost."""

from __future__ import annotations

from tests.bench.replay import FAULTS, replay
from tests.bench.trace import EXCERPT, read


async def test_no_request_of_a_trace_is_lost_to_a_fault_of_any_kind() -> None:
    trace = read(EXCERPT, 20.0)
    found = await replay(trace, 5.0, 0.6, seed=3, n_faults=len(FAULTS))
    assert set(found.faults) == {f"{what} {kind}" for what, kind in FAULTS}
    assert found.ok, found.in_words()
    assert len(found.done) >= len(trace)
    assert len(found.given_up) <= len(trace) // 10, found.in_words()  # a machine may be slower than the policy waits
    assert sum(each.had for each in found.well) > 0, "no prefix was reused: nothing of that was tried"
