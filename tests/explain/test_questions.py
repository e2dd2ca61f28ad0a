"""Whom `explain` asks, and whom not."""

from __future__ import annotations

from typing import Any

from pdctl.core.findings import Scope
from pdctl.core.seen import Seen
from pdctl.explaining import ASKED, _questions


def seen(*addresses: str, session: str | None = None, **more: Any) -> Seen:
    metadata = {} if session is None else {"mooncake_session": session}
    rows = [{"seat": f"tp{n}", "address": at, "metadata": metadata} for n, at in enumerate(addresses)]
    return Seen({"instances": [{"name": "p", "alive_seats": rows}], **more})


def test_a_loopback_address_of_a_registry_elsewhere_would_be_somebody_elses() -> None:
    ours = seen("127.0.0.1:5000", "10.0.0.7:5000", session="127.0.0.1:16000")
    assert set(_questions(ours, Scope(), beside=True)) == {"127.0.0.1:5000", "10.0.0.7:5000", "127.0.0.1:16000"}
    assert set(_questions(ours, Scope(), beside=False)) == {"10.0.0.7:5000"}


def test_only_who_is_asked_about_is_asked_and_never_more_than_some() -> None:
    many = seen(*(f"10.0.{n // 250}.{n % 250 + 1}:5000" for n in range(2 * ASKED)))
    assert len(_questions(many, Scope(), beside=True)) == ASKED
    assert len(_questions(many, Scope.parse(["p/tp3"]), beside=True)) == 1
    assert _questions(many, Scope.parse(["q"]), beside=True) == {}


def test_a_session_that_is_out_is_asked_by_whoever_asks() -> None:
    out = seen(sessions=[{"session": "10.0.0.9:16000", "state": "blocked"}, {"session": "by-name", "state": "blocked"}])
    assert set(_questions(out, Scope(), beside=True)) == {"10.0.0.9:16000"}
