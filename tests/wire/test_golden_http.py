"""Every answer of the stock registry: ours is the same, and where stock is broken ours says what is wrong."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from pdctl.core.route import Announcement
from tests.wire.http_pairs import PAIRS, Pair, ask

JSON = dict[str, Any]
GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).with_name("http").glob("*.json"))}
SAME = [name for name in GOLDEN if not GOLDEN[name]["defect"]]
DEFECTS = [name for name in GOLDEN if GOLDEN[name]["defect"]]
ACCEPTED = [name for name in SAME if name.startswith("put") and GOLDEN[name]["response"]["status"] == 200]


async def answer_of(registry_url: str, name: str) -> JSON:
    pair = Pair.from_json(name, GOLDEN[name])
    address = registry_url.removeprefix("http://").rstrip("/")
    for earlier in pair.before:
        await asyncio.to_thread(ask, address, earlier)
    return await asyncio.to_thread(ask, address, pair.request)


def family(answer: JSON) -> str:
    return str(answer["headers"].get("content-type", "")).partition(";")[0]


def body(answer: JSON) -> object:
    """JSON as values, since blanks and the order of keys say nothing; text as it is."""
    text = answer["body"]
    return json.loads(text) if answer["status"] == 200 and family(answer) == "application/json" else text


def reads_the_same(stock: JSON, ours: JSON) -> bool:
    """A refusal of ours begins with stock's sentence and may go on: what was held, what was offered, what to do."""
    return str(ours["body"]).startswith(stock["body"]) if stock["status"] == 400 else body(ours) == body(stock)


def test_the_recordings_answer_the_questions_as_they_stand_now() -> None:
    recorded = {name: Pair.from_json(name, content) for name, content in GOLDEN.items()}
    assert recorded == {pair.name: pair for pair in PAIRS}


@pytest.mark.parametrize("name", SAME)
async def test_our_registry_answers_as_the_stock_one(registry_url: str, name: str) -> None:
    stock, ours = GOLDEN[name]["response"], await answer_of(registry_url, name)
    assert ours["status"] == stock["status"], ours
    if not GOLDEN[name]["only_status"]:
        assert family(ours) == family(stock)
        assert reads_the_same(stock, ours)


@pytest.mark.parametrize("name", DEFECTS)
async def test_what_breaks_the_stock_registry_is_refused_with_its_name(registry_url: str, name: str) -> None:
    instead, ours = GOLDEN[name]["defect"], await answer_of(registry_url, name)
    assert ours["status"] == instead["status"], ours
    assert instead["names"] in ours["body"]


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_announcement_survives_reading_and_writing(name: str) -> None:
    sent = json.loads(GOLDEN[name]["request"]["text"])
    announcement = Announcement.from_body(sent)
    assert Announcement.from_body(announcement.to_body()) == announcement


def test_an_announcement_of_ours_is_the_body_that_a_stock_rank_puts() -> None:
    sent = json.loads(GOLDEN["put"]["request"]["text"])
    assert Announcement.from_body(sent).to_body() == sent
