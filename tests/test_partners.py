"""What a decode rank has registered is paired once, and never after it has registered something else."""

from __future__ import annotations

from pdctl.core.allowance import SenderLimits
from tests.conftest import Clock
from tests.room_rig import memory
from tests.test_sender import Decode, Rig, rig_of


async def moved(rig: Rig, decode: Decode, room: int, page: int) -> None:
    async with rig.sender.open(room) as sending:
        decode.name(room, [page])
        await sending.peers_ready()
        await sending.finish(0, pages=[3])


async def test_a_room_after_another_registration_goes_to_the_other_memory(clock: Clock) -> None:
    async with rig_of(clock) as rig:
        before = rig.decode()
        before.register()
        await moved(rig, before, 5, 1)
        after = rig.decode(memory=memory())
        after.register()
        await moved(rig, after, 6, 2)
        assert before.memory.kv[0][1].any()
        assert not before.memory.kv[0][2].any(), "that memory was taken back"
        assert (after.memory.kv[0][2] == rig.memory.kv[0][3]).all()


async def test_rooms_of_one_registration_are_paired_once(clock: Clock) -> None:
    async with rig_of(clock) as rig:
        decode = rig.decode()
        decode.register()
        await moved(rig, decode, 5, 1)
        paired = dict(rig.sender.partners._paired)
        await moved(rig, decode, 6, 2)
        assert rig.sender.partners._paired == paired
        assert rig.sender.partners._paired[decode.session] is paired[decode.session]


async def test_of_a_rank_that_is_forgotten_no_pairing_is_kept(clock: Clock) -> None:
    async with rig_of(clock, limits=SenderLimits(max_peers=1)) as rig:
        first, second = rig.decode(7), rig.decode(8)
        first.register()
        await moved(rig, first, 5, 1)
        second.register()
        assert rig.sender.sessions == (second.session,)
        assert not rig.sender.partners._paired
