"""
One run of all promises: is it a bootstrap registry at all, has it a fleet, each promise in turn, and everything away.

Nothing is registered at a server that is none, nor at one that has ranks already, unless that is wanted: what follows
would replace them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

from pdctl.conformance.asking import Asker, NoAnswer, Said, asking
from pdctl.conformance.promises import PROMISES, Finding, Promise, Verdict, broken, untried
from pdctl.conformance.subject import Subject, listening, registered_there
from pdctl.credentials import Credentials
from pdctl.errors import ConfigError, Unreachable

_OTHERS = (  # method, path, status, words of the answer, what says so
    ("GET", "/query", 200, '"worker_addr"', "vLLM's Mooncake bootstrap server"),
    ("GET", "/metadata?key=pdctl-conformance", 404, "metadata not found", "Mooncake's metadata server"),
    ("GET", "/v1/models", 200, '"data"', "an engine's API server: its registry has a port of its own (8998)"),
)


@dataclass(frozen=True, slots=True)
class Course:
    """How one run goes.

    force         also where ranks are registered, whom it replaces
    from_address  a second address of this host; None: 127.0.0.2 for a server on loopback, else none
    rooms         how many are put for the promise that they are bounded; 0: it is not tried
    idle_s        of silence on a connection that has to stay. 6 s: more than the 5 s of common servers
    """

    force: bool = False
    from_address: str | None = None
    rooms: int = 0
    idle_s: float = 6.0

    def __post_init__(self) -> None:
        if self.rooms < 0 or not 0 <= self.idle_s <= 3600:
            raise ConfigError("rooms and idle seconds are 0 or more, and idle at most 3600: give others")


@dataclass(frozen=True, slots=True)
class Report:
    """`findings` in the order of `PROMISES`; `left`: what could not be taken away again."""

    url: str
    server: str
    findings: Sequence[tuple[Promise, Finding]]
    left: Sequence[str] = field(default=())

    @property
    def ok(self) -> bool:
        return all(finding.verdict is not Verdict.BROKEN for _, finding in self.findings)


def _tell_nobody(promise: Promise) -> None:
    """Of a promise whose turn it is."""


async def run(
    url: str, credentials: Credentials, course: Course, tell: Callable[[Promise], None] = _tell_nobody
) -> Report:
    """Raises Unreachable where nobody answers or no registry does, ConfigError where it has ranks already."""
    async with AsyncExitStack() as stack:
        ask = await stack.enter_async_context(asking(url, credentials))
        server = await recognised(ask)
        await _check_is_empty(ask, force=course.force)
        local = course.from_address or _second_loopback(ask.url)
        elsewhere = None if local is None else await stack.enter_async_context(asking(url, credentials, local))
        addresses = await stack.enter_async_context(listening(ask.url))
        anew = partial(asking, url, credentials)
        one = Subject(ask, elsewhere, anew, addresses, course.rooms, course.idle_s, server.has_leases, server.is_locked)
        left: list[str] = []
        try:
            findings = [(promise, await _checked(promise, one, tell)) for promise in PROMISES]
        finally:
            left += await one.clear()
        left.append(f"{course.rooms + 2} rooms, which go when their time is over")
        return Report(ask.url, server.name, findings, left)


@dataclass(frozen=True, slots=True)
class Recognised:
    """What answers, in words.

    has_leases  pdctl's own wire too, by which ranks hold leases and go again
    is_locked   it is there, and not for us
    """

    name: str
    has_leases: bool = False
    is_locked: bool = False


async def recognised(ask: Asker) -> Recognised:
    """What answers there. Raises Unreachable where it is no bootstrap registry."""
    answers = [await ask("GET", "/route"), await _topology(ask)]
    without_query, topology = answers
    served = topology.status == 200 and "attn_tp_size" in topology.row()
    if without_query.status == 400 and (served or topology.status == 503):
        listed = await ask("GET", "/v1/instances")
        if listed.status in (401, 403):
            return Recognised("pdctl, whose /v1 wants a token", is_locked=True)
        if "instances" in listed.row():
            return Recognised("pdctl", has_leases=True)
        return Recognised("a bootstrap registry on SGLang's wire")
    if 401 in {said.status for said in answers} or 403 in {said.status for said in answers}:
        raise Unreachable(
            f"what answers at {ask.url} does not let us in ({topology}): give --token-file or a certificate"
        )
    other = await _other(ask)
    what = f"it is {other}" if other else f"GET /route says {without_query}"
    raise Unreachable(f"what answers at {ask.url} is no bootstrap registry on SGLang's wire: {what}")


async def _other(ask: Asker) -> str | None:
    for method, path, status, words, name in _OTHERS:
        said = await ask(method, path)
        if said.status == status and words in said.text:
            return name
    return None


async def _check_is_empty(ask: Asker, *, force: bool) -> None:
    """Raises ConfigError where somebody is registered, or nobody can say."""
    said = await _topology(ask)
    there = registered_there(said)
    listed = (await ask("GET", "/v1/instances")).row().get("instances")
    alive = sum(int(row.get("alive", 0)) for row in listed if isinstance(row, dict)) if isinstance(listed, list) else 0
    if force or (there == 0 and not alive):
        return
    if said.status == 200:
        who = "an instance is served"
    else:
        who = (
            f"{max(there or 0, alive)} ranks are registered" if there or alive else "it does not say whether ranks are"
        )
    raise ConfigError(
        f"{who} at {ask.url}, and a run registers ranks in their place: take a server without a fleet, or --force"
    )


async def _topology(ask: Asker) -> Said:
    names = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
    return await ask("GET", "/route", params=dict.fromkeys(names, -1))


async def _checked(promise: Promise, one: Subject, tell: Callable[[Promise], None]) -> Finding:
    """A server that does not answer breaks the promise in question; one that is gone can break no other."""
    tell(promise)
    try:
        return await promise.check(one)
    except NoAnswer as error:
        return broken(str(error)) if await _answers(one) else untried(f"the server is gone: {error}")


async def _answers(one: Subject) -> bool:
    try:
        return (await one.topology()).status > 0
    except NoAnswer:
        return False


def _second_loopback(url: str) -> str | None:
    try:
        address = ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return "127.0.0.2" if urlsplit(url).hostname == "localhost" else None
    return "127.0.0.2" if address.version == 4 and address.is_loopback else None
