"""
Mooncake's peer-to-peer handshake, spoken in asyncio: ask a peer who it is.

Wire (MOONCAKE_FACTS 1.5): u64le length, which counts the next byte | u8 kind | JSON. One question a connection.

Never loads the engine, never starts a thread, never waits past the deadline it was given. The engine's own question
(`send_probe`, or the first transfer to a peer) holds its thread for 61 s when the peer hangs; this one does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from pdctl.core.address import Endpoint
from pdctl.core.layout import Region
from pdctl.engine.base import PeerCard
from pdctl.engine.blame import own_fault
from pdctl.errors import BadField, Cause, TransferFailed
from pdctl.lag import patience

# 120,000 regions fit; the engine itself refuses more than MC_HANDSHAKE_MAX_LENGTH, which mooncake.py sets to this.
MAX_REPLY = 8 << 20
_LENGTH = struct.Struct("<Q")
_NOBODY = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
_INT64_END = 1 << 63
_RESET = struct.pack("ii", 1, 0)


class Kind(IntEnum):
    """The type byte of a question."""

    CONNECTION = 0
    METADATA = 1
    NOTIFY = 2
    PROBE = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply's JSON object, and the numeric address that gave it."""

    body: dict[str, Any]
    host: str


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A peer as its handshake describes it: the card that tells its life, and the text an engine can open it with.

    `host` is the numeric address that answered; bytes go there, whatever the peer says of itself.
    """

    card: PeerCard
    opening: bytes = field(repr=False)
    host: str = ""


async def ask(host: str, port: int, kind: Kind, body: dict[str, Any], *, deadline_s: float) -> Answer:
    """One question. Raises TransferFailed: REFUSED, TIMED_OUT, PEER_GONE or NOT_AN_ENGINE; LOCAL for our own fault."""
    session = str(Endpoint(host, port))
    try:
        async with patience(deadline_s):
            return await _ask(host, port, kind, body)
    except TimeoutError:
        raise TransferFailed(
            Cause.TIMED_OUT, session, f"no answer to the handshake within {deadline_s:g} s: hung, far or busy"
        ) from None
    except (EOFError, ConnectionResetError, BrokenPipeError) as cause:
        raise TransferFailed(Cause.PEER_GONE, session, "the connection ended before the handshake's answer") from cause
    except OSError as cause:
        if (ours := own_fault(cause)) is not None:
            raise TransferFailed(Cause.LOCAL, session, ours) from cause
        nobody = Cause.REFUSED if cause.errno in _NOBODY or cause.errno is None or cause.errno < 0 else Cause.PEER_GONE
        raise TransferFailed(nobody, session, f"cannot be reached: {cause.strerror or cause}") from cause
    except (ValueError, RecursionError) as cause:
        raise _foreign(session, cause) from cause


async def probe(session: str, *, deadline_s: float) -> None:
    """Return if something at `session` answers the probe question. Proves less than `metadata` does: an echo passes."""
    at = _endpoint(session)
    answer = await ask(at.host, at.port, Kind.PROBE, {}, deadline_s=deadline_s)
    if answer.body.get("status", "success") != "success":
        raise TransferFailed(Cause.NOT_AN_ENGINE, session, f"the probe was answered with {answer.body}")


async def metadata(session: str, *, deadline_s: float) -> Descriptor:
    """Who listens at `session`, and what memory it announces."""
    at = _endpoint(session)
    answer = await ask(at.host, at.port, Kind.METADATA, {}, deadline_s=deadline_s)
    try:
        return _descriptor(session, answer)
    except (ValueError, RecursionError) as cause:
        raise _foreign(session, cause) from cause


async def knock(session: str, found: Descriptor, *, deadline_s: float) -> None:
    """Connect to the peer's data port and leave. Raises NO_DATA.

    The engine has no time limit of its own there: a block to a port that swallows packets is in flight for the two
    minutes that the kernel tries, and one that is refused makes the next wait for a second (measured).
    """
    port = found.card.data_port
    try:
        async with patience(deadline_s):
            _, writer = await asyncio.open_connection(found.host, port)
    except TimeoutError:
        raise TransferFailed(
            Cause.NO_DATA, session, f"its data port {port} does not answer within {deadline_s:.2g} s: is it firewalled?"
        ) from None
    except OSError as cause:
        if (ours := own_fault(cause)) is not None:
            raise TransferFailed(Cause.LOCAL, session, ours) from cause
        detail = f"its data port {port} cannot be reached: {os.strerror(cause.errno) if cause.errno else cause}"
        raise TransferFailed(Cause.NO_DATA, session, detail) from cause
    # Reset, not closed: no end of it may linger, a port in TIME_WAIT keeps its process's successor out for a minute.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _ask(host: str, port: int, kind: Kind, body: dict[str, Any]) -> Answer:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        question = bytes([kind]) + json.dumps(body).encode() + b"\n"
        writer.write(_LENGTH.pack(len(question)) + question)
        await writer.drain()
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if not 2 <= length <= MAX_REPLY:
            raise ValueError(f"the reply claims {length} bytes")
        reply = await reader.readexactly(length)
        return Answer(_object(reply, kind), writer.get_extra_info("peername")[0])
    finally:
        # At once, not politely: the peer's listener is one thread and waits up to 5 s for our close.
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _foreign(session: str, cause: Exception) -> TransferFailed:
    return TransferFailed(Cause.NOT_AN_ENGINE, session, f"what answers there is no Mooncake engine: {cause}")


def _object(reply: bytes, kind: Kind) -> dict[str, Any]:
    if reply[0] != kind:
        raise ValueError(f"question {int(kind)} got an answer to question {reply[0]}")
    body = json.loads(reply[1:])
    if not isinstance(body, dict):
        raise ValueError("the reply is no JSON object")
    return body


def _endpoint(session: str) -> Endpoint:
    try:
        return Endpoint.parse(session)
    except BadField as cause:
        raise TransferFailed(Cause.REJECTED_ADDRESS, session, f"no session id: {cause}") from cause


def _descriptor(session: str, answer: Answer) -> Descriptor:
    """An echo of the question has neither protocol nor buffers; a stock engine always has both."""
    body, buffers = answer.body, answer.body.get("buffers") or []
    if not isinstance(body.get("protocol"), str) or not isinstance(buffers, list):
        raise ValueError("its handshake names no protocol and no buffers")
    # One region at NULL makes every engine refuse the whole descriptor, so it is left out.
    sound = {_region(buffer): buffer for buffer in buffers}
    sound = {region: buffer for region, buffer in sound.items() if region.pointer > 0 and region.nbytes > 0}
    card = PeerCard(session, _natural(body.get("tcp_data_port", 0), 65_536), tuple(sound))
    # The peer's own word on where to connect is not taken: whoever was asked is whom the bytes go to.
    opening = {**body, "tcp_data_host": answer.host, "buffers": list(sound.values())}
    return Descriptor(card, json.dumps(opening).encode() + b"\n", answer.host)


def _region(buffer: object) -> Region:
    if not isinstance(buffer, dict):
        raise ValueError(f"a buffer is {buffer!r}")
    pointer = _natural(buffer.get("addr"), _INT64_END)
    return Region(pointer, _natural(buffer.get("length"), _INT64_END - pointer))


def _natural(value: object, end: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
        raise ValueError(f"{value!r} is no number from 0 to {end - 1}")
    return value
