"""A request that fails is answered with its error; the conversation goes on until stdin ends. Over real pipes."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import Mapping

from pdctl.demo.talk import converse, tell
from pdctl.errors import NotReady


async def answer(request: dict[str, object]) -> Mapping[str, object]:
    match request["op"]:
        case "refuse":
            raise NotReady("not yet: wait")
        case "break":
            raise ZeroDivisionError("oops")
        case "hang":
            await asyncio.Event().wait()
    return {"said": request["say"]}


async def conversation(*requests: dict[str, object]) -> list[dict[str, object]]:
    told = io.StringIO()
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as source, os.fdopen(writing, "wb", buffering=0) as sink:
        for request in requests:
            sink.write(json.dumps(request).encode() + b"\n")
        sink.close()
        async with asyncio.timeout(60):
            await converse(answer, source, told)
    return [json.loads(line) for line in told.getvalue().splitlines()]


async def test_every_request_gets_its_own_answer() -> None:
    told = await conversation({"id": 1, "op": "say", "say": "a"}, {"id": 2, "op": "say", "say": "b"})
    assert told == [{"answers": 1, "said": "a"}, {"answers": 2, "said": "b"}]


async def test_an_error_is_an_answer_and_others_are_still_answered() -> None:
    told = await conversation({"id": 1, "op": "refuse"}, {"id": 2, "op": "break"}, {"id": 3, "op": "say", "say": "c"})
    assert told == [
        {"answers": 1, "error": "not yet: wait", "kind": "NotReady"},
        {"answers": 2, "error": "ZeroDivisionError('oops')", "kind": "defect"},
        {"answers": 3, "said": "c"},
    ]


async def test_the_end_of_stdin_ends_it_even_while_a_request_hangs() -> None:
    assert await conversation({"id": 1, "op": "hang"}) == []


def test_news_is_one_json_line() -> None:
    told = io.StringIO()
    tell("sent", to=told, room=5)
    assert told.getvalue() == '{"event": "sent", "room": 5}\n'
