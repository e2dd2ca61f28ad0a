"""What a check says, and how long it may take to say it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

import structlog

from pdctl.config import Settings

log = structlog.get_logger(__name__)

DEADLINE_S = 30.0


class Result(StrEnum):
    OK = "ok"
    WARN = "warn"  # works, or may: somebody should know
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Said:
    """What one check found: how it stands, how that is known, and what to do unless all is well."""

    result: Result
    evidence: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """`name` of the check, and what it said."""

    name: str
    result: Result
    evidence: str
    fix: str


Check = Callable[[Settings], Said | Awaitable[Said]]


def ok(evidence: str) -> Said:
    return Said(Result.OK, evidence)


def warn(evidence: str, fix: str) -> Said:
    return Said(Result.WARN, evidence, fix)


def fail(evidence: str, fix: str) -> Said:
    return Said(Result.FAIL, evidence, fix)


def split(sentence: str) -> Said:
    """Of "what happened: what to do", as all errors of ours are worded."""
    evidence, _, fix = sentence.rpartition(": ")
    return fail(evidence or sentence, fix if evidence else "see its words")


async def checked(name: str, check: Check, settings: Settings, deadline_s: float = DEADLINE_S) -> Checked:
    """Run one check. Whatever it meets, it has said something within its deadline."""
    try:
        async with asyncio.timeout(deadline_s):
            told = check(settings)
            said = told if isinstance(told, Said) else await told
    except TimeoutError:
        said = fail(f"not done within {deadline_s:g} s", "something on this host hangs: run it alone, with --only")
    except Exception as error:  # a check that breaks must not hide the others
        log.debug("check broke", check=name, exc_info=error)
        said = fail(f"the check itself broke: {type(error).__name__}: {error}", "run it with --log-level debug")
    return Checked(name, said.result, said.evidence, said.fix)
