"""What a watcher hears, as values: whole lists or none, and a picture that comes to what the registry would list."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.events import Event
from pdctl.core.news import Changed, Hearing, Listed, News, Picture, Rank, Summary
from pdctl.core.route import Seat
from pdctl.errors import BadField, TooLarge, Unreachable

SHAPE = {"attn_tp_size": 2, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 16, "kv_cache_dtype": None}


def row(epoch: int, tp: int = 0, incarnation: int = 1, **more: Any) -> dict[str, Any]:
    at = {"seat": f"dp0/cp0/tp{tp}/pp0", "dp": 0, "cp": 0, "tp": tp, "pp": 0}
    said = {"address": f"[fd00::7]:{epoch}", "prefill_http_port": None, "epoch": epoch, "incarnation": incarnation}
    return {**at, **said, "standing": "alive", "ttl_s": 15.0, "labels": {}, "metadata": {"n": epoch}, **more}


def summary(name: str = "a", incarnation: int = 1, **more: Any) -> dict[str, Any]:
    flags = {"ready": False, "draining": False, "dead": False}
    return {"name": name, "role": "prefill", **flags, "seats": 2, "alive": 1, "missing": 1} | {
        "incarnation": incarnation,
        "revision": 1,
        "what a later registry says": True,
        **more,
    }


def instance(*rows: dict[str, Any], forming: Any = None, **more: Any) -> dict[str, Any]:
    return {**summary(**more), "shape": {**SHAPE, "later": 1}, "alive_seats": list(rows), "forming": forming}


def event(kind: str, body: object, revision: int | None = None) -> Event:
    return Event(kind, json.dumps(body).encode(), None if revision is None else f"x-{revision}")


def change(revision: int, rank: Any = None, gone: tuple[int, ...] = (), **more: Any) -> Event:
    said = {"revision": revision, "kind": "seated", "instance": "a", "gone": list(gone), "rank": rank, "why": None}
    return event("change", {**said, "summary": summary(), **more}, revision)


def heard(*events: Event) -> list[News]:
    hearing = Hearing()
    return [news for each in events if (news := hearing.hear(each)) is not None]


def test_a_list_is_one_piece_of_news_with_what_changed_meanwhile() -> None:
    news = heard(
        event("reset", {"revision": 3}),
        event("instance", instance(row(1), row(2, tp=1))),
        event("instance", instance(name="b")),
        change(4, row(3, tp=1), gone=(2,)),
        change(5, instance="b", summary=None),
        event("synced", {"revision": 5}, 5),
    )
    (listed,) = news
    assert isinstance(listed, Listed)
    assert (listed.cursor, listed.revision, list(listed.instances)) == ("x-5", 5, ["a"])
    assert {epoch: rank.seat.tp for epoch, rank in listed.instances["a"].ranks.items()} == {1: 0, 3: 1}
    assert listed.instances["a"].shape is not None
    assert listed.instances["a"].shape.attn_tp_size == 2


def test_a_list_that_breaks_off_has_said_nothing() -> None:
    assert heard(event("reset", {}), event("instance", instance(row(1))), change(4, row(2, tp=1))) == []


def test_a_change_is_told_with_its_row() -> None:
    (news,) = heard(change(7, row(5, tp=1), gone=(2,), kind="replaced"))
    assert isinstance(news, Changed)
    rank = Rank(Seat(0, 0, 1, 0), Endpoint("fd00::7", 5), 5, 1, "alive", 15.0, None, {}, {"n": 5})
    assert (news.cursor, news.revision, news.kind, news.instance) == ("x-7", 7, "replaced", "a")
    assert (news.rank, news.gone) == (rank, (2,))
    assert news.summary == Summary("a", "prefill", False, False, False, 2, 1, 1, 1)


def test_a_picture_follows_a_restart_with_another_shape() -> None:
    picture, bigger = Picture(), {**SHAPE, "attn_tp_size": 4}
    for news in heard(
        event("reset", {}),
        event("instance", instance(row(1), row(2, tp=1))),
        event("synced", {"revision": 2}, 2),
        change(3, row(3, incarnation=3), shape=bigger),
    ):
        picture.take(news)
    one = picture.instances["a"]
    assert ([rank.epoch for rank in one.served], len(one.ranks)) == ([1, 2], 3)
    for news in heard(
        change(4, gone=(1,), summary=summary(incarnation=3)),
        change(5, gone=(2,), summary=summary(incarnation=3)),
        change(6, row(3, incarnation=3), shape=bigger, summary=summary(incarnation=3)),
    ):
        picture.take(news)
    assert [rank.epoch for rank in picture.ranks("prefill")] == [3]
    assert one.shape is not None
    assert one.shape.attn_tp_size == 4
    assert list(one.shapes) == [3]
    assert (picture.cursor, picture.revision) == ("x-6", 6)


def test_a_later_picture_does_not_change_the_list_that_it_began_with() -> None:
    (listed,) = heard(event("reset", {}), event("instance", instance(row(1))), event("synced", {"revision": 2}, 2))
    picture = Picture()
    picture.take(listed)
    picture.take(heard(change(3, gone=(1,)))[0])
    assert isinstance(listed, Listed)
    assert (len(listed.instances["a"].ranks), len(picture.instances["a"].ranks)) == (1, 0)


def test_a_forming_incarnation_is_known_and_does_not_count() -> None:
    forming = {"incarnation": 3, "shape": SHAPE, "alive_seats": [row(3, incarnation=3)]}
    (listed,) = heard(
        event("reset", {}), event("instance", instance(row(1), forming=forming)), event("synced", {"revision": 2}, 2)
    )
    assert isinstance(listed, Listed)
    one = listed.instances["a"]
    assert ([rank.epoch for rank in one.served], sorted(one.ranks), sorted(one.shapes)) == ([1], [1, 3], [1, 3])


def test_a_goodbye_is_told_in_the_registrys_words() -> None:
    with pytest.raises(Unreachable, match="this registry stops: connect again"):
        heard(event("bye", {"error": {"message": "this registry stops: connect again"}}))
    with pytest.raises(Unreachable, match="does not say why"):
        heard(event("bye", []))


def test_what_a_later_registry_says_besides_is_passed_over() -> None:
    assert heard(event("weather", {"rain": True})) == []


@pytest.mark.parametrize(
    "wrong",
    [
        Event("change", b"{", "x-1"),
        Event("change", b"[]", "x-1"),
        change(1, {**row(1), "address": "nowhere"}),
        change(1, {**row(1), "dp": "x"}),
        change(1, {**row(1), "ttl_s": True}),
        change(1, shape={"attn_tp_size": 2}),
        change(1, shape={**SHAPE, "attn_tp_size": "2"}),
        change(1, summary={}),
        event("change", {"revision": 1, "kind": "seated", "instance": "a", "gone": {}}, 1),
        change(1, kind=5),
        Event("change", change(1).data),
        event("instance", instance()),
        event("synced", {"revision": 1}, 1),
    ],
    ids=lambda each: each.data.decode()[:40],
)
def test_what_no_registry_says_is_refused_and_nothing_of_it_is_told(wrong: Event) -> None:
    with pytest.raises(BadField):
        heard(wrong)


def test_a_list_without_end_is_refused() -> None:
    hearing = Hearing(max_list_nbytes=10_000)
    hearing.hear(event("reset", {}))
    endless = (event("instance", instance(name=f"i{n}")) for n in range(1000))
    with pytest.raises(TooLarge, match="more than 10000 bytes"):
        list(map(hearing.hear, endless))
