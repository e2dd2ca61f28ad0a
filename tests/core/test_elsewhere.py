"""Copies of what ranks told other registries: bounded, the last word of each rank, gone with its life and its age."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.capacity import ReportLimits
from pdctl.core.elsewhere import Copied, Elsewhere
from pdctl.core.overview import Place
from pdctl.core.route import Seat


def place(tp: int = 0) -> Place:
    return "p", Seat(0, 0, tp, 0)


def said(at: float, body: bytes = b"{}", epoch: int = 1) -> Copied:
    return Copied(epoch, at, body)


def test_of_a_rank_that_two_were_told_the_last_word_counts_until_it_is_gone() -> None:
    book = Elsewhere()
    assert book.take("a", place(), said(1.0))
    assert book.take("b", place(), said(2.0))
    assert book.freshest(place()) == ("b", said(2.0))
    assert book.take("a", place(), said(3.0))
    assert book.freshest(place()) == ("a", said(3.0))
    book.drop("a", [place(), place(7)])
    assert book.freshest(place()) == ("b", said(2.0))
    book.drop("b", [place()])
    assert (book.freshest(place()), len(book), book.nbytes) == (None, 0, 0)


def test_a_life_that_is_over_takes_its_copies_along_and_no_later_one() -> None:
    book = Elsewhere()
    book.take("a", place(), said(1.0, epoch=1))
    book.take("b", place(), said(2.0, epoch=2))
    assert book.over(place(), 1)
    assert book.freshest(place()) == ("b", said(2.0, epoch=2))
    assert not book.over(place(), 1)
    assert not book.over(place(5), 1)


def test_what_nobody_says_again_is_known_no_more() -> None:
    book = Elsewhere()
    book.take("a", place(0), said(0.0))
    book.take("a", place(1), said(9.0))
    assert book.expire(15.0, 15.0) == [place(0)]
    assert list(book) == [place(1)]
    assert book.of("a") == {place(1)}


def test_it_holds_no_more_than_it_may() -> None:
    book = Elsewhere(ReportLimits(max_reports=2, max_nbytes=10))
    assert book.take("a", place(0), said(0.0, b"12345"))
    assert book.take("a", place(1), said(0.0, b"12345"))
    assert not book.take("a", place(0), said(1.0, b"123456")), "too many bytes"
    assert not book.take("a", place(2), said(1.0, b"")), "too many ranks"
    assert book.take("a", place(0), said(1.0, b"1234"))
    assert book.nbytes == 9


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(0, 5), st.booleans())))
def test_its_bytes_are_those_of_what_it_holds(steps: list[tuple[str, int, int, bool]]) -> None:
    book, held = Elsewhere(), dict[tuple[str, int], int]()
    for registry, tp, n, takes in steps:
        if takes:
            book.take(registry, place(tp), said(float(n), b"x" * n))
            held[registry, tp] = n
        else:
            book.drop(registry, [place(tp)])
            held.pop((registry, tp), None)
    assert book.nbytes == sum(held.values())
    assert {each[1].tp for each in book} == {tp for _, tp in held}
