"""Rooms that ask the same at one moment share an answer, and none gets one from before it asked."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator

import pytest

from pdctl.together import Together
from tests.patience import until

WHO = contextvars.ContextVar("WHO", default="nobody")


class Source:
    """Says which question it was that is answered, when it is let."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended = 0
        self.gates: list[asyncio.Event] = []
        self.trouble: dict[int, Exception] = {}

    async def __call__(self) -> int:
        number = len(self.begun)
        self.begun.append(WHO.get())
        self.gates.append(asyncio.Event())
        try:
            await self.gates[number].wait()
        finally:
            self.ended += 1
        if number in self.trouble:
            raise self.trouble[number]
        return number


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def together() -> Iterator[Together[str, int]]:
    it: Together[str, int] = Together(patience_s=60.0)
    yield it
    assert len(it) == 0, "nothing is kept"


async def asked(together: Together[str, int], source: Source, n: int = 1, key: str = "seat") -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(together.ask(key, source)) for _ in range(n)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_many_at_one_moment_are_two_questions(together: Together[str, int], source: Source) -> None:
    tasks = await asked(together, source, 64)
    assert len(source.begun) == 1
    source.gates[0].set()
    await until(lambda: len(source.begun) == 2)
    source.gates[1].set()
    assert await asyncio.gather(*tasks) == [0] + [1] * 63


async def test_an_answer_is_never_older_than_the_question(together: Together[str, int], source: Source) -> None:
    (first,) = await asked(together, source)
    (second,) = await asked(together, source)
    source.gates[0].set()
    assert await first == 0
    await until(lambda: len(source.begun) == 2)
    (third,) = await asked(together, source)  # the second question was on its way before
    source.gates[1].set()
    assert await second == 1
    await until(lambda: len(source.begun) == 3)
    source.gates[2].set()
    assert await third == 2


async def test_other_questions_do_not_wait(together: Together[str, int], source: Source) -> None:
    tasks = await asked(together, source) + await asked(together, source, key="another seat")
    assert len(source.begun) == 2
    for gate in source.gates:
        gate.set()
    assert await asyncio.gather(*tasks) == [0, 1]


async def test_a_failure_is_told_to_those_who_share_it_and_to_nobody_else(
    together: Together[str, int], source: Source
) -> None:
    source.trouble = {0: OSError("lost"), 1: ValueError("refused")}
    tasks = await asked(together, source, 3)
    source.gates[0].set()
    await until(lambda: len(source.begun) == 2)
    tasks += await asked(together, source)
    source.gates[1].set()
    await until(lambda: len(source.begun) == 3)
    source.gates[2].set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert list(map(repr, found)) == ["OSError('lost')", *["ValueError('refused')"] * 2, "2"]


async def test_who_leaves_does_not_take_the_answer_of_others_along(
    together: Together[str, int], source: Source
) -> None:
    leaver, *others = await asked(together, source, 3)
    joined = others.pop()
    for each in (leaver, joined):
        each.cancel()
    (other,) = others
    await asyncio.wait({leaver, joined})
    source.gates[0].set()
    await until(lambda: len(source.begun) == 2)
    assert not other.done()
    source.gates[1].set()
    assert await other == 1


async def test_a_question_that_nobody_waits_for_is_dropped(together: Together[str, int], source: Source) -> None:
    first, second, third = await asked(together, source, 3)
    for each in (second, third):
        each.cancel()
    await asyncio.wait({second, third})
    first.cancel()
    await asyncio.wait({first})
    await until(lambda: source.ended == 1)
    assert len(source.begun) == 1
    (later,) = await asked(together, source)
    source.gates[1].set()
    assert await later == 1


async def test_a_question_that_hangs_holds_nobody_for_long(source: Source) -> None:
    together: Together[str, int] = Together(patience_s=0.01)
    hung, *others = await asked(together, source, 5)
    await until(lambda: len(source.begun) == 2)
    source.gates[1].set()
    assert await asyncio.gather(*others) == [1] * 4
    assert not hung.done()
    source.gates[0].set()
    assert await hung == 0
    assert len(together) == 0


async def test_a_question_carries_the_trace_of_who_asked_it_first(together: Together[str, int], source: Source) -> None:
    async def as_somebody(name: str) -> int:
        WHO.set(name)
        return await together.ask("seat", source)

    tasks = [asyncio.create_task(as_somebody(name)) for name in ("a", "b", "c")]
    await until(lambda: len(source.begun) == 1)
    source.gates[0].set()
    await until(lambda: len(source.begun) == 2)
    source.gates[1].set()
    await asyncio.gather(*tasks)
    assert source.begun == ["a", "b"]


async def test_a_question_that_is_cancelled_from_within_ends_the_wait(together: Together[str, int]) -> None:
    async def broken() -> int:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await together.ask("seat", broken)
    await asyncio.sleep(0)
