"""Every cell of both tables, and a sentence for every wait."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest

from pdctl.core.transfer import (
    ENDINGS,
    OVERDUE,
    RECEIVER,
    SENDER,
    Event,
    Phase,
    RoomTimeouts,
    Side,
    Table,
    step,
)
from pdctl.errors import ConfigError, IllegalEvent

F, B, W, T, S = Phase.FAILED, Phase.BOOTSTRAPPING, Phase.WAITING_FOR_INPUT, Phase.TRANSFERRING, Phase.SUCCESS
E = Event

# Written out once more, by hand, in another shape: a slip in one of the two shows.
LEGAL = {
    "sender": {
        (B, E.PEER_NAMED_PAGES): B,
        (B, E.ALL_NAMED_PAGES): W,
        (W, E.CHUNK_QUEUED): T,
        (T, E.CHUNK_QUEUED): T,
        (T, E.CHUNK_LANDED): T,
        (T, E.LAST_CHUNK_LANDED): S,
    },
    "receiver": {
        (B, E.BUFFERS_REGISTERED): W,
        (W, E.PREFILL_ANSWERED): W,
        (W, E.ALL_ANSWERED): S,
        (W, E.METADATA_SENT): T,
        (T, E.PREFILL_ANSWERED): T,
        (T, E.ALL_ANSWERED): S,
    },
}
FATAL = {E.TRANSFER_FAILED, E.PEER_FAILED, E.PEER_UNREACHABLE, E.ABORTED, E.TIMED_OUT}
TABLES = {"sender": SENDER, "receiver": RECEIVER}


@pytest.mark.parametrize("event", Event, ids=str)
@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.name)
@pytest.mark.parametrize("side", TABLES)
def test_every_cell(side: str, phase: Phase, event: Event) -> None:
    table = TABLES[side]
    if phase in (F, S):
        assert step(table, phase, event) is phase
    elif event in FATAL:
        assert step(table, phase, event) is F
    elif (phase, event) in LEGAL[side]:
        assert step(table, phase, event) is LEGAL[side][phase, event]
    else:
        with pytest.raises(IllegalEvent, match=rf"{phase.name} knows no {event}: it knows .*timed_out"):
            step(table, phase, event)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_phase_has_a_row(table: Table) -> None:
    assert set(table) == set(Phase)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_room_never_moves_down(table: Table) -> None:
    for phase, row in table.items():
        assert all(after >= phase for event, after in row.items() if event not in ENDINGS)


def test_the_numbers_are_the_ones_that_travel() -> None:
    assert [(p.name, p.value) for p in Phase] == [
        ("FAILED", 0),
        ("BOOTSTRAPPING", 1),
        ("WAITING_FOR_INPUT", 2),
        ("TRANSFERRING", 3),
        ("SUCCESS", 4),
    ]


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("phase", [phase for phase in Phase if not phase.is_final], ids=lambda phase: phase.name)
def test_every_wait_has_a_bound_and_a_sentence(side: Side, phase: Phase) -> None:
    overdue = OVERDUE[side, phase]
    timeouts = RoomTimeouts(bootstrap_s=7, waiting_s=7)
    assert overdue.limit_s(timeouts) == 7
    sentence = overdue.sentence(timeouts, "decode 10.0.0.7:1")
    assert "from decode 10.0.0.7:1 within 7 s: see whether" in sentence or "within 7 s: see the" in sentence
    assert sentence.endswith(f"or raise {overdue.setting} if that is normal")


def test_finished_rooms_wait_for_nothing() -> None:
    assert {phase for _, phase in OVERDUE} == {phase for phase in Phase if not phase.is_final}


@pytest.mark.parametrize("name", ["bootstrap_s", "waiting_s", "transfer_s", "release_s"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_a_wait_without_a_bound_cannot_be_set(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        cast(Any, RoomTimeouts)(**{name: value})


def test_the_drain_margin_can_be_given_up_but_not_be_negative() -> None:
    assert RoomTimeouts(drain_margin_s=0).drain_margin_s == 0
    with pytest.raises(ConfigError, match="drain_margin_s"):
        RoomTimeouts(drain_margin_s=-1)
