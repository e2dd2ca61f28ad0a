"""What every engine promises (engine/base.py), held over Mooncake between real processes and over loopback alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

import numpy as np
import pytest

from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.device.cpu import Cpu
from pdctl.engine.loopback import Directory, open_loopback
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import BadField, Cause, TransferFailed
from pdctl.memory import Arena
from tests.engine.conftest import STALL_S, Stage, registered
from tests.patience import until_told


async def failure(doing: Awaitable[object]) -> TransferFailed:
    with pytest.raises(TransferFailed) as caught:
        await doing
    return caught.value


async def test_a_write_that_returned_has_landed_every_byte(stage: Stage) -> None:
    far = await stage.far()
    stage.memory[:] = 7
    await stage.engine.write(far.session, stage.plan(far), deadline_s=10)
    assert await far.count(7) == 4 << 20


async def test_a_write_touches_nothing_beside_its_places(stage: Stage) -> None:
    far = await stage.far()
    stage.memory[:] = 7
    await stage.engine.write(far.session, CopyPlan.of((stage.arena.region.pointer, far.pointer + 5, 3)), deadline_s=10)
    assert await far.count(7) == 3


async def test_a_read_brings_the_peers_bytes(stage: Stage) -> None:
    far = await stage.far()
    await far.fill(9)
    await stage.engine.read(far.session, stage.plan(far), deadline_s=10)
    assert (stage.memory == 9).all()


async def test_a_block_longer_than_the_limit_arrives_whole_and_in_order(stage: Stage) -> None:
    far = await stage.far(20 << 20)
    with Arena(20 << 20) as arena:
        await stage.engine.register(arena.region)
        view = arena.array(20 << 20, np.uint8)
        view[:] = np.arange(20 << 20, dtype=np.uint32) % 251
        there = CopyPlan.of((arena.region.pointer, far.pointer, 20 << 20))
        await stage.engine.write(far.session, there, deadline_s=10)
        expected, view[:] = view.copy(), 0
        await stage.engine.read(far.session, there, deadline_s=10)
        assert (view == expected).all()
        await stage.engine.unregister(arena.region)


async def test_transfers_to_one_peer_at_the_same_time_all_land(stage: Stage) -> None:
    far = await stage.far()
    stage.memory[:] = 3
    quarters = [stage.plan(far, 1 << 20, first=n << 20) for n in range(4)]
    await asyncio.gather(*(stage.engine.write(far.session, quarter, deadline_s=10) for quarter in quarters))
    assert await far.count(3) == 4 << 20


async def test_an_empty_plan_is_done_at_once_whoever_it_is_for(stage: Stage) -> None:
    await stage.engine.write("127.0.0.1:1", CopyPlan.of(), deadline_s=0.1)


async def test_a_probe_shows_who_is_there_and_what_may_be_reached(stage: Stage) -> None:
    far = await stage.far(1 << 20)
    card = await stage.engine.probe(far.session, deadline_s=5)
    assert card.session == far.session
    assert registered(card) == (Region(far.pointer, 1 << 20),)


async def test_a_probe_of_an_address_where_nobody_is_says_refused(stage: Stage) -> None:
    assert (await failure(stage.engine.probe("127.0.0.1:1", deadline_s=5))).cause is Cause.REFUSED


async def test_a_hung_peer_costs_a_probe_its_own_deadline_and_nobody_elses(stage: Stage) -> None:
    hung, well = await stage.far(), await stage.far()
    hung.stop()
    began = time.monotonic()
    probes = [failure(stage.engine.probe(hung.session, deadline_s=2)) for _ in range(20)]
    asking = asyncio.gather(*probes)
    await stage.engine.probe(well.session, deadline_s=1.9)
    assert {found.cause for found in await asking} == {Cause.TIMED_OUT}
    assert time.monotonic() - began < 10
    hung.resume()


# --- addresses


async def test_a_place_that_the_peer_has_not_announced_is_rejected_before_a_byte_moves(stage: Stage) -> None:
    far = await stage.far()
    stage.memory[:] = 7
    plan = CopyPlan.join(stage.plan(far), CopyPlan.of((stage.arena.region.pointer, far.pointer + (4 << 20) - 1, 2)))
    error = await failure(stage.engine.write(far.session, plan, deadline_s=10))
    assert error.cause is Cause.REJECTED_ADDRESS
    assert error.settled
    assert await far.count(7) == 0


async def test_a_span_over_two_touching_regions_is_rejected(stage: Stage) -> None:
    far = await stage.far()
    card = await stage.engine.probe(far.session, deadline_s=5)
    (region,) = registered(card)
    end = region.end
    error = await failure(
        stage.engine.write(far.session, CopyPlan.of((stage.arena.region.pointer, end - 8, 16)), deadline_s=5)
    )
    assert error.cause is Cause.REJECTED_ADDRESS


async def test_a_place_past_the_end_of_all_addresses_is_rejected(stage: Stage) -> None:
    far = await stage.far()
    plan = CopyPlan.of((stage.arena.region.pointer, (1 << 63) - 8, 64))
    assert (await failure(stage.engine.write(far.session, plan, deadline_s=5))).cause is Cause.REJECTED_ADDRESS


async def test_rejected_writes_do_not_slow_the_good_ones(stage: Stage) -> None:
    far = await stage.far()
    bad = CopyPlan.of((stage.arena.region.pointer, 4096, 64))
    began = time.monotonic()
    for _ in range(8):  # the bare engine closes one of four lanes for each of these, and then waits a second
        await failure(stage.engine.write(far.session, bad, deadline_s=5))
        await stage.engine.write(far.session, stage.plan(far, 1 << 16), deadline_s=5)
    assert time.monotonic() - began < 1.0


async def test_memory_that_the_peer_registers_later_can_be_written_at_once(stage: Stage) -> None:
    far = await stage.far()
    await stage.engine.write(far.session, stage.plan(far), deadline_s=10)
    await far.register(1 << 20)
    stage.memory[:] = 5
    await stage.engine.write(far.session, stage.plan(far, 1 << 20), deadline_s=10)
    assert await far.count(5) == 1 << 20


async def test_a_source_that_is_not_registered_is_this_sides_fault(stage: Stage) -> None:
    far = await stage.far()
    error = await failure(stage.engine.write(far.session, CopyPlan.of((4096, far.pointer, 8)), deadline_s=5))
    assert error.cause is Cause.LOCAL
    await stage.engine.write(far.session, stage.plan(far), deadline_s=10)


@pytest.mark.parametrize("nbytes", [0, -1])
async def test_a_copy_of_no_bytes_is_the_callers_mistake(stage: Stage, nbytes: int) -> None:
    with pytest.raises(BadField, match="nbytes"):
        await stage.engine.write("127.0.0.1:1", CopyPlan.of((1, 1, nbytes)), deadline_s=1)


@pytest.mark.parametrize(
    "region",
    [
        pytest.param(Region(0, 4096), id="null"),
        pytest.param(Region(4096, 0), id="empty"),
        pytest.param(Region(-4096, 4096), id="negative"),
        pytest.param(Region((1 << 63) - 4096, 8192), id="wraps"),
    ],
)
async def test_a_region_that_is_no_memory_is_refused(stage: Stage, region: Region) -> None:
    with pytest.raises(BadField):
        await stage.engine.register(region)
    assert registered(await stage.engine.probe(stage.engine.session, deadline_s=5)) == (stage.arena.region,)


async def test_overlapping_regions_are_refused_and_touching_ones_are_not(stage: Stage) -> None:
    with Arena(3 << 12) as arena:
        page = [Region(arena.region.pointer + (n << 12), 1 << 12) for n in range(3)]
        await stage.engine.register(page[1])
        with pytest.raises(BadField, match="overlaps"):
            await stage.engine.register(Region(page[0].pointer, 4097))
        with pytest.raises(BadField, match="overlaps"):
            await stage.engine.register(page[1])
        await stage.engine.register(page[2])
        await stage.engine.unregister(page[1])
        await stage.engine.register(page[1])


async def test_only_what_was_registered_can_be_unregistered(stage: Stage) -> None:
    with pytest.raises(BadField, match="not registered"):
        await stage.engine.unregister(Region(stage.arena.region.pointer, 4096))


# --- peers that hang


async def test_a_hung_peer_fails_the_transfer_only_when_nothing_can_touch_its_source_any_more(stage: Stage) -> None:
    far = await stage.far()
    stage.memory[:] = 1
    await stage.engine.write(far.session, stage.plan(far, 1 << 16), deadline_s=10)
    far.stop()
    error = await failure(stage.engine.write(far.session, stage.plan(far, block=1 << 20), deadline_s=20))
    assert (error.cause, error.settled) == (Cause.TIMED_OUT, True)
    stage.memory[:] = 2  # the caller uses its pages again
    far.resume()
    await stage.engine.probe(far.session, deadline_s=10)
    await until_told(
        lambda: _writes_again(stage, far.session, CopyPlan.of((stage.arena.region.pointer, far.pointer, 1)))
    )
    assert await far.count(2) == 1


async def _writes_again(stage: Stage, session: str, plan: CopyPlan) -> bool:
    try:
        await stage.engine.write(session, plan, deadline_s=5)
    except TransferFailed:
        return False
    return True


async def test_a_deadline_says_that_memory_is_not_at_rest_and_settle_waits_for_it(stage: Stage) -> None:
    far = await stage.far()
    await stage.engine.write(far.session, stage.plan(far, 1 << 16), deadline_s=10)
    far.stop()
    began = time.monotonic()
    error = await failure(stage.engine.write(far.session, stage.plan(far, block=1 << 20), deadline_s=0.2))
    assert (error.cause, error.settled) == (Cause.TIMED_OUT, False)
    assert time.monotonic() - began < STALL_S * 0.8
    await stage.engine.settle(far.session)
    assert time.monotonic() - began >= STALL_S * 0.8
    far.resume()


async def test_settle_of_a_session_where_nothing_moves_returns_at_once(stage: Stage) -> None:
    async with asyncio.timeout(0.5):
        await stage.engine.settle("127.0.0.1:1")


async def test_a_cancelled_write_stops_and_waits_for_rest(stage: Stage) -> None:
    far = await stage.far()
    await stage.engine.write(far.session, stage.plan(far, 1 << 16), deadline_s=10)
    far.stop()
    writing = asyncio.create_task(stage.engine.write(far.session, stage.plan(far, block=1 << 20), deadline_s=20))
    done, _ = await asyncio.wait([writing], timeout=0.2)
    assert not done
    writing.cancel()
    done, _ = await asyncio.wait([writing], timeout=0.2)
    assert not done, "blocks are in flight, the caller may not have its memory back yet"
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    async with asyncio.timeout(0.1):
        await stage.engine.settle(far.session)
    far.resume()


async def test_a_transfer_never_waits_for_another_peer_that_hangs(stage: Stage) -> None:
    """Neither behind its blocks in flight nor behind its very first use."""
    hung, fresh, well = await stage.far(), await stage.far(), await stage.far()
    await stage.engine.write(hung.session, stage.plan(hung, 1 << 16), deadline_s=10)
    hung.stop()
    fresh.stop()
    failing = [
        asyncio.create_task(failure(stage.engine.write(far.session, stage.plan(far, block=1 << 20), deadline_s=20)))
        for far in (hung, fresh)
    ]
    await asyncio.sleep(0)
    began = time.monotonic()
    for _ in range(10):
        await stage.engine.write(well.session, stage.plan(well, 1 << 18), deadline_s=5)
    assert time.monotonic() - began < STALL_S * 0.9
    assert {error.cause for error in await asyncio.gather(*failing)} == {Cause.TIMED_OUT}
    hung.resume()
    fresh.resume()


async def test_a_peer_that_hung_is_usable_again_without_being_announced_anew(stage: Stage) -> None:
    far = await stage.far()
    stage.memory[:] = 6
    far.stop()
    await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=0.3))
    far.resume()
    await until_told(lambda: _writes_again(stage, far.session, stage.plan(far)))
    assert await far.count(6) == 4 << 20


async def test_the_first_transfer_after_a_peer_came_back_succeeds(stage: Stage) -> None:
    """Connections broke while it hung, and each is found out by using it: without asking again, 2 of 3 rounds fail."""
    far = await stage.far()
    plan = stage.plan(far, 4 * 4096, block=4096)
    await stage.engine.write(far.session, plan, deadline_s=10)
    for value in range(1, 6):
        far.stop()
        assert (await failure(stage.engine.write(far.session, plan, deadline_s=20))).cause is Cause.TIMED_OUT
        stage.memory[:] = value
        far.resume()
        await stage.engine.probe(far.session, deadline_s=10)
        # To another place: what the failed blocks left in the kernel may still land where they were sent (H12).
        anew = stage.plan(far, 4 * 4096, block=4096, first=value << 16)
        await stage.engine.write(far.session, anew, deadline_s=10)
        assert await far.count(value) == anew.total


# --- peers that die


async def test_a_killed_peer_fails_the_transfer_and_is_refused_from_then_on(stage: Stage) -> None:
    far = await stage.far()
    await stage.engine.write(far.session, stage.plan(far), deadline_s=10)
    await far.kill()
    error = await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=20))
    assert error.cause in (Cause.PEER_GONE, Cause.REFUSED)
    assert error.settled
    began = time.monotonic()
    assert (await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=20))).cause is Cause.REFUSED
    assert time.monotonic() - began < 0.5


async def test_a_process_that_took_a_dead_peers_place_is_not_written_to_until_forget(stage: Stage) -> None:
    far = await stage.far(at="anywhere")
    stage.memory[:] = 8
    await stage.engine.write(far.session, stage.plan(far), deadline_s=10)
    await far.kill()
    await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=20))
    heir = await stage.far(at=far.session)
    assert heir.session == far.session
    for _ in range(3):
        error = await failure(stage.engine.write(heir.session, stage.plan(heir), deadline_s=20))
        assert error.cause is Cause.PEER_CHANGED
    assert await heir.count(8) == 0
    stage.engine.forget(heir.session)
    await until_told(lambda: _writes_again(stage, heir.session, stage.plan(heir)))
    assert await heir.count(8) == 4 << 20


# --- the end


async def test_a_closed_engine_says_so_and_is_nobody_elses_fault() -> None:
    async with open_loopback(Directory()) as closed:
        pass
    async with open_mooncake(MooncakeSettings(), Cpu()) as shut:
        pass
    for engine in (closed, shut):
        error = await failure(engine.write("127.0.0.1:1", CopyPlan.of((1, 1, 1)), deadline_s=1))
        assert error.cause is Cause.LOCAL
        with pytest.raises(TransferFailed):
            await engine.register(Region(4096, 1))


async def test_what_the_engine_can_do_is_known_at_open(stage: Stage) -> None:
    found = stage.engine.capabilities
    assert found.name in ("mooncake", "loopback")
    assert found.version not in ("", "unknown")
    assert found.async_read
