"""A calendar says what a plain dict would, forgets what was struck out, and does not grow by what moves."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.calendar import Calendar

NAMES = st.sampled_from("abcd")
MOMENTS = st.integers(0, 9).map(float) | st.just(math.inf)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["put", "put_sooner"]), NAMES, MOMENTS),
    st.tuples(st.just("strike"), NAMES, st.just(0.0)),
    st.tuples(st.just("due"), st.just(""), st.integers(0, 9).map(float)),
)


@given(st.lists(STEPS, max_size=300))
def test_moments_are_what_a_plain_dict_would_say_and_void_ones_do_not_pile_up(
    steps: list[tuple[str, str, float]],
) -> None:
    calendar, plain = Calendar[str](), dict[str, float]()
    for what, name, at in steps:
        if what == "put":
            calendar.put(name, at)
            plain[name] = at
        elif what == "put_sooner":
            calendar.put_sooner(name, at)
            plain[name] = min(at, plain.get(name, math.inf))
        elif what == "strike":
            calendar.strike(name)
            plain.pop(name, None)
        else:
            came = list(calendar.due(at))
            assert [plain[name] for name in came] == sorted(moment for moment in plain.values() if moment <= at)
            assert len(set(came)) == len(came)
            plain = {name: moment for name, moment in plain.items() if moment > at}
        plain = {name: moment for name, moment in plain.items() if moment < math.inf}
        assert {name: calendar.at(name) for name in "abcd"} == {name: plain.get(name) for name in "abcd"}
        assert calendar.next_at == min(plain.values(), default=math.inf)
        assert len(calendar) == len(plain)
        assert calendar.n_held <= 2 * len(plain) + 65


def test_of_equal_moments_the_first_that_was_put_comes_first_whatever_it_is() -> None:
    calendar = Calendar[object]()
    whos = [object(), "b", 3, object(), "a"]
    for who in whos:
        calendar.put(who, 1.0)
    assert list(calendar.due(1.0, 2)) == whos[:2]
    assert list(calendar.due(1.0)) == whos[2:]


def test_who_is_put_while_the_due_are_given_counts_too() -> None:
    calendar, came = Calendar[str](), list[str]()
    calendar.put("a", 1.0)
    for who in calendar.due(2.0, 3):
        came.append(who)
        calendar.put("a", 2.0)
    assert came == ["a"] * 3


def test_what_another_has_is_taken_where_it_is_sooner() -> None:
    ours, draft = Calendar[str](), Calendar[str]()
    for calendar, moments in ((ours, {"a": 1.0, "b": 5.0}), (draft, {"a": 2.0, "b": 4.0, "c": 3.0})):
        for who, at in moments.items():
            calendar.put(who, at)
    ours.take(draft)
    assert {who: ours.at(who) for who in "abc"} == {"a": 1.0, "b": 4.0, "c": 3.0}
