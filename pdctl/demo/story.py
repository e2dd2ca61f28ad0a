"""
The story: pages move, things break, things heal, and every claim is a check with what was measured.

Five acts over one stage; each does one thing and judges it. A story that cannot go on is a failed check too, with the
ends of everybody's logs. The processes are stage.py's, the judging is report.py's, the drawing is screen.py's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from pdctl import config
from pdctl.demo import prompts as texts
from pdctl.demo.processes import Child, Ending, Event, Family, Question, family
from pdctl.demo.prompts import Prompt
from pdctl.demo.report import Check, Moved, Report, all_same_tokens
from pdctl.demo.screen import Screen
from pdctl.demo.stage import SETTINGS, Finished, Stage, fetch, is_closed, open_stage, start_rank, start_registry, until
from pdctl.demo.stage import value_of as metric
from pdctl.demo.toy import ToyConfig, as_text
from pdctl.demo.visit import LOOK_S, STOPPED_S, Visit
from pdctl.errors import PdctlError

REGISTRY_IS_LATE_S = 2.0
REGISTERED_WITHIN_S = 2.0  # the longest wait between two attempts here is 0.5 s
FAIL_FAST_S = 0.1
RECOVERED_WITHIN_S = 5.0  # a blocked session is asked at least every 0.5 s here
LONG_PROMPT = 960  # bytes: sixty pages, so that there is a middle to be stopped in
N_WAITING = 4  # requests that the stopped rank has announced and prefill has not begun

TOPOLOGY = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
RECOVERIES = "sglang:failed_session_recoveries_total"
BLOCKED = "pdctl_session_blocked"
_LONGEST_LINE = 300
WATCHED = (RECOVERIES, BLOCKED, "pdctl_session_changes_total")


Waiting = tuple[int, Prompt, Question]
"""A room, its prompt, and decode's answer that is still to come."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`prompts`: None for the built-in set. `trace`: replay `requests` requests of it instead. `json`: one document.
    `page`: slowly, for those who watch the registry's page, and the fleet stays until it is told to stop."""

    prompts: Sequence[str] | None = None
    trace: Path | None = None
    requests: int = 20
    json: bool = False
    page: bool = False


@dataclass(slots=True)
class Show:
    """What an act is given: where to look, where to note, whom to ask."""

    screen: Screen
    toy: ToyConfig
    jobs: tuple[Prompt, ...]
    report: Report = field(default_factory=Report)
    act: int = 0
    members: Family | None = None
    visit: Visit | None = None

    async def look(self, what: str, stage: Stage | None = None, seconds: float = LOOK_S) -> None:
        """Where somebody watches the page, let them see it."""
        if self.visit is not None:
            await self.visit.look(what, stage, seconds)

    def check(self, name: str, ok: bool, measured: str, expected: str, evidence: Sequence[str] = ()) -> None:
        self.judge(Check(self.act, name, ok, measured, expected, tuple(evidence)))

    def judge(self, check: Check) -> None:
        """Keep and show a check; one that failed with the ends of the logs."""
        if not check.ok:
            check = check.with_evidence(self._logs())
        self.report.checks.append(check)
        self.screen.check(check)

    def figure(self, name: str, value: str) -> None:
        self.report.figures[name] = value

    def note(self, text: str) -> None:
        self.report.notes.append(text)
        self.screen.note(text)

    def _logs(self) -> list[str]:
        everyone = self.members.everyone if self.members else []
        return [f"{child.name}: {line}" for child in everyone for line in map(_plain, child.log_tail(6))]


async def run(options: DemoOptions) -> int:
    """Tell the whole story; returns the exit status, 1 if any check failed. `--json` writes one document to stdout."""
    toy = ToyConfig()
    jobs, note = _jobs(options, toy)
    show = Show(Screen(Console(quiet=options.json)), toy, jobs)
    if options.page:
        show.visit = Visit(show.screen, (texts.of_length(LONG_PROMPT, toy, "meanwhile"), texts.built_in(toy)[0]))
    await tell(show, note)
    if options.json:
        sys.stdout.write(json.dumps(show.report.document(), indent=2) + "\n")
    return show.report.exit_status


async def tell(show: Show, note: str) -> None:
    started = time.monotonic()
    show.screen.title(
        "pdctl demo: real processes, real HTTP, real Mooncake over TCP; a toy model whose answers are exact"
    )
    show.note(note)
    show.note("time-outs are short for the show: " + ", ".join(f"{k}={v}" for k, v in SETTINGS.items() if "_s" in k))
    # Three processes of one-thread arithmetic on few cores: more threads would only spin against each other.
    async with family({**config.environment(), "OPENBLAS_NUM_THREADS": "1"}) as members:
        show.members = members
        try:
            await _play(show, await open_stage(members, show.screen, show.toy))
        except PdctlError as error:
            show.check("the story goes on", False, str(error), "no act breaks off")
    show.report.seconds = time.monotonic() - started
    show.screen.finish(show.report)


def _jobs(options: DemoOptions, toy: ToyConfig) -> tuple[tuple[Prompt, ...], str]:
    if options.trace is not None:
        replay = texts.from_trace(options.trace, options.requests, toy)
        return replay.prompts, f"{len(replay.prompts)} requests of {options.trace.name}: {replay.note}"
    if options.prompts:
        given = tuple(texts.from_text(text, toy, name=f"prompt {n}") for n, text in enumerate(options.prompts, 1))
        return given, f"{len(given)} prompts from the command line"
    built_in = texts.built_in(toy)
    return built_in, f"{len(built_in)} built-in prompts; --prompt TEXT or --trace FILE for others"


async def _play(show: Show, stage: Stage) -> None:
    for number, act in enumerate(ACTS, 1):
        show.act = number
        show.screen.act(number, act.name, act.what)
        await act.play(show, stage)


# 1


async def registry_comes_late(show: Show, stage: Stage) -> None:
    """Both ranks are up and nobody listens at the registry's port yet."""
    for rank in (stage.prefill, stage.decode):
        await rank.event("ready")

    async def has_tried_twice() -> bool:
        return len(_attempts(stage.prefill)) >= 2 and time.monotonic() - stage.opened_at >= REGISTRY_IS_LATE_S

    await until(has_tried_twice, "a second attempt to register", deadline_s=10)
    tried, too_early = _attempts(stage.prefill), await stage.registered()
    causes = sorted({str(attempt.get("cause")) for attempt in tried})
    show.check(
        "prefill keeps trying, and is not ready, while nobody listens",
        not too_early,
        f"{len(tried)} attempts, each: {', '.join(causes)}",
        "at least 2 attempts, not registered",
    )
    await start_registry(stage)
    if show.visit is not None:
        show.visit.screen.note(f"the page: {stage.registry_url}/")
    took_s = await until(stage.registered, "prefill's registration", deadline_s=15)
    show.check(
        "it registers by itself when the registry is up",
        took_s <= REGISTERED_WITHIN_S,
        f"{took_s:.2f} s after the registry's first word",
        f"at most {REGISTERED_WITHIN_S:g} s",
    )
    topology = json.loads(await fetch(stage.registry_url + TOPOLOGY))
    page_size = topology.get("page_size")
    show.check(
        "a decode rank can learn the topology from it",
        page_size == show.toy.page_size,
        f"page_size {page_size}, {topology.get('kv_cache_dtype')}, {topology.get('attn_tp_size')} rank",
        f"page_size {show.toy.page_size}",
    )
    show.figure("registry up to prefill registered", f"{took_s:.2f} s, after {len(tried)} failed attempts")
    if show.visit is not None:
        await show.visit.open(stage)
    await show.look("two instances, prefill and decode, each with its seat held")


def _attempts(rank: Child) -> list[Event]:
    return [event for event in rank.log_events() if event.get("event") == "registration attempt failed"]


# 2


async def main_job(show: Show, stage: Stage) -> None:
    sent_before = metric(await stage.metrics("pdctl_room_sent"), "pdctl_room_sent_bytes_total")
    done = await stage.run_all(show.jobs)
    sent = metric(await stage.metrics("pdctl_room_sent"), "pdctl_room_sent_bytes_total") - sent_before
    for each in done[:3]:
        show.screen.note(f"{each.prompt.name}: {as_text(list(each.prompt.tokens))[-40:]!r} -> {as_text(each.tokens)!r}")
    _judge_tokens(show, "decode goes on from the transferred pages as if it had never left", done)
    n_same = sum(each.same_bytes for each in done)
    show.check("pages arrive byte for byte", n_same == len(done), f"{n_same} of {len(done)} requests", "all")
    moved = sum((each.moved(show.toy) for each in done), Moved())
    show.check(
        "prefill's metrics count the same bytes",
        sent == moved.nbytes + moved.aux_nbytes,
        f"{sent:.0f} bytes",
        f"{moved.nbytes + moved.aux_nbytes} bytes: pages and aux rows",
    )
    show.report.moved = moved
    _main_figures(show, done, moved)
    await _measure_bulk(show, stage)
    await show.look("bytes on the wire, rooms that come and go", stage)


async def _measure_bulk(show: Show, stage: Stage) -> None:
    """The same long prompt twice: the second time all pages but the last are there, and go in one piece."""
    prompt = texts.of_length(LONG_PROMPT, show.toy, "in one go")
    first, second = [(await stage.run_all([prompt]))[0] for _ in range(2)]
    _judge_tokens(show, "a prompt that is known already gives the same tokens without being computed", [first, second])
    moved = second.moved(show.toy)
    show.figure(
        "speed in one go",
        f"{moved.gigabytes_per_s:.2f} GB/s: {second.prefilled.get('shared_pages')} pages that were there already, "
        f"{moved.nbytes / 2**20:.1f} MiB in {moved.seconds * 1000:.1f} ms",
    )


def _main_figures(show: Show, done: list[Finished], moved: Moved) -> None:
    n_new = sum(len(each.tokens) for each in done)
    show.figure("requests", f"{moved.requests}: {moved.tokens} tokens in, {n_new} out, each equal to the run alone")
    show.figure("moved", f"{moved.nbytes / 2**20:.1f} MiB in {moved.pages} pages, {moved.blocks} blocks")
    show.figure(
        "speed by chunks", f"{moved.gigabytes_per_s:.2f} GB/s: {moved.seconds * 1000:.0f} ms in sends of 768 KiB"
    )
    shared = sum(int(each.prefilled.get("shared_pages", 0)) for each in done)
    if shared:
        show.figure("shared prefixes", f"{shared} of {moved.pages} pages were computed once and sent again")


# 3


async def decode_stops(show: Show, stage: Stage) -> None:
    before = await stage.metrics(*WATCHED)
    waiting = await _announce_ahead(show, stage)
    victim = stage.run(texts.of_length(LONG_PROMPT, show.toy, "stopped"))
    await stage.prefill.event("sent", room=victim.room)
    stage.decode.pause()
    stopped_at = time.monotonic()
    failed = await victim.prefill.within(60)
    took_s = time.monotonic() - stopped_at
    _judge_mid_stream(show, "the transfer under way fails with its cause", failed, took_s)
    blocked = metric(await stage.metrics(BLOCKED), BLOCKED)
    show.check("the session is blocked", blocked == 1, f"{BLOCKED} {blocked:g}", "1")
    show.figure("decode stopped to session blocked", f"{took_s:.2f} s (engine's stall limit here: 1 s a block)")

    refused = [await stage.ask_prefill(room, prompt).within(30) for room, prompt, _ in waiting]
    slowest_s = max(float(each.get("failed_after_s", 99)) for each in refused)
    show.check(
        "requests to it fail at once, with the cause",
        slowest_s < FAIL_FAST_S and all("is blocked" in each.get("reason", "") for each in refused),
        f"{len(refused)} requests, the slowest after {slowest_s * 1000:.1f} ms: {refused[0].get('reason')}",
        f"each under {FAIL_FAST_S * 1000:g} ms, naming the block",
        [str(each) for each in refused],
    )
    show.figure("a request to a blocked session fails in", f"{slowest_s * 1000:.1f} ms")
    await show.look("decode is blocked at prefill, the cause, the room that failed, then its lease", None, STOPPED_S)
    await _continue(show, stage, before)
    await show.look("it is healed: readmitted, it serves; the rooms that failed are told of for a minute", stage)
    await _judge_told(show, [(failed, victim.decode), *zip(refused, (q for _, _, q in waiting), strict=True)])
    done = await stage.run_all([texts.of_length(LONG_PROMPT, show.toy, "again"), texts.built_in(show.toy)[0]])
    _judge_tokens(show, "requests to it succeed again", done)
    await _judge_untouched(show, stage)


async def _continue(show: Show, stage: Stage, before: list[str]) -> None:
    """SIGCONT; the probe must find it well."""
    recoveries = metric(before, RECOVERIES)

    async def is_back() -> bool:
        return metric(await stage.metrics(RECOVERIES), RECOVERIES) > recoveries

    stage.decode.resume()
    took_s = await until(is_back, "the session's recovery", deadline_s=30)
    after = await stage.metrics(*WATCHED)
    show.check(
        "the probe brings it back when it goes on",
        took_s <= RECOVERED_WITHIN_S and metric(after, BLOCKED) == 0,
        f"{took_s:.2f} s after SIGCONT, {BLOCKED} {metric(after, BLOCKED):g}",
        f"at most {RECOVERED_WITHIN_S:g} s, then nothing is blocked",
    )
    show.figure("decode continued to session trusted", f"{took_s:.2f} s")
    show.report.metric_lines += _changes(before, after)


async def _announce_ahead(show: Show, stage: Stage) -> list[Waiting]:
    """Requests whose pages decode has named and prefill has not opened: what waits in a prefill's queue."""
    prompt = texts.of_length(LONG_PROMPT, show.toy, "waiting")
    waiting: list[Waiting] = []
    for _ in range(N_WAITING):
        room = stage.next_room()
        waiting.append((room, prompt, stage.ask_decode(room, prompt)))
        await stage.decode.event("waiting", room=room)
    return waiting


async def _judge_told(show: Show, pairs: Sequence[tuple[Event, Question]]) -> None:
    heard = [(str(failed.get("reason")), str((await asked.within(30)).get("error"))) for failed, asked in pairs]
    n_told = sum(reason in error for reason, error in heard)
    show.check(
        "decode hears the reason, not just that it failed",
        n_told == len(heard),
        f"{n_told} of {len(heard)} requests",
        "all",
        [f"prefill: {reason} / decode: {error}" for reason, error in heard if reason not in error],
    )


# 4


async def decode_is_replaced(show: Show, stage: Stage) -> None:
    before = await stage.metrics(*WATCHED)
    old, old_session = stage.decode, (await stage.decode.event("ready"))["session"]
    victim = stage.run(texts.of_length(LONG_PROMPT, show.toy, "killed"))
    await stage.prefill.event("sent", room=victim.room)
    killed_at = time.monotonic()
    await stage.family.end(old, Child.kill)
    stage.decode = await start_rank(stage.family, "decode 2", "decode", stage.port)
    failed = await victim.prefill.within(60)
    _judge_mid_stream(show, "the transfer under way fails with its cause", failed, time.monotonic() - killed_at)
    new_session = (await stage.decode.event("ready"))["session"]
    show.figure("decode killed to the next one ready", f"{time.monotonic() - killed_at:.2f} s: the start of a process")
    show.check(
        "the new rank is another session",
        new_session != old_session,
        f"{old_session} was killed, {new_session} took its place",
        "two sessions",
    )
    done = await stage.run_all([texts.of_length(LONG_PROMPT, show.toy, "after"), texts.built_in(show.toy)[1]])
    took_s = time.monotonic() - killed_at
    _judge_tokens(show, "requests succeed with the new one", done)
    await _judge_untouched(show, stage)
    after = await stage.metrics(*WATCHED)
    show.check(
        "nothing goes to the dead one any more",
        metric(after, BLOCKED) == 1,
        f"{BLOCKED} {metric(after, BLOCKED):g}",
        "1",
    )
    show.figure("decode killed to two requests answered by the next", f"{took_s:.2f} s")
    await show.look("a new life in decode's seat, and the link to the old one that stays blocked", stage)
    show.report.metric_lines += _changes(before, after)


# 5


async def all_stop(show: Show, stage: Stage) -> None:
    """Decode first, the registry last; each by itself, within its bound."""
    if show.visit is not None:
        await show.visit.stay(stage)
    cast = list(stage.family.children)
    ports = sorted({port for child in cast for port in child.listening_ports()})
    order = sorted(cast, key=lambda child: ("decode" not in child.name, child.name == "registry"))
    endings = [await stage.family.end(child) for child in order]
    clean = [ending for ending in endings if ending.status == 0 and not ending.forced]
    show.check(
        "each process ends by itself when told to",
        len(clean) == len(endings),
        ", ".join(map(_in_words, endings)),
        "all with status 0, none killed",
    )
    left = [child.name for child in stage.family.everyone if child.alive]
    show.check("no process is left", not left, ", ".join(left) or "none", "none")
    still_open = [port for port in ports if not is_closed(port)]
    show.check(
        "no port is left",
        bool(ports) and not still_open,
        f"{len(ports) - len(still_open)} of {len(ports)} closed",
        "all closed",
    )


def _in_words(ending: Ending) -> str:
    how = "was killed" if ending.forced else f"status {ending.status}"
    return f"{ending.name} {how} in {ending.took_s:.1f} s"


# What several acts judge


def _judge_tokens(show: Show, name: str, done: Sequence[Finished]) -> None:
    check = all_same_tokens(show.act, name, [(each.prompt.name, each.expected, each.tokens) for each in done])
    errors = [f"{each.prompt.name}: {each.error}" for each in done if each.error]
    show.judge(check.with_evidence(errors))


def _judge_mid_stream(show: Show, name: str, failed: Event, took_s: float) -> None:
    sent, reason = failed.get("sent_pages", 0), failed.get("reason")
    n_pages = show.toy.pages_for(LONG_PROMPT)
    show.check(
        name,
        bool(reason) and 0 < sent < n_pages,
        f"after {took_s:.2f} s and {sent} of {n_pages} pages: {reason}",
        "a reason, in the middle of the pages",
    )


async def _judge_untouched(show: Show, stage: Stage) -> None:
    told = await stage.decode.ask("untouched")
    show.check(
        "no byte lands in a page that no request was given",
        told["dirty"] == 0 and told["spare"] > 0,
        f"{told['spare']} spare pages, {told['dirty']} of them written",
        "some spare, none written",
    )


def _plain(line: str) -> str:
    """A log line as a person reads it: the event first, then its values, and of an exception its last line."""
    try:
        told = json.loads(line)
    except ValueError:
        return line[:_LONGEST_LINE]
    what, when = told.pop("event", ""), told.pop("timestamp", "")[11:23]
    values = " ".join(f"{key}={str(value).strip().rpartition(chr(10))[2]}" for key, value in told.items())
    return f"{when} {what} {values}"[:_LONGEST_LINE]


def _changes(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Metric lines that differ, as `series before -> after`."""
    old = dict(line.rsplit(" ", 1) for line in before)
    pairs = (line.rsplit(" ", 1) for line in after)
    return [
        f"{series} {old.get(series, '0.0')} -> {value}" for series, value in pairs if value != old.get(series, "0.0")
    ]


@dataclass(frozen=True, slots=True)
class Act:
    name: str
    what: str
    play: Callable[[Show, Stage], Awaitable[None]]


ACTS = (
    Act(
        "The registry comes late",
        "Prefill and decode start first; nobody listens at the registry's port for two seconds.",
        registry_comes_late,
    ),
    Act(
        "The main job",
        "Prompts are prefilled, their pages moved chunk by chunk, and decode goes on; a third process runs them alone.",
        main_job,
    ),
    Act(
        "The decode rank is stopped",
        "SIGSTOP in the middle of a transfer, with more requests waiting for it; then SIGCONT.",
        decode_stops,
    ),
    Act(
        "The decode rank is killed, another takes its place",
        "SIGKILL in the middle of a transfer; a new process starts at once.",
        decode_is_replaced,
    ),
    Act("Everything stops", "In order, each by itself, and nothing is left behind.", all_stop),
)
