"""
The promises, in the order in which they can be put to a server that nobody can empty.

Each is a function of the subject that asks and says what it found: kept, broken, or untried and why. All build on one
made-up instance that comes up, serves, changes and goes, since a stock server takes the first rank's word for good; so
the order is part of what they mean, and each judges only what it has asked itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pdctl.conformance.asking import Asker, NoAnswer, Said
from pdctl.conformance.subject import LEFT_BEHIND_PAGE_SIZE, PAGE_SIZE, SIZE, Subject

ROOM = (1 << 62) + 0x9DC71
"""A room of nobody: numbers below 2**63 are drawn by routers, and one of so many is not met again."""

_NEEDED = (
    *("attn_tp_size", "attn_tp_rank", "attn_cp_size", "attn_cp_rank", "attn_dp_size", "attn_dp_rank"),
    *("pp_size", "pp_rank", "system_dp_size", "system_dp_rank", "rank_ip", "rank_port", "page_size", "kv_cache_dtype"),
)
_TOPOLOGY_NEEDED = {
    *("attn_tp_size", "attn_cp_size", "dp_size", "pp_size", "page_size", "kv_cache_dtype", "follow_bootstrap_room")
}
_TOPOLOGY_KNOWN = _TOPOLOGY_NEEDED | {
    *("enable_dsa_cache_layer_split", "decode_allocation_policy", "enable_kv_cache_sharding", "prefill_http_port"),
    *("target_tp_rank", "target_tp_ranks", "target_cp_ranks", "target_pp_ranks", "required_dst_info_num"),
    *("required_prefill_response_num", "kv_layout", "dsv41_spec_layout"),
}
"""A stock decode unpacks the answer into a dataclass: by a key too many or too few it never starts."""

_LONG = 100_000
_TOO_LONG = (1 << 20) + 1024
_ROOMS_AT_ONCE = 16


class Verdict(StrEnum):
    """What one promise came to."""

    KEPT = "kept"
    BROKEN = "broken"
    UNTRIED = "untried"


@dataclass(frozen=True, slots=True)
class Finding:
    """`found`: what the server did, in words, with its own where they matter."""

    verdict: Verdict
    found: str


@dataclass(frozen=True, slots=True)
class Promise:
    """`says`: the promise in one sentence. `asks`: what is put to the server for it."""

    name: str
    says: str
    asks: str
    check: Callable[[Subject], Awaitable[Finding]]


def kept(found: str) -> Finding:
    return Finding(Verdict.KEPT, found)


def broken(found: str) -> Finding:
    return Finding(Verdict.BROKEN, found)


def untried(why: str) -> Finding:
    return Finding(Verdict.UNTRIED, why)


async def nobody_is_not_ready(subject: Subject) -> Finding:
    answers = [await subject.topology(), await subject.look_up(0)]
    for said in answers:
        if said.status == 200 or said.status == 500:
            return broken(f"with nobody registered: {said}")
    return kept(str(answers[0]))


async def partial_is_not_complete(subject: Subject) -> Finding:
    # Sent first of all, to an empty server, for `nothing_stays_of_what_was_refused`: the last field cannot be read
    await subject.put(SIZE - 1, page_size=LEFT_BEHIND_PAGE_SIZE, prefill_http_port="here")
    taken = await subject.put(0)
    if taken.status != 200:
        return broken(f"a rank is not taken: {taken}")
    for said in (await subject.topology(), await subject.look_up(0)):
        if said.status == 200:
            return broken(f"1 of {SIZE} ranks is there: {said}")
    return kept(f"1 of {SIZE} ranks: {await subject.topology()}")


async def a_retry_fills_one_seat(subject: Subject) -> Finding:
    for times in range(2, SIZE + 2):
        said = await subject.put(0)
        if said.status != 200:
            return broken(f"the {times}nd time: {said}")
        if (await subject.topology()).status == 200:
            return broken(f"one rank that came {times} times makes an instance of {SIZE} ready")
    return kept(f"one rank came {SIZE + 1} times and fills one seat of {SIZE}")


async def malformed_is_refused(subject: Subject) -> Finding:
    changes: dict[str, dict[str, Any]] = {f"without {name}": {name: ...} for name in _NEEDED}
    changes |= {f"{name} a word": {name: "here"} for name in ("rank_port", "page_size", "attn_tp_size")}
    changes |= {f"{name} null": {name: None} for name in ("rank_port", "attn_tp_rank", "pp_size")}
    others: dict[str, object] = {"an array": [1, 2], "null": None, "a word": "here"}
    answers = {what: await subject.put(SIZE - 1, **each) for what, each in changes.items()}
    answers |= {what: await subject.ask("PUT", "/route", body) for what, body in others.items()}
    for what, text in (("no JSON", '{"a": '), ("no body", "")):
        answers[what] = await subject.ask("PUT", "/route", text=text)
    return _all_refused(answers)


async def impossible_is_refused(subject: Subject) -> Finding:
    last = SIZE - 1
    cases: dict[str, dict[str, Any]] = {
        "rank 16 of 16": {"attn_tp_rank": SIZE},
        "rank -1": {"attn_tp_rank": -1},
        "pp rank 1 of 1": {"pp_rank": 1},
        "tp size 0": {"attn_tp_size": 0},
        "cp size 0": {"attn_cp_size": 0},
        "port 0": {"rank_port": 0},
        "port 70000": {"rank_port": 70000},
        "page size 0": {"page_size": 0},
        "page size -16": {"page_size": -PAGE_SIZE},
        "a numeric address": {"rank_ip": 7},
    }
    return _all_refused({what: await subject.put(last, **changes) for what, changes in cases.items()})


async def undialable_is_refused(subject: Subject) -> Finding:
    answers = {repr(host): await subject.put(SIZE - 1, rank_ip=host) for host in ("", "0.0.0.0", "::", "a b", "x/y")}
    return _all_refused(answers)


async def contradictions_are_refused(subject: Subject) -> Finding:
    cases: dict[str, dict[str, Any]] = {
        "another tp size": {"attn_tp_size": SIZE * 2},
        "another cp size": {"attn_cp_size": 2},
        "another dp size": {"attn_dp_size": 2},
        "another pp size": {"pp_size": 2},
        "another page size": {"page_size": PAGE_SIZE * 8},
        "another dtype": {"kv_cache_dtype": "fp8_e4m3"},
        "another layout": {"kv_layout": "flashmla"},
        "another policy": {"decode_allocation_policy": "prefill_complete"},
    }
    return _all_refused({what: await subject.put(SIZE - 1, **changes) for what, changes in cases.items()})


async def tables_are_bounded(subject: Subject) -> Finding:
    put = subject.put
    answers = {
        "a tp size of 10**9": await put(SIZE - 1, attn_tp_size=10**9),
        "dp rank 10**9 of 10**9 + 1": await put(SIZE - 1, attn_dp_size=10**9 + 1, attn_dp_rank=10**9),
        "a dtype of 100 KB": await put(SIZE - 1, kv_cache_dtype="x" * _LONG),
        "an address of 100 KB": await put(SIZE - 1, rank_ip="x" * _LONG),
        "a room of 4,000 digits": await subject.ask(
            "POST", "/register_dp_rank", text=f'{{"bootstrap_room": {"9" * 4000}, "dp_rank": 0}}'
        ),
        "dp rank 10**12 of a room": await _room(subject.ask, ROOM, 10**12),
        "a body of 1 MiB": await subject.ask("PUT", "/route", text=" " * _TOO_LONG),
    }
    return _all_refused(answers)


async def bad_questions_are_refused(subject: Subject) -> Finding:
    ask = subject.ask
    answers = {
        "no query": await ask("GET", "/route"),
        "three of four": await ask(
            "GET", "/route", params={"prefill_dp_rank": 0, "prefill_cp_rank": 0, "target_tp_rank": 0}
        ),
        "an empty rank": await subject.look_up(""),
        "a word for a rank": await subject.look_up("here"),
        "DELETE /route": await ask("DELETE", "/route"),
    }
    return _all_refused(answers)


async def bad_rooms_are_refused(subject: Subject) -> Finding:
    ask = subject.ask
    told: dict[str, object] = {
        "no room": {"dp_rank": 0},
        "no rank": {"bootstrap_room": ROOM},
        "a word for a room": {"bootstrap_room": "here", "dp_rank": 0},
        "null for a rank": {"bootstrap_room": ROOM, "dp_rank": None},
        "an array": [],
    }
    asked: dict[str, object] = {
        "a query without rooms": {},
        "a number for rooms": {"bootstrap_rooms": ROOM},
        "a text for rooms": {"bootstrap_rooms": "77"},
        "a word among rooms": {"bootstrap_rooms": ["here"]},
    }
    answers = {what: await ask("POST", "/register_dp_rank", body) for what, body in told.items()}
    answers |= {what: await ask("POST", "/query_dp_ranks", body) for what, body in asked.items()}
    answers |= {"rooms that are no JSON": await ask("POST", "/query_dp_ranks", text="{")}
    return _all_refused(answers)


async def rooms_are_remembered(subject: Subject) -> Finding:
    largest = (1 << 63) - 1  # that routers draw
    for room, dp_rank in ((ROOM, 0), (ROOM, 1), (largest, 3)):
        said = await _room(subject.ask, room, dp_rank)
        if said.status != 200:
            return broken(f"room {room}: {said}")
    asked = {"bootstrap_rooms": [ROOM, ROOM + 1, largest]}
    found = await subject.ask("POST", "/query_dp_ranks", asked)
    wanted = {str(ROOM): 1, str(largest): 3}
    return kept("the last word of each, strangers absent") if found.body == wanted else broken(f"{found}")


async def a_complete_instance_is_served(subject: Subject) -> Finding:
    taken = await _at_once(subject.put(tp) for tp in range(SIZE))
    if refused := [said for said in taken if said.status != 200]:
        return broken(f"{len(refused)} of {SIZE} ranks that came at once were not taken: {refused[0]}")
    said = await subject.topology()
    shown = said.row()
    if said.status != 200:
        return broken(f"all {SIZE} ranks are there: {said}")
    if unknown := sorted({*shown} - _TOPOLOGY_KNOWN):
        return broken(f"the topology has {', '.join(unknown)}: no stock decode starts with a key that it does not know")
    if absent := sorted(_TOPOLOGY_NEEDED - {*shown}):
        return broken(f"the topology lacks {', '.join(absent)}")
    sizes = [shown[name] for name in ("attn_tp_size", "attn_cp_size", "dp_size", "pp_size")]
    if sizes != [SIZE, 1, 1, 1]:
        return broken(f"sizes {sizes} instead of {[SIZE, 1, 1, 1]}")
    if lost := [tp for tp in range(SIZE) if not await subject.finds(tp)]:
        return broken(f"rank {lost[0]} is not found where it listens: {await subject.look_up(lost[0])}")
    subject.is_complete = True
    return kept(f"{SIZE} ranks that came at once, each found where it listens")


async def nothing_stays_of_what_was_refused(subject: Subject) -> Finding:
    shown = (await subject.topology()).row()
    if not subject.is_complete:
        return untried("the instance never became complete")
    if shown.get("page_size") == LEFT_BEHIND_PAGE_SIZE:
        return broken(
            f"page_size is {LEFT_BEHIND_PAGE_SIZE}, of a claim that was refused for its last field; the ranks have "
            f"{PAGE_SIZE}"
        )
    return kept(f"page_size is {shown.get('page_size')}, as the ranks that were taken have it")


async def an_unknown_seat_is_not_found(subject: Subject) -> Finding:
    if not subject.is_complete:
        return untried("the instance never became complete")
    answers = {f"tp rank {SIZE * 8}": await subject.look_up(SIZE * 8), "dp rank 1": await subject.look_up(0, dp=1)}
    answers |= {"dp rank -1": await subject.look_up(0, dp=-1)}
    return _all_refused(answers)


async def a_restarted_rank_replaces_itself(subject: Subject) -> Finding:
    if not subject.is_complete:
        return untried("the instance never became complete")
    said = await subject.put(3, address=SIZE)
    if said.status != 200:
        return broken(f"the rank's new process is not taken: {said}")
    if not await subject.finds(3, SIZE):
        return broken(f"the old address is served: {await subject.look_up(3)}")
    if not await subject.finds(4) or (await subject.topology()).status != 200:
        return broken("the others are served no more")
    return kept("its new address at once, the others as before")


async def a_kept_connection_stays(subject: Subject) -> Finding:
    async with subject.anew() as ask:
        before = await ask("GET", "/route")
        await asyncio.sleep(subject.idle_s)
        after = await ask("GET", "/route")
    if after.status != before.status or ask.connections() != 1:
        return broken(
            f"after {subject.idle_s:g} s of silence it was closed: a rank is looked up once, and would be lost"
        )
    return kept(f"after {subject.idle_s:g} s of silence it still answers")


async def the_living_are_not_overwritten(subject: Subject) -> Finding:
    if not subject.is_complete:
        return untried("the instance never became complete")
    if subject.elsewhere is None:
        return untried("needs a second address of this host that reaches the server: --from-address")
    if subject.is_locked:
        return untried("its leases want a token: --token-file")
    how = "listens"
    if subject.has_leases:
        held = await subject.hold(7)
        how = "listens and holds a lease" if held.status == 200 else f"listens (it got no lease: {held})"
    said = await subject.elsewhere("PUT", "/route", subject.rank(7, address=SIZE + 1))
    if await subject.finds(7):
        return kept(f"the holder {how}; a claim from elsewhere: {said}")
    await subject.put(7)
    return broken(f"the holder {how}; a claim from elsewhere takes its seat: {said}")


async def a_rank_can_be_taken_out(subject: Subject) -> Finding:
    if not subject.is_complete:
        return untried("the instance never became complete")
    if subject.is_locked:
        return untried("its way wants a token: --token-file")
    gone = await subject.leave(7)
    if gone is None:
        said = await subject.ask("DELETE", "/route", subject.rank(7))
        if said.status != 200:
            return broken(f"there is no way: DELETE /route says {said}")
        gone = said
    served = await subject.topology()
    again = await subject.put(7)
    if gone.status != 200 or served.status == 200:
        return broken(f"a rank that said goodbye ({gone}): {served}")
    if again.status != 200 or not await subject.finds(7):
        return broken(f"it cannot come back: {again}")
    return kept(f"without it: {served}; and it came back")


async def a_restart_with_another_shape_replaces(subject: Subject) -> Finding:
    """The whole prefill starts anew with TP 2: what is served must be the old one or the new one, never of both."""
    if not subject.is_complete:
        return untried("the instance never became complete")
    changes = {"page_size": PAGE_SIZE * 2}
    said = await subject.put(0, address=SIZE + 2, size=2, **changes)
    between = await subject.topology(), await subject.look_up(0)
    if (
        between[0].row().get("attn_tp_size") == SIZE
        and between[1].row().get("rank_port") == subject.addresses[SIZE + 2].port
    ):
        return broken("between the two, the old topology is served with a new rank's address")
    last = await subject.put(1, address=SIZE + 3, size=2, **changes)
    shown = (await subject.topology()).row()
    if (shown.get("attn_tp_size"), shown.get("page_size")) != (2, PAGE_SIZE * 2):
        return broken(
            f"both ranks of the new one came ({said.status}, {last.status}), and a TP of {shown.get('attn_tp_size')} "
            f"with pages of {shown.get('page_size')} is served"
        )
    return kept("the new one as soon as it is complete, and no mixture before")


async def health_is_told(subject: Subject) -> Finding:
    answers = {f"{method} /health": await subject.ask(method, "/health") for method in ("GET", "HEAD")}
    for what, said in answers.items():
        if said.status != 200:
            return broken(f"{what}: {said}")
    return kept("200 to GET and HEAD")


async def rooms_are_bounded(subject: Subject) -> Finding:
    if not subject.rooms:
        return untried("takes long, and its rooms stay until they expire: --rooms 1100000")
    for start in range(0, subject.rooms, _ROOMS_AT_ONCE):
        numbers = range(ROOM + start, ROOM + min(start + _ROOMS_AT_ONCE, subject.rooms))
        try:
            answers = await _at_once(_room(subject.ask, number, 0) for number in numbers)
        except NoAnswer as error:
            return untried(f"after {start} rooms {error}")
        for said in answers:
            if said.status != 200:
                return kept(f"after {start} rooms: {said}")
    return broken(f"{subject.rooms} rooms were taken")


def _all_refused(answers: Mapping[str, Said]) -> Finding:
    """Each of them a 4xx."""
    wrong = {what: said for what, said in answers.items() if not said.refuses}
    if not wrong:
        return kept(f"{len(answers)} of {len(answers)} are a 4xx")
    shown = "; ".join(f"{what}: {statuses}" for what, statuses in _grouped(wrong))
    return broken(f"{len(wrong)} of {len(answers)} are none: {shown}")


def _grouped(wrong: Mapping[str, Said]) -> Iterable[tuple[str, int]]:
    """By status, so that twenty alike are one piece of news."""
    by_status: dict[int, list[str]] = {}
    for what, said in wrong.items():
        by_status.setdefault(said.status, []).append(what)
    for status, names in sorted(by_status.items()):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield ", ".join(names[:3]) + more, status


async def _at_once(questions: Iterable[Coroutine[Any, Any, Said]]) -> list[Said]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(question) for question in questions]
    except* NoAnswer as errors:
        lost = errors.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise NoAnswer(str(lost))


async def _room(ask: Asker, room: int, dp_rank: Any) -> Said:
    return await ask("POST", "/register_dp_rank", {"bootstrap_room": room, "dp_rank": dp_rank})


PROMISES: tuple[Promise, ...] = (
    Promise("empty", "With nobody registered nothing is served", "topology and a rank", nobody_is_not_ready),
    Promise(
        "partial",
        "Part of an instance is not complete",
        f"PUT of 1 rank of {SIZE}, topology, rank",
        partial_is_not_complete,
    ),
    Promise(
        "retry", "A retried PUT does not fill a second seat", f"the same PUT {SIZE + 1} times", a_retry_fills_one_seat
    ),
    Promise(
        "malformed",
        "What cannot be read is a 4xx",
        "PUTs without a field, of wrong types, no JSON",
        malformed_is_refused,
    ),
    Promise(
        "impossible", "What no rank can be is a 4xx", "PUTs of rank 16 of 16, port 0, size 0 ...", impossible_is_refused
    ),
    Promise(
        "undialable", "An address that nobody can dial is a 4xx", "PUTs with '', 0.0.0.0, :: ...", undialable_is_refused
    ),
    Promise(
        "contradiction",
        "A rank that contradicts its instance is a 4xx",
        "PUTs with other sizes, pages, dtype ...",
        contradictions_are_refused,
    ),
    Promise(
        "bounds", "What would grow without bound is a 4xx", "sizes of 10**9, texts of 100 KB, 1 MiB", tables_are_bounded
    ),
    Promise("questions", "A bad question is a 4xx", "GETs with missing ranks and words", bad_questions_are_refused),
    Promise("bad-rooms", "A bad room is a 4xx", "POSTs to both room paths", bad_rooms_are_refused),
    Promise(
        "rooms", "A room's DP rank is told, the last word of it", "2 rooms, one of them 2**63 - 1", rooms_are_remembered
    ),
    Promise(
        "complete",
        "A complete instance is served, as stock decodes read it",
        f"{SIZE} PUTs at once, all ranks",
        a_complete_instance_is_served,
    ),
    Promise(
        "refused-whole",
        "Of a claim that was refused nothing stays",
        "topology, after a PUT whose last field was bad",
        nothing_stays_of_what_was_refused,
    ),
    Promise(
        "unknown",
        "A seat that there is not is a 4xx",
        "look-ups of ranks beyond the sizes",
        an_unknown_seat_is_not_found,
    ),
    Promise(
        "restart", "A restarted rank replaces itself", "PUT of a rank with a new port", a_restarted_rank_replaces_itself
    ),
    Promise("health", "/health answers", "GET and HEAD", health_is_told),
    Promise("keep-alive", "A kept connection is not closed early", "a question after silence", a_kept_connection_stays),
    Promise(
        "overwrite",
        "A rank that lives cannot be overwritten from elsewhere",
        "PUT of its seat from another address",
        the_living_are_not_overwritten,
    ),
    Promise("goodbye", "A rank can be taken out, and come back", "DELETE, topology, PUT", a_rank_can_be_taken_out),
    Promise(
        "reshape",
        "A restart with another shape replaces the instance, and is never mixed with it",
        "2 PUTs of an instance of TP 2",
        a_restart_with_another_shape_replaces,
    ),
    Promise("many-rooms", "Rooms are bounded", "POSTs, as many as --rooms says", rooms_are_bounded),
)
