"""What every store promises, held against each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import numpy as np
import pytest

from pdctl.core.layout import Region
from pdctl.errors import BadField, StoreCause, StoreFailed
from tests.store.conftest import SEGMENT, Bench


async def cause_of(work: Awaitable[object]) -> StoreCause:
    with pytest.raises(StoreFailed) as caught:
        await work
    return caught.value.cause


async def test_what_was_put_comes_back(stand: Bench) -> None:
    await stand.store.put(stand.key("a"), b"\0some\xff" * 100)
    assert await stand.store.get(stand.key("a")) == b"\0some\xff" * 100


async def test_a_key_that_was_never_put_is_missing(stand: Bench) -> None:
    assert await cause_of(stand.store.get(stand.key("a"))) is StoreCause.MISSING
    assert await cause_of(stand.store.remove(stand.key("a"))) is StoreCause.MISSING


async def test_nothing_is_overwritten(stand: Bench) -> None:
    await stand.store.put(stand.key("a"), b"first")
    await stand.store.put(stand.key("a"), b"second")
    assert await stand.store.get(stand.key("a")) == b"first"


async def test_it_is_said_of_each_key_whether_it_is_there(stand: Bench) -> None:
    await stand.store.put(stand.key("b"), b"1")
    assert await stand.store.exists([stand.key("a"), stand.key("b")]) == [False, True]
    assert await stand.store.exists([]) == []


async def test_what_was_removed_is_gone(stand: Bench) -> None:
    await stand.store.put(stand.key("a"), b"1")
    await stand.store.remove(stand.key("a"))
    assert await stand.store.exists([stand.key("a")]) == [False]


async def test_what_was_read_a_moment_ago_is_removed_only_by_force(stand: Bench) -> None:
    await stand.store.put(stand.key("a"), b"1")
    await stand.store.get(stand.key("a"))
    assert await cause_of(stand.store.remove(stand.key("a"))) is StoreCause.LEASED
    await stand.store.remove(stand.key("a"), force=True)
    assert await cause_of(stand.store.get(stand.key("a"))) is StoreCause.MISSING


@pytest.mark.parametrize(
    ("key", "value"), [("", b"1"), ("a", b""), ("b", b"1" * (17 << 20))], ids=["no key", "no value", "over the buffer"]
)
async def test_what_can_never_be_kept_is_a_bad_argument(stand: Bench, key: str, value: bytes) -> None:
    assert await cause_of(stand.store.put(key, value)) is StoreCause.BAD_ARGUMENT


@pytest.mark.parametrize("pieces", [1, 3])
async def test_pages_come_back_byte_for_byte_whatever_their_pieces(stand: Bench, pieces: int) -> None:
    keys = [stand.key(f"p{n}") for n in range(8)]
    rows = np.arange(8 * pieces).reshape(8, pieces)
    there, sizes = stand.at(*map(tuple, rows))
    assert await stand.store.put_pages(keys, there, sizes) == (None,) * 8
    back, _ = stand.at(*map(tuple, rows + 100))
    assert await stand.store.get_pages(keys, back, sizes) == (None,) * 8
    used = 8 * pieces * 4096
    assert (stand.memory[100 * 4096 :][:used] == stand.memory[:used]).all()
    assert not (stand.memory[100 * 4096 + used :][:4096] == stand.memory[:4096]).all()


async def test_a_page_and_a_value_are_the_same_thing(stand: Bench) -> None:
    await stand.store.put_pages([stand.key("p")], *stand.at((0, 2)))
    assert await stand.store.get(stand.key("p")) == bytes(stand.memory[:4096]) + bytes(stand.memory[8192:12288])


async def test_of_a_batch_each_key_is_told_apart(stand: Bench) -> None:
    keys = [stand.key("a"), stand.key("nobody"), stand.key("b")]
    await stand.store.put_pages([keys[0], keys[2]], *stand.at((0,), (1,)))
    told = await stand.store.get_pages(keys, *stand.at((10,), (11,), (12,)))
    assert [None if one is None else one.cause for one in told] == [None, StoreCause.MISSING, None]
    assert (stand.memory[10 * 4096 : 11 * 4096] == stand.memory[:4096]).all()
    assert (stand.memory[12 * 4096 : 13 * 4096] == stand.memory[4096:8192]).all()


async def test_a_page_of_another_size_is_no_success(stand: Bench) -> None:
    await stand.store.put_pages([stand.key("p")], *stand.at((0,)))
    for nbytes in (100, 8192):
        (told,) = await stand.store.get_pages([stand.key("p")], *stand.at((10,), nbytes=nbytes))
        assert told is not None
        assert told.cause is StoreCause.BAD_ARGUMENT


async def test_no_page_is_nothing_to_do(stand: Bench) -> None:
    nothing = np.zeros((0, 1), np.int64)
    assert await stand.store.put_pages([], nothing, nothing) == ()
    assert await stand.store.get_pages([], nothing, nothing) == ()


@pytest.mark.parametrize("row", [(256,), (-1,), (0, 256)], ids=["behind", "before", "one piece of two"])
async def test_memory_that_was_not_registered_is_refused_before_a_byte_moves(
    stand: Bench, row: tuple[int, ...]
) -> None:
    for call in (stand.store.put_pages, stand.store.get_pages):
        with pytest.raises(BadField, match="no registered region"):
            await call([stand.key("p")], *stand.at(row))
    assert await stand.store.exists([stand.key("p")]) == [False]


async def test_arrays_that_do_not_fit_the_keys_are_refused(stand: Bench) -> None:
    with pytest.raises(BadField, match="shapes"):
        await stand.store.put_pages([stand.key("p")], *stand.at((0,), (1,)))


async def test_a_region_is_registered_once_and_given_back_once(stand: Bench) -> None:
    region = stand.arena.region
    with pytest.raises(BadField, match="overlaps"):
        await stand.store.register(Region(region.pointer + 4096, 4096))
    await stand.store.unregister(region)
    with pytest.raises(BadField, match="not registered"):
        await stand.store.unregister(region)
    await stand.store.register(region)
    with pytest.raises(BadField):
        await stand.store.register(Region(0, 4096))


async def test_it_is_healthy_and_has_a_name(stand: Bench) -> None:
    await stand.store.health()
    assert stand.store.name.startswith("127.0.0.1:")


async def test_after_the_end_every_call_says_so_and_closing_again_does_nothing(own_stand: Bench) -> None:
    store, pages = own_stand.store, own_stand.at((0,))
    await store.close()
    await store.close()
    calls: list[Awaitable[object]] = [
        store.put("a", b"1"),
        store.get("a"),
        store.exists(["a"]),
        store.remove("a"),
        store.health(),
    ]
    calls += [store.health(), store.put_pages(["a"], *pages), store.get_pages(["a"], *pages)]
    for call in calls:
        assert await cause_of(call) is StoreCause.CLOSED


async def test_many_at_once_do_not_mix(stand: Bench) -> None:
    values = {stand.key(f"v{n}"): bytes([n]) * 5000 for n in range(64)}
    await asyncio.gather(*(stand.store.put(key, value) for key, value in values.items()))
    assert await asyncio.gather(*map(stand.store.get, values)) == list(values.values())


async def test_a_full_store_says_so_and_keeps_what_it_has(stand: Bench) -> None:
    """The last: a master that was full evicts for a while what nobody reads."""
    big = b"x" * (13 << 20)
    keys = [stand.key(f"big{n}") for n in range(SEGMENT // len(big) + 1)]
    with pytest.raises(StoreFailed) as caught:  # noqa: PT012  one of them is too many
        for key in keys:
            await stand.store.put(key, big)
            await stand.store.get(key)  # so that none can be evicted
    assert caught.value.cause is StoreCause.NO_SPACE
    assert await stand.store.get(keys[0]) == big
    for key in keys[:-1]:
        await stand.store.remove(key, force=True)
