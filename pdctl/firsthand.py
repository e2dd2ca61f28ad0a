"""
What `pdctl probe` asks of the peer itself, where no service asks for it: does this session work?

Prints nothing. Opens an engine for it where the wheel is installed, since only bytes that arrive prove that bytes
arrive; without one, the peer's handshake is all that can be had, and the answer says so.
"""

from __future__ import annotations

import time
from dataclasses import replace

import structlog

from pdctl.config import Settings, environment
from pdctl.core.address import Endpoint
from pdctl.core.kinds import Depth
from pdctl.device.open import open_device
from pdctl.engine.asking import Asking
from pdctl.engine.base import Proof
from pdctl.engine.mooncake import open_mooncake
from pdctl.errors import EngineUnavailable, TransferFailed
from pdctl.inquiry import Verdict

log = structlog.get_logger(__name__)


async def ask(settings: Settings, session: str, deadline_s: float, wanted: Depth) -> Verdict:
    """Ask the peer itself, as deep as `wanted`. Raises BadField for what is no session."""
    Endpoint.parse(session)
    if wanted is Depth.HANDSHAKE:
        return await _judged(Asking(), session, deadline_s, wanted)
    try:
        async with (
            open_device(settings.node.accelerator, environ=environment()) as device,
            open_mooncake(replace(settings.engine, host=settings.node.host), device) as engine,
        ):
            return await _judged(Asking(engine), session, deadline_s, wanted)
    except EngineUnavailable as error:
        log.warning("no engine to ask with, only the handshake is asked", why=str(error))
        return await _judged(Asking(), session, deadline_s, wanted)


async def _judged(asking: Asking, session: str, deadline_s: float, wanted: Depth) -> Verdict:
    began = time.monotonic()
    try:
        proof = await asking.prove(session, deadline_s=deadline_s)
    except TransferFailed as failure:
        took_s = time.monotonic() - began
        return Verdict(session, False, None, f"{failure.cause.replace('_', ' ')}: {failure.detail}", took_s)
    return _verdict(session, proof, wanted, time.monotonic() - began)


def _verdict(session: str, proof: Proof, wanted: Depth, seconds: float) -> Verdict:
    depth = proof.depth.name.lower()
    if proof.depth >= wanted:
        return Verdict(session, True, depth, proof.how, seconds)
    why = f"{proof.how}, and no deeper question could be put: whether data flows is not known"
    return Verdict(session, False, depth, why, seconds)
