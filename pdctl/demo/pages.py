"""
Which pages of one rank's pool are free, held, or kept for the next request that begins alike.

A whole page never changes once it is filled, so requests with the same beginning share it. No bytes here: page numbers
only. It never waits: what cannot be had now is an error.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from pdctl.errors import NotReady


class PageBook:
    """`n_pages` pages of `page_size` tokens. A page is held by as many as have taken or found it."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._free = list(range(n_pages))  # a heap: neighbours go out together, and travel as one block
        self._holders: dict[int, int] = {}
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # beginning -> page, the longest unused first
        self._beginning: dict[int, bytes] = {}

    @property
    def n_held(self) -> int:
        return len(self._holders)

    def take(self, n: int) -> list[int]:
        """`n` pages for one holder; raises NotReady and takes none when there are not so many."""
        idle = [page for page in self._kept.values() if page not in self._holders]
        if n > len(self._free) + len(idle):
            raise NotReady(f"{n} pages wanted, {len(self._free) + len(idle)} to be had: wait for a request to end")
        for page in idle[: max(0, n - len(self._free))]:
            del self._kept[self._beginning.pop(page)]
            heapq.heappush(self._free, page)
        pages = [heapq.heappop(self._free) for _ in range(n)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Hold the kept pages of the longest known beginning; never all of `tokens`: the last must be computed."""
        pages: list[int] = []
        for beginning in self._beginnings(tokens[: max(0, len(tokens) - 1)]):
            if beginning not in self._kept:
                break
            self._kept.move_to_end(beginning)
            pages.append(self._kept[beginning])
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
        return pages

    def keep(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """These pages hold `tokens`: the whole ones may be found from now on. The first of two equals is kept."""
        for beginning, page in zip(self._beginnings(tokens), pages, strict=False):
            if beginning not in self._kept and page not in self._beginning:
                self._kept[beginning], self._beginning[page] = page, beginning

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder has done with them; the last one frees those that are not kept."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if page not in self._beginning:
                    heapq.heappush(self._free, page)

    def _beginnings(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """A digest of everything up to the end of each whole page."""
        digest = hashlib.blake2b(digest_size=16)
        for end in range(self._page_size, len(tokens) + 1, self._page_size):
            digest.update(b"".join(token.to_bytes(4, "little") for token in tokens[end - self._page_size : end]))
            yield digest.digest()
