"""
The wires of the sidecar beside pdctl's own: which sockets speak for which instance, vLLM's workers, Mooncake's keys.

Opens and connects; what a claim means stands in `core`, and how it is told on the wire in `dialects`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from fastapi import APIRouter

from pdctl import server
from pdctl.config import Settings
from pdctl.core import fleet, metadata
from pdctl.core.naming import Names
from pdctl.dialects import engines, mooncake, native, vllm
from pdctl.dialects.engines import Engines
from pdctl.dialects.instances import instance_of
from pdctl.dialects.vllm import InstanceOf
from pdctl.dialects.watch import Broadcast
from pdctl.errors import BadField, JournalUnusable
from pdctl.keyring import Keyring
from pdctl.metrics import Metrics
from pdctl.persistence.base import Note, Notebook
from pdctl.registrar import Registrar
from pdctl.roster import Roster
from pdctl.sections import ServeSettings

_KEYS, _FLEET = "mooncake", "vllm"
"""Books of the journal."""


def bind_all(serve: ServeSettings) -> list[socket.socket]:
    """The service's own address first, then each listener's; none of them listens yet.

    Raises AddressTaken, ConfigError; then none is bound.
    """
    socks: list[socket.socket] = []
    try:
        socks.append(server.bind(serve.host, serve.port, listens=False))
        for listener in serve.listeners():
            sock = server.bind(listener.host, listener.port, listens=False)
            socks.append(sock)
    except BaseException:
        for sock in socks:
            sock.close()
        raise
    return socks


def instance_at(socks: Sequence[socket.socket], serve: ServeSettings) -> InstanceOf:
    """For which instance a plain request speaks at each of `bind_all`'s sockets."""
    bound = [server.bound(sock) for sock in socks[1:]]
    listening = {(at.host, at.port): each.name for at, each in zip(bound, serve.listeners(), strict=True)}
    return instance_of(Names(listening, serve.hosts()))


@dataclass(frozen=True, slots=True)
class OtherWires:
    """vLLM's and Mooncake's."""

    roster: Roster
    keyring: Keyring
    value_limit: int
    engines: Engines

    @classmethod
    def open(cls, settings: Settings, journal: Notebook, notes: Sequence[Note], metrics: Metrics) -> OtherWires:
        """Both books as the journal has kept them: `notes` are all of its. Raises JournalUnusable."""

        async def keep_keys(rows: Sequence[metadata.Row]) -> None:
            await journal.note([(_KEYS, *row.to_note()) for row in rows])

        async def keep_fleet(rows: Sequence[fleet.Row]) -> None:
            await journal.note([(_FLEET, *row.to_note()) for row in rows])

        limits = settings.metadata.limits()
        book = metadata.KeyBook(limits)
        keyring = Keyring(book, keep_keys, mooncake.engine_answers, metrics, settings.metadata.witness())
        roster = Roster(fleet.Fleet(settings.vllm), keep_fleet, vllm.look, metrics, time.monotonic)
        try:
            keyring.restore([metadata.Row.from_note(key, value) for key, value in _of(notes, _KEYS)])
            roster.restore([fleet.Row.from_note(key, value) for key, value in _of(notes, _FLEET)])
        except (BadField, KeyError, TypeError, ValueError) as error:
            raise JournalUnusable(
                f"the journal's rows of {_KEYS} or {_FLEET} were written by another version of pdctl ({error!r}): "
                "start that version, or give another path; nothing was changed in it"
            ) from error
        return cls(roster, keyring, limits.max_value_nbytes, Engines(roster))

    def learn(self, notes: Sequence[Note]) -> None:
        """What another registry over the same journal has put into the books."""
        keys = [(key, value) for book, key, value in notes if book == _KEYS]
        seats = [(key, value) for book, key, value in notes if book == _FLEET]
        self.keyring.learn([metadata.Row.from_note(key, value) for key, value in keys])
        self.roster.learn([fleet.Row.from_note(key, value) for key, value in seats])

    def routers(self, registrar: Registrar, instance: InstanceOf) -> list[APIRouter]:
        return [
            vllm.router(self.roster, registrar.herald.refused, instance),
            engines.operators_router(self.roster, native.refusing(registrar)),
            mooncake.router(self.keyring, registrar.herald.refused, self.value_limit),
        ]

    def tell(self, registrar: Registrar, news: Broadcast) -> None:
        """Let watchers hear of vLLM's prefills, in one order with everything else; and hear of other registries."""
        registrar.subscribe_notes(self.learn)

        def publish(name: str, move: fleet.Move | None) -> None:
            def tell(revision: int) -> None:
                instance, told = self.engines.told(revision, name, move)
                news.publish(revision, instance, native.line(told))

            registrar.number(tell)

        def hear(name: str, moves: Sequence[fleet.Move]) -> None:
            for move in moves or (None,):
                publish(name, move)

        self.roster.subscribe(hear)

    async def watch(self) -> NoReturn:
        """Stand it beside the server."""
        await self.keyring.watch()


def _of(notes: Sequence[Note], name: str) -> Iterator[tuple[str, bytes]]:
    """Keys and values of one book."""
    return ((key, value) for book, key, value in notes if book == name and value is not None)
