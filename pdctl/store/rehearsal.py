"""
The set-up, tried in a process of its own first: what would freeze or end this one, freezes or ends that one.

A master that hangs after its HTTP has answered, a protocol or a metadata server that the wheel tries for 22 to 100 s, a
device that is a segmentation fault: the wheel holds the interpreter in all of them, and nothing in its own process can
stop it. The scout gives no segment and touches no SSD directory. What is left is the moment between its end and ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import structlog

from pdctl.core.kvstore import SetUp
from pdctl.core.warmup import Step
from pdctl.errors import StoreCause, StoreFailed
from pdctl.store.mooncake import cause_of

log = structlog.get_logger(__name__)

_OFFLOAD = ("enable_ssd_offload", "ssd_offload_path")


async def rehearse(plan: SetUp, command: Sequence[str], *, deadline_s: float) -> None:
    """Returns when the same set-up has worked in the process that `command` starts. Raises StoreFailed (SET_UP)."""
    try:
        child = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError as cause:
        log.warning("the store's set-up is not rehearsed: no process can be started", cause=str(cause))
        return
    try:
        async with asyncio.timeout(deadline_s):
            told, _ = await child.communicate(json.dumps(asdict(_harmless(plan))).encode())
    except TimeoutError as cause:
        detail = f"set-up did not end within {deadline_s:.3g} s in a process of its own: the master or the device hangs"
        raise StoreFailed(StoreCause.TIMED_OUT, Step.SET_UP, detail) from cause
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    _judge(child.returncode or 0, told)


def _harmless(plan: SetUp) -> SetUp:
    options = {name: value for name, value in plan.options.items() if name not in _OFFLOAD}
    host, _, port = plan.local_hostname.rpartition(":")
    # Under the same name and port it would be the client that comes back too early (MOONCAKE_FACTS 8.5).
    name = host if host and port.isdigit() else plan.local_hostname
    return replace(plan, local_hostname=name, segment_nbytes=0, options=options)


def _judge(status: int, told: bytes) -> None:
    if status < 0:
        what = f"the wheel ended the process that tried it ({signal.Signals(-status).name})"
        raise StoreFailed(StoreCause.SET_UP_REFUSED, Step.SET_UP, what)
    if not told:
        log.warning("the store's set-up is not rehearsed: its process ended without a word", status=status)
        return
    answer: dict[str, Any] = json.loads(told)
    if answer["error"]:
        raise StoreFailed(StoreCause.SET_UP_REFUSED, Step.SET_UP, answer["error"])
    code = int(answer["code"])
    if code != 0:
        detail = f"a process of its own tried it for {answer['seconds']:.1f} s"
        raise StoreFailed(cause_of(code), Step.SET_UP, detail, code=code)
