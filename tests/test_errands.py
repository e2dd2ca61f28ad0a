"""Errands run beside, are bounded, and never end in silence."""

from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

from pdctl.errands import Errands


async def test_closing_gives_errands_a_moment_and_then_cancels() -> None:
    errands, done = Errands(), []

    async def quick() -> None:
        await asyncio.sleep(0)
        done.append("quick")

    errands.spawn("quick", quick())
    errands.spawn("for ever", asyncio.Event().wait())  # type: ignore[arg-type]
    await errands.aclose(flush_s=0.05)
    assert done == ["quick"]
    assert len(errands) == 0


async def test_one_too_many_is_dropped_with_its_name() -> None:
    errands, go = Errands(limit=1), asyncio.Event()

    async def wait() -> None:
        await go.wait()

    with capture_logs() as lines:
        errands.spawn("first", wait())
        errands.spawn("second", wait())
    assert [(line["event"], line["errand"]) for line in lines] == [("errand dropped", "second")]
    go.set()
    await errands.aclose(flush_s=1)


async def test_a_defect_in_an_errand_is_told_and_hurts_no_other() -> None:
    errands = Errands(limit=None)

    async def broken() -> None:
        raise ZeroDivisionError

    with capture_logs() as lines:
        errands.spawn("broken", broken())
        await errands.aclose(flush_s=1)
    assert [(line["event"], line["errand"]) for line in lines] == [("errand failed", "broken")]
