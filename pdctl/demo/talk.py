"""
The rank's side of the conversation with the demo: JSON lines in on stdin, answers and news out on stdout.

Every request is a task of its own; what ends one with an error is its answer, never the end of the process. The end of
stdin is the end of the conversation.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, BinaryIO, TextIO

import structlog

from pdctl.errors import PdctlError

log = structlog.get_logger(__name__)

Request = dict[str, Any]
Answer = Mapping[str, object]
_LINE_LIMIT = 1 << 20


def tell(event: str, *, to: TextIO = sys.stdout, **values: object) -> None:
    """Say something unasked."""
    _write(to, {"event": event, **values})


async def converse(answer: Callable[[Request], Awaitable[Answer]], source: BinaryIO, to: TextIO = sys.stdout) -> None:
    """Answer requests until `source` ends; then cancel those under way and return."""
    lines = await _lines(source)
    async with asyncio.TaskGroup() as tasks:
        under_way: set[asyncio.Task[None]] = set()
        async for line in lines:
            task = tasks.create_task(_answer(answer, json.loads(line), to))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        for task in under_way:
            task.cancel()


async def _answer(answer: Callable[[Request], Awaitable[Answer]], request: Request, to: TextIO) -> None:
    number = request.pop("id")
    try:
        told = await answer(request)
    except PdctlError as error:
        told = {"error": str(error), "kind": type(error).__name__}
    except Exception as error:
        log.exception("request failed by a defect", op=request.get("op"))
        told = {"error": repr(error), "kind": "defect"}
    _write(to, {"answers": number, **told})


async def _lines(source: BinaryIO) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=_LINE_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    return reader


def _write(to: TextIO, told: Answer) -> None:
    to.write(json.dumps(told) + "\n")
    to.flush()
