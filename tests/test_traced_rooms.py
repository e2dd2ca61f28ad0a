"""A room's trace, from the decode's caller to the prefill's span, and what both sides say of the room at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from pdctl.core.address import Endpoint
from pdctl.core.trace import Span, TraceContext
from pdctl.core.transfer import RoomTimeouts
from pdctl.core.wire import TRACE, USE, Metadata, parse_to_prefill
from pdctl.errors import Cause, RoomFailed, TransferFailed
from pdctl.metrics import Metrics
from pdctl.receiver import Receiver
from pdctl.sender import Sender
from pdctl.spans import Spans
from pdctl.telling import Telling
from tests.room_rig import RigEngine, RigGate, memory

HERE, THERE = Endpoint("10.0.0.1", 7000), Endpoint("10.0.0.2", 7001)
CALLER = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", state="vendor=1")
OTHER = TraceContext("1" * 32, "2" * 16)
WITHIN_S = 60.0

pytestmark = pytest.mark.usefixtures("info_is_logged")


@dataclass
class Both:
    """A prefill and a decode rank in one process; `told`: the spans of both, `passed`: what decode has said."""

    sender: Sender
    receiver: Receiver
    engine: RigEngine
    told: list[Span]
    passed: list[Sequence[bytes]] = field(default_factory=list)

    async def room(self, number: int = 7, *, prefill: Any = None, decode: Any = None) -> None:
        await asyncio.wait_for(asyncio.gather(self._out(number, prefill), self._into(number, decode)), WITHIN_S)

    async def ends(self, number: int, trace: Any) -> tuple[BaseException | None, ...]:
        """What came of a room, at the prefill and at the decode."""
        sides = asyncio.gather(self._out(number, None), self._into(number, trace), return_exceptions=True)
        return await asyncio.wait_for(sides, WITHIN_S)

    async def _out(self, number: int, trace: Any) -> None:
        async with self.sender.open(number, trace=trace) as room:
            await room.peers_ready()
            await room.send([1, 2])
            await room.finish(1)

    async def _into(self, number: int, trace: Any) -> None:
        async with self.receiver.open(number, HERE, [4, 5], 2, trace=trace) as room:
            await room.arrived()

    def span(self, side: str) -> Span:
        (found,) = [span for span in self.told if span.name == f"pdctl.room.{side}"]
        return found


@asynccontextmanager
async def both(*, recorded: bool = True, ratio: float = 1.0) -> AsyncIterator[Both]:
    told: list[Span] = []
    spans = Spans(told.append, ratio, Random(5).getrandbits) if recorded else None
    source, target, engine = memory(seed=1), memory(), RigEngine()

    async def send(to: Endpoint, frames: Sequence[bytes]) -> None:
        if to == HERE:
            it.passed.append(frames)
            it.sender.handle(frames)
        else:
            it.receiver.handle(frames)

    limits, clock, metrics = RoomTimeouts(drain_margin_s=0.01), time.monotonic, Metrics()
    session, telling = "10.0.0.2:15000", Telling(spans)
    async with (
        Sender(engine, send, source.pools, 0, RigGate(), limits, clock, metrics, telling=telling) as sender,
        Receiver(session, send, THERE, target.pools, 0, 1, limits, clock, metrics, telling=telling) as receiver,
    ):
        it = Both(sender, receiver, engine, told)
        yield it


async def test_the_decodes_caller_finds_both_sides_in_its_trace() -> None:
    async with both() as it:
        await it.room(decode=CALLER)
    sent, arrived = it.span("sender"), it.span("receiver")
    assert (arrived.parent, arrived.context.trace_id) == (CALLER, CALLER.trace_id)
    assert (sent.parent, sent.context.trace_id) == (arrived.context, CALLER.trace_id)
    assert sent.context.state == "vendor=1"
    assert len({CALLER.span_id, sent.context.span_id, arrived.context.span_id}) == 3


async def test_each_side_has_its_own_callers_trace_and_they_are_linked() -> None:
    async with both() as it:
        await it.room(prefill=OTHER, decode=CALLER)
    assert it.span("sender").parent == OTHER
    assert it.span("sender").links == (it.span("receiver").context,)


async def test_without_a_caller_decode_begins_a_trace_and_prefill_is_part_of_it() -> None:
    async with both() as it:
        await it.room()
    assert it.span("receiver").parent is None
    assert it.span("sender").parent == it.span("receiver").context


async def test_a_prefill_whose_decode_says_nothing_begins_one_of_its_own() -> None:
    async with both() as it:
        it.receiver.telling = Telling()
        await it.room()
    assert [(span.name, span.parent) for span in it.told] == [("pdctl.room.sender", None)]


async def test_of_traces_that_are_not_sampled_no_side_records_anything() -> None:
    async with both(ratio=0.0) as it:
        await it.room()
    assert it.told == []


async def test_where_nobody_records_the_callers_trace_is_handed_on_and_stands_in_both_lines() -> None:
    async with both(recorded=False) as it:
        with capture_logs() as lines:
            await it.room(decode=CALLER.traceparent)
    said = [line for line in lines if line["event"] == "room succeeded"]
    assert {(line["side"], line["trace_id"]) for line in said} == {
        ("sender", CALLER.trace_id),
        ("receiver", CALLER.trace_id),
    }
    assert [frames[frames.index(TRACE) + 1] for frames in it.passed if TRACE in frames] == [CALLER.traceparent.encode()]


async def test_without_a_trace_metadata_says_of_none() -> None:
    async with both(recorded=False) as it:
        await it.room()
    assert it.passed[-1][10:-1] == [USE]


async def test_both_lines_say_what_moved_between_whom_and_how_long_each_phase_took() -> None:
    async with both(recorded=False) as it:
        with capture_logs() as lines:
            await it.room()
    sent, arrived = sorted((line for line in lines if "room" in line), key=lambda line: line["side"], reverse=True)
    nbytes = 2 * (64 + 64 + 32) + 8 + 40
    for line in (sent, arrived):
        assert (line["room"], line["pages"], line["nbytes"]) == (7, 2, nbytes)
        spent = [line[f"{phase}_s"] for phase in ("bootstrapping", "waiting_for_input", "transferring")]
        assert line["seconds"] == pytest.approx(sum(spent), abs=1e-5)
    assert sent["peers"] == ["10.0.0.2:7001 (10.0.0.2:15000)"]
    assert arrived["peers"] == ["10.0.0.1:7000"]


async def test_a_room_that_fails_says_so_once_on_each_side_with_the_engines_cause() -> None:
    async with both() as it:
        it.engine.failures["10.0.0.2:15000"] = TransferFailed(Cause.PEER_GONE, "10.0.0.2:15000", "connection reset")
        with capture_logs() as lines:
            assert [type(why) for why in await it.ends(7, CALLER)] == [RoomFailed, RoomFailed]
    sent, arrived = sorted(
        (line for line in lines if line["event"] == "room failed"), key=lambda line: line["side"], reverse=True
    )
    assert (sent["cause"], sent["phase"], sent["nbytes"]) == ("peer_gone", "transferring", 0)
    assert (arrived["cause"], arrived["nbytes"]) == ("peer_failed", 0)
    assert "connection reset" in arrived["reason"]
    assert it.span("sender").attributes["error.type"] == "peer_gone"
    assert "connection reset" in (it.span("receiver").error or "")


def frames_of(*behind: bytes) -> list[bytes]:
    plain = Metadata(7, THERE, "10.0.0.2:15000", np.array([4], np.int32), 2)
    return [*plain.to_frames(), *behind]


@pytest.mark.parametrize(
    ("behind", "found"),
    [
        pytest.param([TRACE, CALLER.traceparent.encode(), b"vendor=1"], CALLER, id="as we write it"),
        pytest.param([b"later", b"", TRACE, CALLER.traceparent.encode(), b"vendor=1"], CALLER, id="behind others"),
        pytest.param([TRACE], None, id="cut off"),
        pytest.param([TRACE, b"\xff\xfe", b"\x00"], None, id="no text"),
        pytest.param([TRACE, CALLER.traceparent.encode() + b"\r\nx: y", b""], None, id="a header within"),
        pytest.param([b"something", b"else"], None, id="frames of somebody else"),
    ],
)
def test_a_trace_that_cannot_be_read_is_none_and_the_pages_are_named_all_the_same(
    behind: list[bytes], found: TraceContext | None
) -> None:
    named = parse_to_prefill(frames_of(*behind))
    assert isinstance(named, Metadata)
    assert named.trace == found
    assert named.pages.tolist() == [4]
