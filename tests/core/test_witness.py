"""The witness: failures in a row are a death, answers bring back, and it doubts itself before it ejects the world."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdctl.core.address import Endpoint
from pdctl.core.lives import Claim, Life, Owner
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.core.witness import Means, Question, Sign, Target, Verdict, WitnessPolicy, WitnessTable
from pdctl.errors import ConfigError

TCP = WitnessPolicy(tcp=True)
HTTP = WitnessPolicy(http_url="http://{host}:{http_port}/health")
BOTH = WitnessPolicy(tcp=True, http_url="http://{host}:{http_port}/health")
SHAPE = Shape(attn_tp_size=64, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="auto")


def life(
    n: int = 0, *, epoch: int = 1, host: str | None = None, port: int = 40000, http_port: int | None = 30000
) -> Life:
    host = host or f"10.0.0.{n}"
    announcement = Announcement(Seat(0, 0, n, 0), SHAPE, Endpoint(host, port), http_port)
    return Life.begin(Claim("default", announcement, Owner(host)), epoch, 1, 0.0)


class Watch:
    """A table whose questions are answered by `say`, at the moment they are due or `late_s` after their asking."""

    def __init__(self, policy: WitnessPolicy, lives: Iterable[Life]) -> None:
        self.now = 0.0
        self.table = WitnessTable(policy, Random(7).random)
        self.table.follow(lives, 0.0)
        self.verdicts: list[Verdict] = []
        self.asked: list[Question] = []
        self.pending: list[tuple[float, Question, Sign]] = []

    def run(
        self, until: float, say: Callable[[Target], Sign], takes_s: Callable[[Sign], float] = lambda sign: 0
    ) -> None:
        pending = self.pending
        while True:
            due = self.table.next_due
            next_at = min([at for at, *_ in pending] + ([] if due is None else [due]), default=until)
            self.now = max(self.now, next_at)
            if self.now >= until:
                break
            for question in self.table.ask_due(self.now, 100):
                self.asked.append(question)
                sign = say(question.target)
                pending.append((self.now + takes_s(sign), question, sign))
            for answer in [one for one in pending if one[0] <= self.now]:
                pending.remove(answer)
                self.verdicts += self.table.answered(answer[1], answer[2], answer[2].value, self.now)
        self.now = until

    @property
    def dead(self) -> set[int]:
        last = {verdict.seat.tp: verdict.alive for verdict in self.verdicts}
        return {tp for tp, alive in last.items() if not alive}


def always(sign: Sign) -> Callable[[Target], Sign]:
    return lambda target: sign


def two_seconds_of_silence(sign: Sign) -> float:
    return 2.0 if sign is Sign.SILENT else 0.001


def test_one_sign_of_life_is_told_once() -> None:
    watch = Watch(TCP, [life()])
    watch.run(60, always(Sign.WELL))
    assert [(verdict.alive, verdict.epoch) for verdict in watch.verdicts] == [(True, 1)]
    assert 11 <= len(watch.asked) <= 14


def test_a_refusing_rank_is_dead_after_three_questions_and_within_the_interval_and_two_retries() -> None:
    watch = Watch(TCP, [life()])
    watch.run(20, always(Sign.WELL))
    watch.run(28, always(Sign.REFUSED))
    assert [verdict.alive for verdict in watch.verdicts] == [True, False]
    assert watch.verdicts[1].why == ("shows no sign of life (connecting to 10.0.0.0:40000: refused, 3 times in a row)")


def test_two_failures_are_no_death() -> None:
    watch = Watch(TCP, [life()])
    failures = iter([Sign.WELL, Sign.REFUSED, Sign.REFUSED] * 50)
    watch.run(100, lambda target: next(failures))
    assert watch.dead == set()


def test_a_dead_rank_is_alive_again_after_two_signs_and_not_after_one() -> None:
    watch = Watch(TCP, [life()])
    watch.run(20, always(Sign.REFUSED))
    flapping = iter([Sign.WELL, Sign.REFUSED] * 50)
    watch.run(200, lambda target: next(flapping))
    assert [verdict.alive for verdict in watch.verdicts] == [False]
    watch.run(220, always(Sign.WELL))
    assert [verdict.alive for verdict in watch.verdicts] == [False, True]


def test_a_single_silent_rank_among_many_is_dead() -> None:
    watch = Watch(TCP, [life(n) for n in range(10)])
    watch.run(20, always(Sign.WELL), two_seconds_of_silence)
    watch.run(40, lambda target: Sign.SILENT if target.host == "10.0.0.3" else Sign.WELL, two_seconds_of_silence)
    assert watch.dead == {3}


@pytest.mark.parametrize("takes_s", [0.0, 2.0], ids=["unreachable at once", "timed out"])
def test_nobody_is_dead_when_most_hosts_fall_silent_together(takes_s: float) -> None:
    watch = Watch(TCP, [life(n) for n in range(40)])
    watch.run(20, always(Sign.WELL))
    watch.run(300, always(Sign.SILENT), lambda sign: takes_s)
    assert watch.dead == set()
    doubted = watch.table.doubts
    watch.run(320, always(Sign.WELL))
    assert (doubted, watch.table.doubts) == (True, False)
    watch.run(340, lambda target: Sign.SILENT if target.host == "10.0.0.3" else Sign.WELL, two_seconds_of_silence)
    assert watch.dead == {3}


def test_a_refusal_is_believed_even_while_the_rest_is_silent() -> None:
    watch = Watch(TCP, [life(n) for n in range(10)])
    watch.run(20, always(Sign.WELL))
    watch.run(60, lambda target: Sign.REFUSED if target.host == "10.0.0.3" else Sign.SILENT)
    assert watch.dead == {3}


def test_hosts_that_died_one_by_one_are_not_held_against_the_living() -> None:
    watch = Watch(TCP, [life(n) for n in range(10)])
    gone: set[str] = set()
    for n in range(10):
        gone.add(f"10.0.0.{n}")
        watch.run(n * 60 + 60, lambda target: Sign.SILENT if target.host in gone else Sign.WELL, two_seconds_of_silence)
        assert watch.dead == set(range(n + 1))


def test_with_nobody_to_compare_with_the_threshold_decides() -> None:
    watch = Watch(TCP, [life(0), life(1)])
    watch.run(20, always(Sign.WELL))
    watch.run(60, always(Sign.SILENT), two_seconds_of_silence)
    assert watch.dead == {0, 1}


def test_what_came_while_our_own_loop_was_late_is_no_news() -> None:
    watch = Watch(TCP, [life(0)])
    watch.run(20, always(Sign.WELL))
    watch.run(200, always(Sign.SILENT), lambda sign: 2.6)
    assert watch.dead == set()


def test_our_own_failure_to_ask_is_no_news() -> None:
    watch = Watch(TCP, [life(0)])
    watch.run(200, always(Sign.VOID))
    assert watch.verdicts == []


def test_an_engine_whose_http_has_never_answered_is_starting_and_not_dead() -> None:
    watch = Watch(HTTP, [life()])
    watch.run(300, always(Sign.REFUSED))
    assert watch.verdicts == []
    watch.run(320, always(Sign.WELL))
    watch.run(340, always(Sign.UNWELL))
    assert [verdict.alive for verdict in watch.verdicts] == [True, False]


def test_ranks_that_share_a_url_are_asked_once_and_judged_all() -> None:
    watch = Watch(HTTP, [life(n, host="10.0.0.1", port=40000 + n) for n in range(8)])
    watch.run(20, always(Sign.WELL))
    assert len(watch.asked) <= 5
    watch.run(40, always(Sign.UNWELL))
    assert watch.dead == set(range(8))


def test_a_rank_is_dead_when_either_sign_is_missing() -> None:
    watch = Watch(BOTH, [life()])
    watch.run(20, always(Sign.WELL))
    watch.run(40, lambda target: Sign.WELL if target.means is Means.TCP else Sign.SILENT)
    assert watch.dead == {0}


def test_a_rank_that_announces_no_port_is_not_asked_by_a_url_that_wants_one() -> None:
    watch = Watch(HTTP, [life(http_port=None)])
    assert watch.table.next_due is None
    fixed = replace(HTTP, http_url="http://{host}:9000/health")
    assert [target.where for target in fixed.targets(life(http_port=None))] == ["http://10.0.0.0:9000/health"]


def test_an_ipv6_host_is_put_into_brackets() -> None:
    assert [t.where for t in BOTH.targets(life(host="fd00::7"))] == ["[fd00::7]:40000", "http://[fd00::7]:30000/health"]


def test_a_life_that_is_followed_no_more_is_asked_no_more_and_its_answer_is_void() -> None:
    watch = Watch(TCP, [life()])
    (question,) = watch.table.ask_due(10.0, 10)
    watch.table.follow([], 10.0)
    assert watch.table.answered(question, Sign.REFUSED, "", 10.0) == []
    assert watch.table.next_due is None
    assert len(watch.table) == 0


def test_a_new_life_at_the_same_url_is_not_judged_by_the_answers_to_the_old_one() -> None:
    watch = Watch(HTTP, [life()])
    watch.run(20, always(Sign.WELL))
    watch.run(22, always(Sign.UNWELL))
    watch.table.follow([life(epoch=2, port=40001)], watch.now)
    watch.run(60, always(Sign.UNWELL))
    assert watch.dead == set()  # it has never answered: it is starting


def test_a_new_life_at_the_same_url_does_not_bring_back_the_dead() -> None:
    old, new = life(0), life(1, host="10.0.0.0", epoch=2, port=40001)
    watch = Watch(HTTP, [old])
    watch.run(20, always(Sign.WELL))
    watch.run(40, always(Sign.UNWELL))
    watch.table.follow([old, new], watch.now)
    watch.run(80, always(Sign.WELL))
    assert [(verdict.epoch, verdict.alive) for verdict in watch.verdicts] == [(1, True), (1, False), (2, True)]


def test_a_port_that_is_said_later_is_asked_too() -> None:
    before = life(http_port=None)
    watch = Watch(BOTH, [before])
    watch.run(20, always(Sign.WELL))
    watch.table.follow([replace(before, claim=life().claim)], watch.now)
    watch.run(40, always(Sign.WELL))
    assert {question.target.means for question in watch.asked} == {Means.TCP, Means.HTTP}
    assert [verdict.alive for verdict in watch.verdicts] == [True]


def test_questions_are_spread_over_the_interval_from_the_first_on() -> None:
    watch = Watch(TCP, [life(n) for n in range(64)])
    watch.run(5, always(Sign.WELL))
    firsts = [question.asked_at for question in watch.asked]
    assert max(sum(begin <= at < begin + 0.5 for at in firsts) for begin in firsts) < 64 / 10 * 3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"interval_s": 0}, "interval_s is 0"),
        ({"dead_after": 1}, "dead_after is 1"),
        ({"alive_after": 0}, "alive_after"),
        ({"jitter": 1}, "jitter is 1"),
        ({"http_url": "{host}/health"}, "http_url is"),
        ({"http_url": "http://{node}/health"}, "http_url is"),
        ({"http_url": "http://{host}:{http_port/health"}, "http_url is"),
        ({"http_url": "ftp://{host}/"}, "http_url is"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(wrong: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        WitnessPolicy(**wrong)


class AnyOrder(RuleBasedStateMachine):
    """Lives come, go and answer in any order: what is due is asked, and every count stays true."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.table = WitnessTable(BOTH, Random(7).random)
        self.lives: dict[int, Life] = {}
        self.open: list[Question] = []
        self.told: dict[tuple[int, int], bool] = {}

    @rule(n=st.integers(0, 5), epoch=st.integers(1, 3), port=st.sampled_from([None, 30000]))
    def come(self, n: int, epoch: int, port: int | None) -> None:
        self.lives[n] = life(n, epoch=epoch, host=f"10.0.0.{n % 4}", port=40000 + n, http_port=port)
        self.table.follow(self.lives.values(), self.now)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        self.lives.pop(data.draw(st.sampled_from(sorted(self.lives))))
        self.table.follow(self.lives.values(), self.now)

    @rule(seconds=st.floats(0.1, 6))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.open += self.table.ask_due(self.now, 100)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), sign=st.sampled_from(Sign))
    def answer(self, data: st.DataObject, sign: Sign) -> None:
        question = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        for verdict in self.table.answered(question, sign, "", self.now):
            key = verdict.seat.tp, verdict.epoch
            assert self.lives[verdict.seat.tp].epoch == verdict.epoch
            assert verdict.alive == (sign is Sign.WELL)
            self.told[key] = verdict.alive

    @invariant()
    def everybody_is_due_or_being_asked(self) -> None:
        watched = self.table._targets
        asking = {question.target for question in self.open if watched.get(question.target)}
        scheduled = {target for target in watched if self.table._agenda.at(target) is not None}
        assert set(watched) == asking | scheduled
        assert len(self.table._agenda) == len(scheduled)

    @invariant()
    def the_hosts_are_those_of_the_targets(self) -> None:
        table = self.table
        assert set(table._hosts) == {target.host for target in table._targets}
        for name, host in table._hosts.items():
            here = [one for one in table._targets.values() if one.target.host == name]
            assert (host.n_targets, host.n_living) == (len(here), sum(not one.is_dead for one in here))
        assert table._silent <= set(table._heard_at) <= {name for name, host in table._hosts.items() if host.n_living}


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
