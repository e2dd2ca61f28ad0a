"""Pages are held by whoever needs them, shared by those who begin alike, and never given to two who differ."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdctl.demo.pages import PageBook
from pdctl.errors import NotReady

ABC, ABD = [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 9, 9, 9]


def filled(book: PageBook, tokens: list[int]) -> list[int]:
    pages = book.take(-(-len(tokens) // 2))
    book.keep(tokens, pages)
    return pages


def test_requests_that_begin_alike_share_the_whole_pages_of_their_beginning() -> None:
    book = PageBook(8, page_size=2)
    pages = filled(book, ABC)
    assert book.find(ABD) == pages[:2]


def test_a_page_in_another_past_is_another_page() -> None:
    book = PageBook(8, page_size=2)
    filled(book, [1, 2, 3, 4])
    assert book.find([9, 9, 3, 4, 5]) == []


def test_the_last_token_is_always_left_to_compute() -> None:
    book = PageBook(8, page_size=2)
    pages = filled(book, [1, 2, 3, 4])
    assert book.find([1, 2, 3, 4]) == pages[:1]
    assert book.find([1]) == []


def test_a_partial_page_is_never_kept() -> None:
    book = PageBook(8, page_size=2)
    pages = filled(book, [1, 2, 3])
    assert book.find([1, 2, 3, 4]) == pages[:1]


def test_kept_pages_survive_their_request_and_go_when_room_is_needed_the_longest_unused_first() -> None:
    book = PageBook(4, page_size=2)
    old = filled(book, [1, 2])
    new = filled(book, [3, 4])
    book.give_back(old + new)
    assert book.find([1, 2, 0]) == old
    book.give_back(old)
    book.take(3)
    assert book.find([3, 4, 0]) == []
    assert book.find([1, 2, 0]) == old


def test_a_page_that_someone_holds_is_not_taken_away() -> None:
    book = PageBook(2, page_size=2)
    filled(book, [1, 2])
    with pytest.raises(NotReady, match="2 pages wanted, 1 to be had"):
        book.take(2)
    assert book.n_held == 1


def test_neighbours_are_given_out_together_whatever_came_back_in_which_order() -> None:
    book = PageBook(8, page_size=2)
    pages = book.take(8)
    book.give_back([pages[n] for n in (5, 2, 7, 3, 4, 6)])
    assert book.take(4) == [2, 3, 4, 5]


class Life(RuleBasedStateMachine):
    """Whatever is taken, kept, found and given back, nobody's page is handed to someone with other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.book = PageBook(6, page_size=1)
        self.held: list[tuple[list[int], list[int]]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def request(self, tokens: list[int]) -> None:
        shared = self.book.find(tokens)
        for n, page in enumerate(shared, 1):
            assert self.content[page] == tuple(tokens[:n])
        try:
            fresh = self.book.take(len(tokens) - len(shared))
        except NotReady:
            self.book.give_back(shared)
            return
        assert not {page for _, pages in self.held for page in pages} & set(fresh)
        pages = shared + fresh
        self.content.update({page: tuple(tokens[: n + 1]) for n, page in enumerate(pages)})
        self.book.keep(tokens, pages)
        self.held.append((tokens, pages))

    @rule(which=st.integers(0, 9))
    def end(self, which: int) -> None:
        if self.held:
            self.book.give_back(self.held.pop(which % len(self.held))[1])

    @invariant()
    def what_is_held_is_what_requests_hold(self) -> None:
        assert self.book.n_held == len({page for _, pages in self.held for page in pages})
        assert all(self.content[page] == tuple(t[: n + 1]) for t, pages in self.held for n, page in enumerate(pages))


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
