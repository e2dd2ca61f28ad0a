"""What tells one life of a peer from the next."""

from __future__ import annotations

from dataclasses import replace

from pdctl.core.layout import Region
from pdctl.engine.base import Announced, PeerCard

SESSION = "10.0.0.9:15000"
ONE, TWO, OTHER = Region(0x10000, 4096), Region(0x20000, 4096), Region(0x90000, 4096)
CARD = PeerCard(SESSION, 4711, (ONE, TWO))


def test_a_process_may_register_and_unregister_and_stays_the_same() -> None:
    assert CARD.same_life(replace(CARD, regions=(TWO, OTHER)))


def test_another_data_port_or_no_region_in_common_is_another_process() -> None:
    assert not CARD.same_life(replace(CARD, data_port=4712))
    assert not CARD.same_life(replace(CARD, regions=(OTHER,)))


def test_two_boot_ids_decide_and_one_alone_says_nothing() -> None:
    first = replace(CARD, boot=b"one")
    assert not first.same_life(replace(CARD, boot=b"two"))
    assert first.same_life(first)
    assert first.same_life(CARD)
    assert CARD.same_life(first)


def test_what_was_announced_is_the_life_that_holds_every_one_of_its_pointers() -> None:
    assert Announced(SESSION, (ONE.pointer, TWO.pointer)).same_life(CARD)
    assert Announced(SESSION, (TWO.end - 1,)).same_life(CARD)
    assert not Announced(SESSION, (ONE.pointer, OTHER.pointer)).same_life(CARD)
