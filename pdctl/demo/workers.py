"""
What an inference engine would do in each role, in small: compute, hold pages, hand them to pdctl.

One worker lives in one process and computes one thing at a time, as a device would. Between any two steps it lets the
event loop run, so that control messages and probes are not held up by arithmetic.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdctl.core.pairing import Paired
from pdctl.core.transfer import Phase
from pdctl.demo.aux_rows import AuxRow, AuxRows
from pdctl.demo.pages import PageBook
from pdctl.demo.talk import Answer, Request, tell
from pdctl.demo.toy import PagedKV, Toy, ToyConfig
from pdctl.errors import RoomFailed
from pdctl.receiver import Receiver
from pdctl.sender import Sender
from pdctl.sending import SendingRoom

CHUNK_PAGES = 4  # computed, then sent, before the next: about 20 ms of arithmetic


@dataclass(frozen=True, slots=True)
class Device:
    """One rank's model and memory: `n_pages` pages and `n_rows` aux rows in one arena."""

    toy: Toy
    kv: PagedKV
    aux: AuxRows
    book: PageBook

    @classmethod
    def of(cls, config: ToyConfig, n_pages: int, n_rows: int, arena: npt.NDArray[np.uint8]) -> Device:
        aux = AuxRows(n_rows, arena[n_pages * config.page_nbytes :])
        return cls(Toy(config), PagedKV(config, n_pages, arena), aux, PageBook(n_pages, config.page_size))

    @staticmethod
    def nbytes_for(config: ToyConfig, n_pages: int, n_rows: int) -> int:
        return n_pages * config.page_nbytes + AuxRows.nbytes_for(n_rows)

    @property
    def config(self) -> ToyConfig:
        return self.toy.config

    def digest(self, pages: list[int]) -> str:
        """What the pages hold, in short: equal at both ends means every byte arrived in its place."""
        return hashlib.blake2b(self.kv.page_bytes(pages), digest_size=16).hexdigest()

    async def decode(self, first: int, position: int, n_new: int, pages: list[int]) -> list[int]:
        """`n_new` tokens, the first of them known, the others from the pages."""
        tokens = [first]
        while len(tokens) < n_new:
            tokens.append(self.toy.decode(self.kv, tokens[-1], position + len(tokens) - 1, pages))
            await asyncio.sleep(0)
        return tokens


class Alone:
    """The run in one process that the others are held against: no network, no chunks, its own pages in order."""

    def __init__(self, device: Device) -> None:
        self._device = device

    async def generate(self, request: Request) -> Answer:
        device, tokens = self._device, request["tokens"]
        pages = device.book.take(device.config.pages_for(len(tokens) + request["n_new"]))
        try:
            first = device.toy.prefill(device.kv, tokens, pages)
            return {"tokens": await device.decode(first, len(tokens), request["n_new"], pages)}
        finally:
            device.book.give_back(pages)


class Prefill:
    """Computes prompts, one at a time, and sends each chunk as soon as it is filled."""

    def __init__(self, device: Device, sender: Sender) -> None:
        self._device, self._sender = device, sender
        self._turn = asyncio.Lock()

    async def generate(self, request: Request) -> Answer:
        """`failed_after_s` counts from the moment that this rank opened the room."""
        room, job, opened_at = int(request["room"]), _Job(list(request["tokens"])), time.monotonic()
        try:
            async with self._sender.open(room, release=self._give_back) as link:
                await link.peers_ready()
                async with self._turn:
                    return await self._run(room, job, link)
        except RoomFailed as error:
            failed_after_s = time.monotonic() - opened_at
            return {
                "error": str(error),
                "reason": error.reason,
                "sent_pages": job.n_sent,
                "failed_after_s": failed_after_s,
            }

    def _give_back(self, pages: npt.NDArray[np.int64]) -> None:
        """What was given to the link is ours again, when the link says so."""
        self._device.book.give_back(pages.tolist())

    async def _run(self, room: int, job: _Job, link: SendingRoom) -> Answer:
        device = self._device
        with self._memory(job) as (pages, n_shared, row):
            first = await self._chunks(room, job, pages, n_shared, link)
            device.aux.write(row, AuxRow(first, n_shared * device.config.page_size, room))
            job.moving_s += await _timed(link.finish(row))
            return {
                "pages": pages,
                "shared_pages": n_shared,
                "digest": device.digest(pages),
                "moving_s": job.moving_s,
            }

    @contextmanager
    def _memory(self, job: _Job) -> Iterator[tuple[list[int], int, int]]:
        """All pages of a prompt, how many of them are known already, and an aux row."""
        book, held = self._device.book, list[int]()
        row = self._device.aux.take()
        try:
            held += book.find(job.tokens)
            n_shared = len(held)
            held += book.take(self._device.config.pages_for(len(job.tokens)) - n_shared)
            yield held, n_shared, row
        finally:
            book.give_back(held[job.n_given :])
            self._device.aux.give_back(row)

    async def _chunks(self, room: int, job: _Job, pages: list[int], n_shared: int, link: SendingRoom) -> int:
        """Send the shared pages in one go, then compute and send the others; returns the first new token."""
        device, size = self._device, self._device.config.page_size
        if n_shared:
            await self._send(room, job, pages, n_shared, link)
        token = 0
        for start in range(n_shared, len(pages), CHUNK_PAGES):
            end = min(start + CHUNK_PAGES, len(pages))
            token = device.toy.prefill(device.kv, job.tokens[: end * size], pages, start * size)
            device.book.keep(job.tokens[: end * size], pages)
            await self._send(room, job, pages, end, link)
        return token

    async def _send(self, room: int, job: _Job, pages: list[int], end: int, link: SendingRoom) -> None:
        """Everything up to `end` that has not been sent."""
        chunk = pages[job.n_sent : end]
        if link.phase is not Phase.FAILED:  # else `send` refuses these pages, and they stay ours
            job.n_given = end
        job.moving_s += await _timed(link.send(chunk))
        job.n_sent = end
        tell("sent", room=room, pages=end, of=len(pages))


class Decode:
    """Takes pages and a first token from a prefill rank and goes on from there."""

    def __init__(self, device: Device, receiver: Receiver, pair: Callable[[int], Awaitable[Paired]]) -> None:
        """`pair` asks the registry which prefill ranks send a room."""
        self._device, self._receiver, self._pair = device, receiver, pair
        self._used: set[int] = set()

    async def generate(self, request: Request) -> Answer:
        device, room, n_prompt = self._device, int(request["room"]), int(request["n_prompt"])
        prefill = await self._pair(room)
        pages = device.book.take(device.config.pages_for(n_prompt + request["n_new"]))
        n_arriving = device.config.pages_for(n_prompt)
        arriving, more = pages[:n_arriving], pages[n_arriving:]
        row = device.aux.take()
        self._used.update(pages)

        def release(arrived: npt.NDArray[np.int64]) -> None:
            """Nothing can write these pages and this row any more."""
            device.book.give_back(arrived.tolist())
            device.aux.give_back(row)

        try:
            async with self._receiver.open(room, prefill, arriving, row, release=release) as link:
                tell("waiting", room=room)
                await link.arrived()
                return await self._go_on(room, device.aux.read(row), n_prompt, request["n_new"], pages)
        finally:
            device.book.give_back(more)

    async def _go_on(self, room: int, aux: AuxRow, n_prompt: int, n_new: int, pages: list[int]) -> Answer:
        if aux.room != room:
            raise RoomFailed(room, f"the aux row that arrived belongs to room {aux.room}: the rows were mixed up")
        arrived = pages[: self._device.config.pages_for(n_prompt)]
        digest = self._device.digest(arrived)
        tokens = await self._device.decode(aux.first_token, n_prompt, n_new, pages)
        return {"tokens": tokens, "pages": arrived, "digest": digest, "cached_tokens": aux.cached_tokens}

    async def untouched(self, request: Request) -> Answer:  # noqa: ARG002
        """Pages that no request was ever given, and how many of them hold something all the same."""
        spare = sorted(set(range(self._device.kv.n_pages)) - self._used)
        n_dirty = sum(1 for page in spare if any(self._device.kv.page_bytes([page])))
        return {"spare": len(spare), "dirty": n_dirty}


@dataclass(slots=True)
class _Job:
    """`n_given` pages were handed to the link, `n_sent` of them have landed."""

    tokens: list[int]
    moving_s: float = 0.0
    n_given: int = 0
    n_sent: int = 0


async def _timed(work: Awaitable[None]) -> float:
    started = time.monotonic()
    await work
    return time.monotonic() - started
