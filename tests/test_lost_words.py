"""What a connection had taken when it broke: each word of a room's life lost once, and the room well all the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.comparing import Checksum
from pdctl.core.frames import Frames
from pdctl.core.transfer import Phase, RoomTimeouts
from pdctl.core.wire import (
    AGAIN,
    Abort,
    AbortAck,
    Matched,
    Metadata,
    RegisterBuffers,
    Status,
    parse_to_decode,
    parse_to_prefill,
)
from pdctl.errors import RoomFailed, Unreachable
from pdctl.metrics import Metrics
from pdctl.receiver import Receiver
from pdctl.sender import Sender
from tests.patience import until
from tests.room_rig import Released, RigEngine, RigGate, memory

PREFILL, DECODE = Endpoint("10.0.0.1", 9001), Endpoint("10.0.0.2", 7001)
SESSION = "10.0.0.2:15999"
SOON = RoomTimeouts(remind_s=0.02, drain_margin_s=0.01, release_s=0.05)
"""Every other bound is as long as in production: what ends sooner has been said again."""
SUMMED = replace(SOON, checksum=Checksum.REQUIRED)

Loses = Callable[[object], bool]


class Way:
    """Between the two; takes every message, as ZMQ does, and loses those that it is told to."""

    def __init__(self) -> None:
        self.lost: list[object] = []
        self.passed: list[object] = []
        self._loses: list[Loses] = []
        self.is_cut, self.refused = False, 0

    def lose(self, which: Loses, times: int = 1) -> None:
        self._loses += [which] * times

    def takes(self, message: object) -> bool:
        if self.is_cut:
            self.refused += 1
            raise Unreachable("the way is cut")
        for which in self._loses:
            if which(message):
                self._loses.remove(which)
                self.lost.append(message)
                return False
        self.passed.append(message)
        return True

    def count(self, kind: type) -> int:
        return sum(isinstance(message, kind) for message in self.passed)


@dataclass
class Rig:
    way: Way
    timeouts: RoomTimeouts
    sender: Sender = field(init=False)
    receiver: Receiver = field(init=False)
    given_back: Released = field(default_factory=Released)
    metrics: tuple[Metrics, Metrics] = field(default_factory=lambda: (Metrics(), Metrics()))
    is_gone: bool = False
    hears: Callable[[Frames], None] = lambda frames: None
    """The prefill's ear."""

    async def room(self, number: int) -> None:
        """Raises RoomFailed as decode says it."""
        async with asyncio.timeout(60):
            sending = asyncio.create_task(self.send(number))
            try:
                async with self.receiver.open(number, PREFILL, [9, 4], 3, release=self.given_back) as arriving:
                    await arriving.arrived()
            finally:
                with suppress(RoomFailed):
                    await sending

    def words_lost(self) -> float:
        said = "".join(metrics.exposition()[0].decode() for metrics in self.metrics).splitlines()
        lost = [line for line in said if line.startswith("pdctl_room_words_lost_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in lost)

    async def send(self, number: int) -> None:
        async with self.sender.open(number) as room:
            await room.peers_ready()
            await room.finish(2, pages=[1, 0])


@asynccontextmanager
async def rig_of(timeouts: RoomTimeouts = SOON) -> AsyncIterator[Rig]:
    way = Way()
    rig = Rig(way, timeouts)
    ours, theirs, clock = memory(seed=1), memory(), time.monotonic

    async def to_prefill(_: Endpoint, frames: Frames) -> None:
        if way.takes(parse_to_prefill(frames)):
            rig.hears(frames)

    async def to_decode(_: Endpoint, frames: Frames) -> None:
        if way.takes(parse_to_decode(frames)):
            rig.receiver.handle(frames)

    async def is_gone(_: Endpoint) -> bool:
        return rig.is_gone

    rig.receiver = Receiver(SESSION, to_prefill, DECODE, theirs.pools, 0, 1, timeouts, clock, rig.metrics[0], is_gone)
    async with (
        Sender(RigEngine(), to_decode, ours.pools, 0, RigGate(), timeouts, clock, rig.metrics[1]) as rig.sender,
        rig.receiver,
    ):
        rig.hears = rig.sender.handle
        yield rig
        assert (rig.sender.rooms, rig.receiver.rooms, rig.sender.early) == ((), (), ())
    for mine, landed in zip(ours.kv, theirs.kv, strict=True):
        assert not landed.any() or (landed[[9, 4]] == mine[[1, 0]]).all()


def is_a(kind: type) -> Loses:
    return lambda message: isinstance(message, kind)


REGISTRATION, PAGES, STATUS, MATCH = map(is_a, (RegisterBuffers, Metadata, Status, Matched))


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param([REGISTRATION], id="registration"),
        pytest.param([PAGES], id="pages"),
        pytest.param([REGISTRATION, PAGES], id="registration and pages"),
        pytest.param([STATUS], id="status"),
        pytest.param([PAGES, STATUS], id="pages and status"),
        pytest.param([PAGES, PAGES, STATUS, STATUS], id="pages and status, twice"),
    ],
)
@pytest.mark.parametrize("timeouts", [SOON, SUMMED], ids=["plain", "summed"])
async def test_a_room_gets_over_a_word_that_is_lost(timeouts: RoomTimeouts, lost: list[Loses]) -> None:
    async with rig_of(timeouts) as rig:
        for which in lost:
            rig.way.lose(which)
        await rig.room(5)
        assert len(rig.way.lost) == len(lost)
        assert rig.words_lost() >= 1 or timeouts is SUMMED, "there the prefill says its status again by itself"
        assert await rig.given_back.next() == [9, 4]


async def test_a_room_that_is_compared_gets_over_a_word_of_its_match_that_is_lost() -> None:
    async with rig_of(SUMMED) as rig:
        rig.way.lose(MATCH, times=2)
        sending = asyncio.create_task(rig.send(5))
        async with asyncio.timeout(60):
            async with rig.receiver.open(5, PREFILL, [9, 4], 3, release=rig.given_back) as arriving:
                await arriving.arrived()
            assert rig.receiver.rooms == (), "the room is over at the decode"
            await sending
        assert len(rig.way.lost) == 2


async def test_pages_are_free_though_each_word_of_an_abort_is_lost_once() -> None:
    async with rig_of() as rig:
        rig.way.lose(is_a(Abort))
        rig.way.lose(is_a(AbortAck))
        async with asyncio.timeout(60):
            async with rig.receiver.open(5, PREFILL, [9, 4], 3, release=rig.given_back):
                pass
            assert await rig.given_back.next() == [9, 4]
        assert len(rig.way.lost) == 2
        async with rig.sender.open(5, required=1) as room:
            assert room.phase is Phase.FAILED, "the prefill has heard that decode has left"


async def test_nothing_is_said_again_of_a_room_that_goes_well() -> None:
    async with rig_of(replace(SOON, remind_s=5)) as rig:
        await rig.room(5)
        await rig.room(6)
        assert [rig.way.count(kind) for kind in (RegisterBuffers, Metadata, Status, AbortAck)] == [1, 2, 2, 0]


async def test_a_room_that_waits_for_its_prefill_is_named_more_seldom_and_not_ever_more() -> None:
    async with rig_of() as rig:
        async with asyncio.timeout(60), rig.receiver.open(5, PREFILL, [9, 4], 3) as arriving:
            await until(lambda: rig.way.count(Metadata) >= 13)  # at 0, 0.02, 0.06, 0.14, 0.22, ... 0.86 s
            waited_s = time.monotonic() - arriving.opened_at
            assert 0.86 <= waited_s < 30, "ever more: after 82 s"
            async with rig.sender.open(5) as room:
                await room.peers_ready()
                await room.finish(2, pages=[1, 0])
            await arriving.arrived()
        assert 2 <= rig.way.count(RegisterBuffers) <= 2 + waited_s, "as often as once a second"


async def test_a_late_repetition_of_a_rooms_pages_is_not_the_next_use_of_its_number() -> None:
    """Over two connections a message can come after one that was said later."""
    async with rig_of() as rig:
        heard: list[Frames] = []
        rig.hears = lambda frames: (heard.append(frames), rig.sender.handle(frames))  # type: ignore[assignment,func-returns-value]
        await rig.room(5)
        rig.hears(named_in(heard))
        assert rig.sender.early == (), "it is over, and was answered"
        assert rig.words_lost() == 0, "nobody has missed anything"


async def test_pages_of_a_room_that_decode_gave_up_are_not_written_when_they_are_named_late() -> None:
    async with rig_of() as rig:
        late: list[Frames] = []
        rig.hears = lambda frames: (
            late.append(frames) if isinstance(parse_to_prefill(frames), Metadata) else rig.sender.handle(frames)
        )
        async with rig.receiver.open(5, PREFILL, [9, 4], 3, release=rig.given_back):
            pass
        assert await rig.given_back.next() == [9, 4]
        rig.sender.handle(late[0])
        assert rig.sender.early == ()
        assert rig.words_lost() == 0, "nobody has missed anything"
        with pytest.raises(RoomFailed, match="gave the room up before it was opened here"):
            await rig.send(5)


async def test_a_status_of_another_use_of_the_number_ends_nothing() -> None:
    async with rig_of() as rig, rig.receiver.open(5, PREFILL, [9, 4], 3) as arriving:
        for phase in (Phase.SUCCESS, Phase.FAILED):
            rig.receiver.handle(Status(5, phase, 0, "of another", use=arriving.use - 1).to_frames())
            assert arriving.phase is Phase.TRANSFERRING
        await asyncio.wait_for(asyncio.gather(rig.send(5), arriving.arrived()), 60)


# --- who gives up before pages are named


async def gives_up_at_once(rig: Rig, number: int) -> None:
    """While it waits for its turn to tell prefill of our memory: so early that nobody hears of any page."""
    aborts, named = rig.way.count(Abort), rig.way.count(Metadata)
    async with rig.receiver.contacts._contact(PREFILL).lock:
        room = rig.receiver.open(number, PREFILL, [9, 4], 3, release=rig.given_back)
        opening = asyncio.create_task(room.__aenter__())
        await until(lambda: number in rig.receiver.rooms)
        opening.cancel()
        with suppress(asyncio.CancelledError):
            await opening
    await until(lambda: rig.way.count(Abort) == aborts + 1)
    assert (rig.way.count(Metadata), rig.receiver.quarantine) == (named, ()), "nobody can write there"
    assert await rig.given_back.next() == [9, 4]


async def test_a_room_that_decode_gave_up_before_it_named_pages_is_over_at_a_prefill_that_opens_it_later() -> None:
    async with rig_of() as rig:
        await gives_up_at_once(rig, 5)
        with pytest.raises(RoomFailed, match=r"decode rank \S+ gave the room up before it was opened here"):
            await rig.send(5)
        await rig.room(5)  # the number's next use


async def test_a_room_that_decode_gives_up_before_it_names_pages_is_over_at_a_prefill_that_waits() -> None:
    async with rig_of() as rig:
        sending = asyncio.create_task(rig.send(5))
        await until(lambda: rig.sender.rooms == (5,))
        await gives_up_at_once(rig, 5)
        with pytest.raises(RoomFailed, match=r"has given the room up: .* left the room on CancelledError"):
            await sending
        await rig.room(5)


async def test_a_room_that_both_have_given_up_is_not_remembered_for_the_numbers_next_use() -> None:
    """At the prefill first: what decode says then may be all that it will ever say of it."""
    async with rig_of() as rig:
        await given_up(rig, 5)
        await gives_up_at_once(rig, 5)
        async with rig.sender.open(5, required=1) as room:
            assert room.phase is Phase.BOOTSTRAPPING


def named_in(heard: list[Frames]) -> Frames:
    return next(frames for frames in heard if isinstance(parse_to_prefill(frames), Metadata))


async def given_up(rig: Rig, number: int) -> None:
    """By the prefill, before anybody has named pages there."""
    async with rig.sender.open(number, required=1):
        pass


async def test_who_names_pages_of_a_room_that_prefill_has_given_up_is_told_when_it_says_it_again() -> None:
    async with rig_of() as rig:
        await given_up(rig, 5)
        async with asyncio.timeout(20), rig.receiver.open(5, PREFILL, [9, 4], 3, release=rig.given_back) as arriving:
            with pytest.raises(RoomFailed, match="prefill rank 0 says: the prefill engine left the room"):
                await arriving.arrived()
        assert await rig.given_back.next() == [9, 4]


@pytest.mark.parametrize("who_gave_up", [given_up, gives_up_at_once], ids=["prefill", "decode, before it named pages"])
async def test_a_number_that_was_given_up_may_be_used_again_at_once(
    who_gave_up: Callable[[Rig, int], Awaitable[None]],
) -> None:
    async with rig_of(replace(SOON, remind_s=5)) as rig:
        await who_gave_up(rig, 5)
        async with asyncio.timeout(20), rig.receiver.open(5, PREFILL, [9, 4], 3) as arriving:
            assert rig.sender.early == (5,)
            await rig.send(5)
            await arriving.arrived()


async def test_of_a_room_that_is_open_anew_nobody_is_told_that_it_was_given_up() -> None:
    async with rig_of() as rig:
        await given_up(rig, 5)
        async with (
            asyncio.timeout(20),
            rig.sender.open(5, required=2) as sending,
            rig.receiver.open(5, PREFILL, [9, 4], 3) as arriving,
        ):
            await until(lambda: rig.way.count(Metadata) >= 4)
            assert (sending.phase, arriving.phase) == (Phase.BOOTSTRAPPING, Phase.TRANSFERRING)


# --- stock prefills, and those who are gone


class Stock:
    """A prefill's ear that answers the question, and otherwise nothing."""

    def __init__(self, rig: Rig) -> None:
        self.heard: list[object] = []
        self._rig = rig
        self.asked = asyncio.Event()

    def __call__(self, frames: Frames) -> None:
        message = parse_to_prefill(frames)
        self.heard.append(message)
        if isinstance(message, Abort):
            assert message.generation is not None
            self.asked.set()
            self._rig.receiver.handle(AbortAck(message.room, 0, message.generation).to_frames())

    def count(self, kind: type) -> int:
        return sum(isinstance(message, kind) for message in self.heard)


@contextmanager
def patience_of(monkeypatch: pytest.MonkeyPatch, stock_s: float) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr("pdctl.contacts._STOCK_AFTER_S", stock_s)
        yield


async def test_a_stock_prefill_is_told_again_only_of_a_room_that_has_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with patience_of(monkeypatch, 0.25):
        async with rig_of() as rig:
            rig.hears = stock = Stock(rig)
            async with asyncio.timeout(60), rig.receiver.open(5, PREFILL, [9, 4], 3) as arriving:
                await stock.asked.wait()
                await until(lambda: stock.count(Metadata) >= 2)
                assert time.monotonic() - arriving.opened_at >= 0.25
                assert [AGAIN in each.to_frames() for each in stock.heard if isinstance(each, RegisterBuffers)] == [
                    False,
                    True,
                ]
                rig.receiver.handle(Status(5, Phase.SUCCESS, 0).to_frames())
                await arriving.arrived()
            assert stock.count(Abort) == 1, "asked once"


async def test_a_stock_prefill_is_told_again_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    with patience_of(monkeypatch, 0.05):
        async with rig_of() as rig:
            rig.hears = stock = Stock(rig)
            async with asyncio.timeout(60), rig.receiver.open(5, PREFILL, [9, 4], 3) as arriving:
                await until(lambda: stock.count(Metadata) >= 5)  # at 0, 0.06, 0.14, 0.30, 0.62 s
                assert time.monotonic() - arriving.opened_at >= 0.45, "every 0.08 s otherwise: 0.30"
                rig.receiver.handle(Status(5, Phase.SUCCESS, 0).to_frames())
                await arriving.arrived()


async def test_a_prefill_that_has_died_since_it_was_told_is_found_by_who_tells_it_again() -> None:
    async with rig_of() as rig, asyncio.timeout(60), rig.receiver.open(5, PREFILL, [9, 4], 3) as arriving:
        rig.way.is_cut = rig.is_gone = True
        with pytest.raises(RoomFailed, match=f"prefill rank at {PREFILL} is gone"):
            await arriving.arrived()
        async with rig.sender.open(5, required=1):
            pass  # that the early book forgets is shown elsewhere


async def test_a_way_that_is_cut_for_a_while_costs_no_room() -> None:
    async with rig_of() as rig:
        rig.way.lose(PAGES)
        moving = asyncio.create_task(rig.room(5))
        async with asyncio.timeout(60):
            await until(lambda: bool(rig.way.lost))
            rig.way.is_cut = True
            await until(lambda: rig.way.refused >= 3)
            assert not moving.done()
            rig.way.is_cut = False
            await moving


async def test_what_is_remembered_of_rooms_that_are_over_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdctl.lastwords._MAX_OVER", 3)
    monkeypatch.setattr("pdctl.contacts._MAX_MATCHES", 3)
    async with rig_of(SUMMED) as rig:
        for number in range(8):
            await rig.room(number)
        assert len(rig.sender.words._over) == 3
        assert len(rig.receiver.contacts._matches) == 3
        kept = sum(sum(map(len, said)) for _, said in rig.sender.words._over.values())
        assert rig.sender.words._nbytes == kept
