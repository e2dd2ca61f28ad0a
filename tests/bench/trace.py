"""
Requests of a trace: when they come, and which 512-token blocks they have; equal beginnings are equal prefixes.

Reads the lines of the Mooncake FAST'25 release as they are, and those of the excerpt beside this file, in which blocks
that count on are written as [first, how many].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

EXCERPT = Path(__file__).with_name("conversation_excerpt.jsonl")
WHOLE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"


@dataclass(frozen=True, slots=True)
class Asked:
    """`at_s`: seconds after the trace's first."""

    at_s: float
    n_tokens: int
    blocks: tuple[int, ...]


def read(path: Path, seconds: float) -> list[Asked]:
    """The requests of its first seconds."""
    with path.open() as lines:
        return list(takewhile(lambda asked: asked.at_s < seconds, map(_asked, filter(str.strip, lines))))


def _asked(line: str) -> Asked:
    told = json.loads(line)
    return Asked(told["timestamp"] / 1000, told["input_length"], tuple(_blocks(told["hash_ids"])))


def _blocks(given: Iterable[int | list[int]]) -> Iterator[int]:
    for each in given:
        if isinstance(each, int):
            yield each
        else:
            first, n = each
            yield from range(first, first + n)


def excerpt(source: Path, seconds: float) -> Iterator[str]:
    """The lines of an excerpt: how the one beside this file was made."""
    for asked in read(source, seconds):
        row = {"timestamp": round(asked.at_s * 1000), "input_length": asked.n_tokens, "hash_ids": _runs(asked.blocks)}
        yield json.dumps(row, separators=(",", ":"))


def _runs(blocks: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for each in blocks:
        if runs and sum(runs[-1]) == each:
            runs[-1][1] += 1
        else:
            runs.append([each, 1])
    return runs
