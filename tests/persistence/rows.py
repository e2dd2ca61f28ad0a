"""Lives to keep, as short as tests want them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdctl.core.address import Endpoint
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Change, Claim, Life, Owner, Record
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.persistence.base import Journal


def claim(
    tp: int = 0,
    *,
    instance: str = "default",
    port: int = 0,
    size: int = 64,
    page_size: int | None = 16,
    layout: Mapping[str, Any] | None = None,
    http_port: int | None = None,
    principal: str | None = None,
    **more: Any,
) -> Claim:
    shape = Shape(size, 1, 1, 1, page_size, None, dsv41_spec_layout=layout)
    announcement = Announcement(Seat(0, 0, tp, 0), shape, Endpoint("10.0.0.1", port or 40000 + tp), http_port)
    return Claim(instance, announcement, Owner("10.0.0.1", principal), **more)


def life(epoch: int, of: Claim | None = None) -> Life:
    return Life.begin(of or claim(), epoch, 1, now=5.0)


def change(what: Life, revision: int, kind: ChangeKind = ChangeKind.SEATED, *, before: Life | None = None) -> Change:
    return Change(kind, what, revision, before)


async def records(journal: Journal) -> list[Record]:
    return list((await journal.load()).records)
