"""
Journal first, then acknowledge: nobody sees what is not journalled, what a journal refuses has not happened, and who
comes together shares one write.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Change, Claim, Life, Owner, Standing
from pdctl.core.registry import Registry
from pdctl.core.rooms import RoomBook
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import JournalUnavailable, LimitReached, Occupied, Superseded, UnknownLease
from pdctl.metrics import Metrics
from pdctl.persistence.base import Kept, Room
from pdctl.persistence.memory import MemoryJournal
from pdctl.registrar import Registrar
from tests.conftest import Clock
from tests.patience import unhindered

HOME, ELSEWHERE = "10.0.0.1", "10.0.0.2"
FIRST = Seat(0, 0, 0, 0)


def claim(tp: int = 0, *, size: int = 2, port: int = 0, host: str = HOME, ttl_s: float | None = None) -> Claim:
    shape = Shape(attn_tp_size=size, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype=None)
    announcement = Announcement(Seat(0, 0, tp, 0), shape, Endpoint(host, port or 40000 + tp))
    return Claim("a", announcement, Owner(host), ttl_s=ttl_s)


class Disk(MemoryJournal):
    """A journal that waits for its gate, can be full or broken, counts its writes, and keeps rooms."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.trouble: str | None = None
        self.defect: Exception | None = None
        self.writes: list[int] = []
        self.rooms: dict[int, int] = {}

    async def append(self, changes: Sequence[Change], rooms: Sequence[Room] = ()) -> None:
        await self.gate.wait()
        if self.defect is not None:
            raise self.defect
        if self.trouble is not None:
            raise JournalUnavailable(f"{self.trouble}: free some space", cause=self.trouble)
        self.writes.append(len(changes) + len(rooms))
        self.rooms |= dict(rooms)
        await super().append(changes, rooms)

    async def load(self) -> Kept:
        kept = await super().load()
        return Kept(kept.records, tuple(self.rooms.items()), kept.last_epoch, kept.revision)

    async def epochs(self) -> list[int]:
        return [record.epoch for record in (await self.load()).records]


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def registrar(disk: Disk, clock: Clock) -> Registrar:
    return Registrar(Registry(), RoomBook(), disk, Metrics(), clock)


def held(registrar: Registrar) -> dict[Seat, Life]:
    view = registrar.view("a")
    return {} if view is None else dict(view.alive)


async def begun(*tasks: asyncio.Task[Life]) -> None:
    """Let the tasks come to where they wait for the journal."""
    done, _ = await asyncio.wait(tasks, timeout=0.05)
    assert not done


async def swept(registrar: Registrar, until: Callable[[], bool]) -> None:
    """Run the sweep until it has brought this about."""
    sweeping = asyncio.create_task(registrar.sweep())
    async with asyncio.timeout(60):
        while not until():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.01)
    sweeping.cancel()
    await asyncio.wait({sweeping})


async def test_nobody_sees_a_claim_before_the_journal_has_it(registrar: Registrar, disk: Disk) -> None:
    disk.gate.clear()
    pending = asyncio.create_task(registrar.register(claim()))
    await begun(pending)
    assert (held(registrar), registrar.revision) == ({}, 0)
    disk.gate.set()
    life = await pending
    assert held(registrar) == {FIRST: life}


async def test_what_the_journal_refuses_has_not_happened(registrar: Registrar, disk: Disk) -> None:
    """Nor is anybody told that he was replaced, by a claim that came to nothing."""
    kept = await registrar.register(claim(ttl_s=10.0))
    disk.trouble = "the disk is full"
    attempts = [
        registrar.register(claim(port=50000, ttl_s=10.0)),
        registrar.register(claim(1)),
        registrar.leave("a", FIRST, kept.epoch),
        registrar.drain("a", None, 10.0),
        registrar.announce_room(7, 1),
    ]
    answers = await asyncio.gather(*attempts, return_exceptions=True)
    assert [type(answer) for answer in answers] == [JournalUnavailable] * 5
    assert held(registrar) == {FIRST: kept}
    assert registrar.rooms([7]) == {}
    assert registrar.unready() == ["the journal takes no rows: the disk is full"]
    disk.trouble = None
    assert (await registrar.register(claim(1))).epoch > kept.epoch
    assert registrar.topology("a").ready
    assert registrar.unready() == []


async def test_who_comes_together_shares_one_write(registrar: Registrar, disk: Disk) -> None:
    disk.gate.clear()
    first = asyncio.create_task(registrar.register(claim(0, size=100)))
    await begun(first)
    others = [asyncio.create_task(registrar.register(claim(tp, size=100))) for tp in range(1, 100)]
    rooms = [asyncio.create_task(registrar.announce_room(room, 0)) for room in range(50)]
    await begun(*others)
    disk.gate.set()
    await asyncio.gather(first, *others, *rooms)
    assert disk.writes == [1, 99 + 1 + 50]  # with the completion
    assert registrar.topology("a").ready


async def test_one_refused_claim_does_not_take_its_group_along(registrar: Registrar, disk: Disk) -> None:
    await registrar.register(claim(ttl_s=10.0))
    disk.gate.clear()
    tasks = [
        asyncio.create_task(registrar.register(each)) for each in (claim(1), claim(host=ELSEWHERE), claim(port=50000))
    ]
    await asyncio.sleep(0)
    disk.gate.set()
    good, bad, moved = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(bad, Occupied)
    assert isinstance(good, Life)
    assert isinstance(moved, Life)
    assert held(registrar) == {FIRST: moved, good.seat: good}
    assert await disk.epochs() == sorted(life.epoch for life in (good, moved))


async def test_of_two_hosts_that_fight_for_a_seat_one_has_it_and_the_other_is_told(
    registrar: Registrar, disk: Disk
) -> None:
    """Both claim again and again, at the same time: the seat never changes hands, and the journal agrees."""
    hosts = (HOME, ELSEWHERE)
    won: set[str] = set()
    for _ in range(50):
        answers = await asyncio.gather(
            *(registrar.register(claim(host=host, ttl_s=10.0)) for host in hosts), return_exceptions=True
        )
        won |= {host for host, answer in zip(hosts, answers, strict=True) if isinstance(answer, Life)}
        assert sum(isinstance(answer, Occupied) for answer in answers) == 1
    assert len(won) == 1
    assert await disk.epochs() == [held(registrar)[FIRST].epoch] == [1]


async def test_of_two_processes_of_one_host_the_later_has_the_seat_and_the_other_is_told(registrar: Registrar) -> None:
    """A restart wins at once; the process that was replaced, should it live on, learns it with its next renewal."""
    one = await registrar.register(claim(port=50001, ttl_s=10.0))
    two = await registrar.register(claim(port=50002, ttl_s=10.0))
    with pytest.raises(Superseded, match=rf"held by epoch {two.epoch}, got {one.epoch}"):
        await registrar.renew("a", FIRST, one.epoch, one.owner)
    assert await registrar.renew("a", FIRST, two.epoch, two.owner) == two
    with pytest.raises(Occupied):
        await registrar.leave("a", FIRST, two.epoch, Owner(ELSEWHERE))


async def test_a_caller_that_has_gone_changes_nothing_for_the_others(registrar: Registrar, disk: Disk) -> None:
    disk.gate.clear()
    first = asyncio.create_task(registrar.register(claim(0, size=3)))
    await begun(first)
    gone, stays = (asyncio.create_task(registrar.register(claim(tp, size=3))) for tp in (1, 2))
    await begun(gone, stays)
    gone.cancel()
    first.cancel()  # its write is under way: it happens, and nobody is told
    await asyncio.wait({gone, first})
    disk.gate.set()
    await stays
    assert [seat.tp for seat in held(registrar)] == [0, 2]
    assert len(await disk.epochs()) == 2


async def test_a_defect_of_the_journal_is_told_to_who_waits_and_the_registry_goes_on(
    registrar: Registrar, disk: Disk
) -> None:
    disk.defect = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        await registrar.register(claim())
    disk.defect = None
    assert (await registrar.register(claim())).seat == FIRST


async def test_a_renewal_needs_no_disk(registrar: Registrar, disk: Disk, clock: Clock) -> None:
    life = await registrar.register(claim(ttl_s=10.0))
    disk.trouble = "the disk is full"
    for _ in range(5):
        clock.forward(9.0)
        await registrar.renew("a", FIRST, life.epoch, life.owner)
        await registrar.register(claim(ttl_s=10.0))  # word for word: the same as to renew
    assert held(registrar)[FIRST].due == clock() + 10.0


async def test_a_lease_ends_without_a_disk_and_is_written_when_there_is_one(
    registrar: Registrar, disk: Disk, clock: Clock
) -> None:
    life = await registrar.register(claim(ttl_s=10.0))
    disk.trouble = "the disk is full"
    clock.forward(10.0)
    await swept(registrar, lambda: not held(registrar))
    assert disk._records[life.epoch].lost is None
    disk.trouble = None
    await swept(registrar, lambda: disk._records[life.epoch].lost is not None)
    with pytest.raises(UnknownLease, match="register again"):
        await registrar.renew("a", FIRST, life.epoch, life.owner)


async def test_a_witness_needs_no_disk_either(registrar: Registrar, disk: Disk) -> None:
    life = await registrar.register(claim(size=1))
    disk.trouble = "the disk is full"
    await registrar.witnessed("a", FIRST, life.epoch, alive=False, why="refuses connections")
    assert registrar.health("a") == (
        "instance a is known to be dead: the rank in dp0/cp0/tp0/pp0 at 10.0.0.1:40000 refuses connections, 0 s ago: "
        "start it again"
    )
    await registrar.witnessed("a", FIRST, life.epoch, alive=True)
    assert registrar.health("a") is None
    assert registrar.topology("a").alive[FIRST].epoch == life.epoch


async def test_a_restarted_registry_gives_one_full_lease_to_speak_up_in(
    registrar: Registrar, disk: Disk, clock: Clock
) -> None:
    leased, stock = await registrar.register(claim(0, ttl_s=10.0)), await registrar.register(claim(1))
    await registrar.announce_room(2**70, 3)
    clock.forward(1000.0)
    again = Registrar(Registry(), RoomBook(), disk, Metrics(), clock)
    await again.restore()
    standing = {life.epoch: life.standing(clock()) for life in again.topology("a").alive.values()}
    assert standing == {leased.epoch: Standing.SUSPECT, stock.epoch: Standing.ALIVE}
    assert again.rooms([2**70]) == {2**70: 3}
    clock.forward(9.9)
    assert (await again.renew("a", FIRST, leased.epoch, leased.owner)).standing(clock()) is Standing.ALIVE
    assert (await again.register(claim(0, port=50000))).epoch == 3
    assert again.revision > registrar.revision


async def test_a_drained_rank_takes_nothing_new_and_goes_with_its_last_room(
    registrar: Registrar, disk: Disk, clock: Clock
) -> None:
    life = await registrar.register(claim(size=1, ttl_s=10.0))
    await registrar.drain("a", FIRST, grace_s=60.0)
    with pytest.raises(Exception, match="is draining and takes no new pairs"):
        registrar.topology("a")
    assert registrar.health("a") is None
    clock.forward(5.0)
    await registrar.renew("a", FIRST, life.epoch, life.owner, rooms=1)
    assert held(registrar)
    await registrar.renew("a", FIRST, life.epoch, life.owner, rooms=0)
    assert (held(registrar), disk._records[life.epoch].lost) == ({}, "was drained")
    with pytest.raises(Superseded, match="was drained: exit"):
        await registrar.renew("a", FIRST, life.epoch, life.owner)


async def test_who_listens_hears_every_change_once_in_order(registrar: Registrar, disk: Disk, clock: Clock) -> None:
    heard: list[Change] = []
    stop = registrar.herald.subscribe(heard.extend)
    await asyncio.gather(*(registrar.register(claim(tp, ttl_s=10.0)) for tp in (0, 1)))
    disk.trouble = "the disk is full"
    with pytest.raises(JournalUnavailable):
        await registrar.register(claim(0, port=50000))
    disk.trouble = None
    clock.forward(5.0)
    await swept(registrar, lambda: len(heard) >= 5)
    kinds = [change.kind for change in heard]
    assert kinds == [ChangeKind.SEATED, ChangeKind.SEATED, ChangeKind.COMPLETED, *[ChangeKind.SUSPECTED] * 2]
    revisions = [change.revision for change in heard]
    assert revisions == sorted(set(revisions))
    stop()
    await registrar.register(claim(0, port=50000))
    assert len(heard) == 5


async def test_of_two_rooms_for_one_place_one_is_refused(disk: Disk, clock: Clock) -> None:
    registrar = Registrar(Registry(), RoomBook(limit=1), disk, Metrics(), clock)
    answers = await asyncio.gather(*(registrar.announce_room(room, 0) for room in (1, 2)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [type(None), LimitReached]
    with pytest.raises(LimitReached):
        await registrar.announce_room(3, 0)
    await registrar.announce_room(1, 5)
    assert registrar.rooms([1, 2, 3]) == {1: 5}


async def test_a_lease_ends_within_a_second_of_its_end_in_real_time(disk: Disk) -> None:
    registrar = Registrar(Registry(), RoomBook(), disk, Metrics(), time.monotonic)
    async with unhindered() as took_s:
        await asyncio.gather(*(registrar.register(claim(tp, size=1000, ttl_s=0.5)) for tp in range(1000)))
        registered_in = took_s()
        await swept(registrar, lambda: not held(registrar))
        assert took_s() < registered_in + 0.5 + 3.0  # of which a second is promised, and two are the disk's


async def test_a_registry_that_stood_still_ends_no_lease_for_it(disk: Disk) -> None:
    """While the process was stopped nobody could renew: its clients must not pay for that."""
    registrar = Registrar(Registry(), RoomBook(), disk, Metrics(), time.monotonic)
    life = await registrar.register(claim(ttl_s=1.0))
    running = [asyncio.create_task(loop) for loop in (registrar.listen(), registrar.sweep())]
    await asyncio.sleep(0)
    time.sleep(2.5)  # noqa: ASYNC251  # the stop itself
    for _ in range(20):
        await asyncio.sleep(0)
    assert held(registrar) == {FIRST: life}
    await registrar.renew("a", FIRST, life.epoch, life.owner)
    for task in running:
        task.cancel()
    await asyncio.wait(running)


async def test_ten_thousand_leases_end_in_slices(disk: Disk, clock: Clock) -> None:
    """Whoever else is served meanwhile waits for one slice, not for all. CPU time: the machine is shared."""
    registrar = Registrar(Registry(), RoomBook(), disk, Metrics(), clock)
    for start in range(0, 10_000, 500):
        await asyncio.gather(
            *(registrar.register(claim(tp, size=10_000, ttl_s=10.0)) for tp in range(start, start + 500))
        )
    gone, turns = 0, [0.0]

    def count(changes: Sequence[Change]) -> None:
        nonlocal gone
        gone += len(changes)

    registrar.herald.subscribe(count)
    clock.forward(10.0)
    sweeping = asyncio.create_task(registrar.sweep())
    gc.disable()  # a pass over all that earlier tests have left would count for a slice
    try:
        async with asyncio.timeout(60):
            while gone < 10_000:
                before = time.process_time()
                await asyncio.sleep(0)
                turns.append(time.process_time() - before)
    finally:
        gc.enable()
    sweeping.cancel()
    await asyncio.wait({sweeping})
    assert len([turn for turn in turns if turn > 0.0001]) >= 10_000 / 200
    assert max(turns) < 0.05


class Ear:
    """What somebody was told who offered something."""

    def __init__(self) -> None:
        self.told: list[BaseException | None] = []
        self.heard = asyncio.Event()

    def __call__(self, error: BaseException | None) -> None:
        self.told.append(error)
        self.heard.set()


async def test_who_offers_a_claim_or_a_room_is_told_when_the_journal_has_it_and_once(
    registrar: Registrar, disk: Disk
) -> None:
    disk.gate.clear()
    seat, room = Ear(), Ear()
    registrar.offer(claim(), seat)
    registrar.offer_room(7, 1, room)
    await asyncio.sleep(0.05)
    assert (seat.told, room.told, held(registrar), registrar.rooms([7])) == ([], [], {}, {})
    disk.gate.set()
    await asyncio.gather(seat.heard.wait(), room.heard.wait())
    assert (seat.told, room.told, list(held(registrar)), registrar.rooms([7])) == ([None], [None], [FIRST], {7: 1})


async def test_who_offers_what_cannot_be_is_told_why(registrar: Registrar, disk: Disk) -> None:
    await registrar.register(claim(ttl_s=10.0))
    occupied, seat, room = Ear(), Ear(), Ear()
    registrar.offer(claim(host=ELSEWHERE, port=50000), occupied)
    await occupied.heard.wait()
    disk.trouble = "the disk is full"
    registrar.offer(claim(1), seat)
    registrar.offer_room(7, 1, room)
    await asyncio.gather(seat.heard.wait(), room.heard.wait())
    kinds = [[type(error) for error in ear.told] for ear in (occupied, seat, room)]
    assert kinds == [[Occupied], [JournalUnavailable], [JournalUnavailable]]
    assert (list(held(registrar)), registrar.rooms([7])) == ([FIRST], {})


async def test_who_offers_what_is_known_is_told_at_once_and_has_spoken(
    registrar: Registrar, disk: Disk, clock: Clock
) -> None:
    life = await registrar.register(claim(ttl_s=10.0))
    disk.gate.clear()
    for silent_s, standing in ((4.0, Standing.ALIVE), (6.0, Standing.SUSPECT)):
        now = clock.forward(silent_s)
        if standing is Standing.SUSPECT:
            await swept(registrar, lambda: life.pulse.suspected)
        ear = Ear()
        registrar.offer(claim(ttl_s=10.0), ear)
        assert ear.told == [None]
        assert (life.pulse.spoke_at, life.standing(now)) == (now, Standing.ALIVE)
