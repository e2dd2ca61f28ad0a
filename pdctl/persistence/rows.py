"""
Records as rows of text, both directions.

A row is JSON with a checksum beside it, never a pickle: a journal can be read with any tool, and a bit that flipped on
the disk is found and not served. A row that this version does not read whole is no reason to guess: it is said which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _text
from zlib import crc32

from pdctl.core.address import Endpoint
from pdctl.core.lives import Change, Record
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import BadField, JournalUnusable
from pdctl.persistence.base import Note

Row = tuple[int, int, str]
"""Epoch, checksum, text."""

NoteRow = tuple[str, str, int, bytes]
"""Book, key, checksum, value."""

_IN_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode  # json.dumps would make one for every row


class Unsound(Exception):
    """What is stored cannot be what we wrote; the text says what is wrong with it."""


@dataclass(slots=True)
class Rows:
    """What changes do to the lives kept, in one pass: of two words on one epoch the later holds."""

    lives: dict[int, Row | None] = field(default_factory=dict)
    last_epoch: int = 0
    revision: int = 0

    def take(self, changes: Iterable[Change]) -> None:
        """All of them, or none where one cannot be written."""
        for change, row in [(change, None if change.is_dropped else encoded(change.record)) for change in changes]:
            if change.before is not None:
                self.lives[change.before.epoch] = None
            self.lives[change.life.epoch] = row
            self.last_epoch = max(self.last_epoch, change.life.epoch)
            self.revision = max(self.revision, change.revision)

    def kept(self) -> list[Row]:
        return [row for row in self.lives.values() if row is not None]

    def dropped(self) -> list[tuple[int]]:
        return [(epoch,) for epoch, row in self.lives.items() if row is None]


def encoded(record: Record) -> Row:
    text = _IN_JSON(record.to_row()) if record.claim.shape.dsv41_spec_layout else _written(record)
    return record.epoch, crc32(text.encode()), text


def _written(record: Record) -> str:
    """`to_row` in JSON, to the letter, for a quarter of what that takes: ranks of a shape differ in seat and port."""
    claim, announced = record.claim, record.claim.announcement
    seat, address, http_port = announced.seat, announced.address, announced.prefill_http_port
    ranks = (seat.tp, seat.cp, seat.dp, seat.pp, _text(address.host), address.port)
    announcement = _frame(announced.shape) % (*ranks, "null" if http_port is None else http_port)
    return (
        f'{{"instance":{_text(claim.instance)},"announcement":{announcement},"host":{_text(claim.owner.host)},'
        f'"principal":{_or_null(claim.owner.principal)},"role":{_text(claim.role)},'
        f'"labels":{_IN_JSON(dict(claim.labels)) if claim.labels else "{}"},'
        f'"metadata":{_IN_JSON(dict(claim.metadata)) if claim.metadata else "{}"},'
        f'"ttl_s":{_or_null(claim.ttl_s)},"epoch":{record.epoch},"incarnation":{record.incarnation},'
        f'"grace_s":{_or_null(record.grace_s)},"lost":{_or_null(record.lost)}'
        f"{'' if announced.shape.page_size is not None else _NO_PAGE_SIZE}}}"
    )


def _or_null(value: str | float | None) -> str:
    return "null" if value is None else _IN_JSON(value)


@lru_cache(maxsize=256)
def _frame(shape: Shape) -> str:
    """An announcement in JSON, with holes for `_VARIES` in the order in which they come."""
    body = Announcement(_ANY_SEAT, shape, _ANYWHERE).to_body()
    pairs = (f'"{name}":{_VARIES.get(name) or _IN_JSON(value).replace("%", "%%")}' for name, value in body.items())
    return f"{{{','.join(pairs)}}}"


_VARIES = dict.fromkeys(("attn_tp_rank", "attn_cp_rank", "attn_dp_rank", "pp_rank"), "%d")
_VARIES |= {"rank_ip": "%s", "rank_port": "%d", "prefill_http_port": "%s"}
_ANY_SEAT, _ANYWHERE = Seat(0, 0, 0, 0), Endpoint("0", 1)
_NO_PAGE_SIZE = ',"no_page_size":true'


def decoded(rows: Sequence[Row], where: object) -> list[Record]:
    """Raises Unsound, and JournalUnusable for a row that another version of pdctl wrote. `where`: for its sentence."""
    return [_decoded(epoch, checksum, text, where) for epoch, checksum, text in rows]


def noted(rows: Sequence[NoteRow]) -> list[Note]:
    """Raises Unsound."""
    for book, key, checksum, value in rows:
        if crc32(value) != checksum:
            raise Unsound(f"the note {key!r} of {book} does not fit its checksum")
    return [(book, key, value) for book, key, _, value in rows]


def _decoded(epoch: int, checksum: int, text: str, where: object) -> Record:
    try:
        if crc32(text.encode()) != checksum:
            raise Unsound(f"the row of epoch {epoch} does not fit its checksum")
        row = json.loads(text)
        record = Record.from_row(row)
    except (BadField, KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise another_version(where, f"in the row of epoch {epoch}: {what}") from error
    if (back := record.to_row()) != row:
        odd = ", ".join(sorted(key for key in {*row, *back} if row.get(key) != back.get(key) or key not in back))
        raise another_version(where, f"this one does not know {odd} in the row of epoch {epoch}")
    return record


def another_version(where: object, what: str) -> JournalUnusable:
    return JournalUnusable(
        f"journal {where} was written by another version of pdctl ({what}): start that version, or give another path; "
        "nothing was changed in it"
    )
