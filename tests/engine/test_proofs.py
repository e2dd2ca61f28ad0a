"""How deep a peer is proven, held over both adapters: who is there, and whether its memory can be reached."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from pdctl.core.kinds import Depth
from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.engine.canary import NBYTES
from pdctl.engine.loopback import Directory, open_loopback
from pdctl.engine.pins import Pins
from pdctl.engine.promises import PromisedEngine
from pdctl.errors import Cause
from pdctl.memory import Arena
from tests.engine.conftest import STALL_S, Far, Stage
from tests.engine.peer import be_stock
from tests.engine.test_contract import failure
from tests.patience import unhindered

NONCE, BYTE = "nonce written and read back", "one byte read"


def one_byte(stage: Stage, far: Far) -> CopyPlan:
    return CopyPlan.of((stage.arena.region.pointer, far.pointer, 1))


# --- peers that are well


@pytest.mark.parametrize("used", [False, True], ids=["never used", "in use"])
async def test_a_peer_of_ours_is_proven_by_a_nonce_there_and_back(stage: Stage, used: bool) -> None:
    far = await stage.far()
    if used:
        await stage.engine.write(far.session, one_byte(stage, far), deadline_s=30)
    for _ in range(3):
        proof = await stage.engine.prove(far.session, deadline_s=30)
        assert (proof.depth, proof.how, proof.cured) == (Depth.DATA, NONCE, None)
        assert len(proof.card.boot) == 16


async def test_a_proof_pins_nothing_and_touches_nobodys_bytes(stage: Stage) -> None:
    far = await stage.far()
    await far.fill(9)
    await stage.engine.prove(far.session, deadline_s=30)
    assert stage.engine.card(far.session) is None
    assert await far.count(9) == 4 << 20


async def test_a_proof_shows_the_life_that_transfers_have_pinned(stage: Stage) -> None:
    far = await stage.far()
    await stage.engine.write(far.session, one_byte(stage, far), deadline_s=30)
    pinned = stage.engine.card(far.session)
    assert pinned is not None
    assert pinned.boot == (await stage.engine.prove(far.session, deadline_s=30)).card.boot != b""


async def test_a_stock_peer_is_proven_by_one_byte_that_is_read_and_none_that_is_written(stage: Stage) -> None:
    far = await stage.far()
    await far.be_stock()
    await far.fill(9)
    proof = await stage.engine.prove(far.session, deadline_s=30)
    assert (proof.depth, proof.how, proof.card.boot) == (Depth.DATA, BYTE, b"")
    assert await far.count(9) == 4 << 20


async def test_a_stock_region_of_the_canarys_length_is_only_ever_read() -> None:
    directory = Directory()
    async with open_loopback(directory) as here, open_loopback(directory) as there:
        await be_stock(there)
        with Arena(NBYTES) as arena:
            view = arena.array(NBYTES, np.uint8)
            view[:] = 9
            await there.register(Region(arena.region.pointer, NBYTES))
            proof = await here.prove(there.session, deadline_s=30)
            assert (proof.how, proof.card.boot) == (BYTE, b"")
            assert (view == 9).all()


async def test_a_peer_that_shows_no_memory_is_proven_by_its_identity_alone(stage: Stage) -> None:
    far = await stage.far()
    await far.be_stock()
    await far.unregister(far.pointer)
    proof = await stage.engine.prove(far.session, deadline_s=30)
    assert (proof.depth, proof.how) == (Depth.IDENTITY, "descriptor compared")
    await far.register(4096)


async def test_many_proofs_of_one_peer_at_once_are_all_good(stage: Stage) -> None:
    far = await stage.far()
    proofs = await asyncio.gather(*(stage.engine.prove(far.session, deadline_s=30) for _ in range(50)))
    assert {proof.how for proof in proofs} == {NONCE}


async def test_a_proof_goes_on_beside_transfers(stage: Stage) -> None:
    far = await stage.far()
    stage.memory[:] = 5
    writing = [asyncio.create_task(stage.engine.write(far.session, stage.plan(far), deadline_s=30)) for _ in range(4)]
    assert (await stage.engine.prove(far.session, deadline_s=30)).depth is Depth.DATA
    await asyncio.gather(*writing)
    assert await far.count(5) == 4 << 20


# --- peers that are not


async def test_nobody_there_is_refused(stage: Stage) -> None:
    assert (await failure(stage.engine.prove("127.0.0.1:1", deadline_s=30))).cause is Cause.REFUSED


async def test_whoever_was_asked_and_is_not_there_leaves_nothing_behind(stage: Stage) -> None:
    """Anybody may name an address to be asked."""
    assert isinstance(stage.engine, PromisedEngine)
    for n in range(50):
        await failure(stage.engine.prove(f"127.0.0.1:{n + 1}", deadline_s=30))
    assert len(stage.engine._pins._asking) == 0


async def test_a_hung_peer_costs_a_proof_its_own_deadline_and_nobody_elses(stage: Stage) -> None:
    hung, well = await stage.far(), await stage.far()
    await stage.engine.write(hung.session, one_byte(stage, hung), deadline_s=30)
    hung.stop()
    began = time.monotonic()
    asking = [asyncio.create_task(failure(stage.engine.prove(hung.session, deadline_s=5))) for _ in range(20)]
    await asyncio.sleep(0)
    assert (await stage.engine.prove(well.session, deadline_s=4.9)).depth is Depth.DATA
    assert {found.cause for found in await asyncio.gather(*asking)} == {Cause.TIMED_OUT}
    assert time.monotonic() - began < 50, "one after the other they would take 100 s"
    hung.resume()


async def test_a_peer_that_hung_and_goes_on_is_proven_at_once(stage: Stage) -> None:
    far = await stage.far()
    await stage.engine.write(far.session, one_byte(stage, far), deadline_s=30)
    far.stop()
    await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=0.3))
    await failure(stage.engine.prove(far.session, deadline_s=0.3))
    far.resume()
    assert (await stage.engine.prove(far.session, deadline_s=30)).depth is Depth.DATA


async def test_a_proof_can_be_cancelled_at_once_and_the_next_one_is_good(stage: Stage) -> None:
    far = await stage.far()
    await stage.engine.prove(far.session, deadline_s=30)
    far.stop()
    proving = asyncio.create_task(stage.engine.prove(far.session, deadline_s=30))
    await asyncio.wait([proving], timeout=0.1)
    began = time.monotonic()
    proving.cancel()
    await asyncio.wait([proving])
    assert proving.cancelled()
    assert time.monotonic() - began < 15, "its deadline is 30 s"
    far.resume()
    assert (await stage.engine.prove(far.session, deadline_s=30)).depth is Depth.DATA


async def test_a_process_that_took_a_dead_peers_place_is_never_proven_as_it(stage: Stage) -> None:
    far = await stage.far(at="anywhere")
    await stage.engine.write(far.session, one_byte(stage, far), deadline_s=30)
    await far.kill()
    heir = await stage.far(at=far.session)
    for _ in range(3):
        assert (await failure(stage.engine.prove(heir.session, deadline_s=30))).cause is Cause.PEER_CHANGED
    stage.engine.forget(heir.session)
    assert (await stage.engine.prove(heir.session, deadline_s=30)).depth is Depth.DATA


async def test_a_new_life_with_the_ports_and_addresses_of_the_old_one_is_told_by_its_boot_id(stage: Stage) -> None:
    far = await stage.far()
    stage.memory[:] = 8
    await stage.engine.write(far.session, one_byte(stage, far), deadline_s=30)
    await far.be_reborn()
    assert (await failure(stage.engine.prove(far.session, deadline_s=30))).cause is Cause.PEER_CHANGED
    stage.engine._pins.doubt(far.session)  # type: ignore[attr-defined]
    assert (await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=30))).cause is Cause.PEER_CHANGED
    assert await far.count(8) == 1, "what was written before"
    stage.engine.forget(far.session)
    await stage.engine.write(far.session, stage.plan(far), deadline_s=30)


async def test_a_life_whose_canary_is_gone_is_another(stage: Stage) -> None:
    far = await stage.far()
    await stage.engine.write(far.session, one_byte(stage, far), deadline_s=30)
    await far.be_stock()
    assert (await failure(stage.engine.prove(far.session, deadline_s=30))).cause is Cause.PEER_CHANGED


@pytest.mark.parametrize("used", [False, True], ids=["never used", "in use"])
async def test_a_peer_whose_data_port_is_dead_has_no_data_until_it_is_mended(stage: Stage, used: bool) -> None:
    far = await stage.far(at="a cable")
    stage.memory[:] = 3
    if used:
        await stage.engine.write(far.session, one_byte(stage, far), deadline_s=30)
    await far.cut()
    for _ in range(3):
        async with unhindered() as took_s:
            assert (await failure(stage.engine.prove(far.session, deadline_s=3.0))).cause is Cause.NO_DATA
            assert took_s() < 3.5
    await far.mend()
    proof = await stage.engine.prove(far.session, deadline_s=30)
    assert proof.depth is Depth.DATA
    await stage.engine.write(far.session, stage.plan(far), deadline_s=30)
    assert await far.count(3) == 4 << 20


async def test_a_first_transfer_to_a_dead_data_port_fails_at_once_and_settled(stage: Stage) -> None:
    far = await stage.far(at="a cable")
    await far.cut()
    began = time.monotonic()
    error = await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=30))
    assert (error.cause, error.settled) == (Cause.NO_DATA, True)
    assert time.monotonic() - began < STALL_S * 0.9


async def test_a_closed_engine_proves_nothing() -> None:
    async with open_loopback(Directory()) as engine:
        pass
    assert (await failure(engine.prove("127.0.0.1:1", deadline_s=1))).cause is Cause.LOCAL


# --- slots


async def proven_beside_a_vandal(chance: list[int]) -> Depth:
    """A proof whose slots are `chance`, of a peer in whose first slot somebody else always writes."""
    directory = Directory()
    async with open_loopback(directory) as here, open_loopback(directory) as there:
        assert isinstance(here, PromisedEngine)
        assert isinstance(there, PromisedEngine)
        canary, slots = there.canary, iter(chance)

        async def vandal() -> None:
            while True:
                canary.view(64, 16)[:] = b"not what you put"
                await asyncio.sleep(0)

        here._pins = Pins(
            here._carrier, here._questions, here._patience, here._loop.time, chance=lambda n: next(slots) % n
        )
        task = asyncio.create_task(vandal())
        try:
            return (await here.prove(there.session, deadline_s=30)).depth
        finally:
            task.cancel()
            await asyncio.wait([task])


async def test_a_slot_that_another_prover_chose_too_is_left_for_the_next() -> None:
    assert await proven_beside_a_vandal([0, 0, 1]) is Depth.DATA


async def test_memory_that_never_holds_what_was_written_is_no_data() -> None:
    error = await failure(proven_beside_a_vandal([0] * 9))
    assert error.cause is Cause.NO_DATA
    assert "did not come back" in error.detail
