"""The toy's answers are exact: pages, chunks and processes cannot change a bit; a foreign page does."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from pdctl.demo.toy import PRINTABLE, PagedKV, Toy, ToyConfig, encode, generate

SMALL = ToyConfig(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, page_size=4, context=128)
SMALL_MLA = ToyConfig(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, latent=24, page_size=4, context=128)
PROMPT = encode("Pages move, tokens do not.")
N_NEW = 24

both = pytest.mark.parametrize("config", [SMALL, SMALL_MLA], ids=["grouped-query", "latent"])


def empty(config: ToyConfig, n_pages: int = 32) -> PagedKV:
    return PagedKV(config, n_pages, np.zeros(n_pages * config.page_nbytes, np.uint8))


def dense_run(toy: Toy, prompt: list[int], n_new: int) -> list[int]:
    """The obvious transformer: no pages, no cache, everything again for every token, one head at a time."""
    tokens = list(prompt)
    for _ in range(n_new):
        tokens.append(_dense_next(toy, tokens))
    return tokens[len(prompt) :]


def _dense_next(toy: Toy, tokens: list[int]) -> int:
    x = toy._embedding[tokens] + toy._positions[: len(tokens)]
    for layer in toy._layers:
        normal = _norm(x)
        kept = [_grid(normal @ matrix) for matrix in layer.cached]
        keys, values = [_grid(kept[0] @ matrix) for matrix in layer.unpack] or kept
        x = x + _grid(_dense_attention(toy.config, _grid(normal @ layer.query), keys, values) @ layer.output)
        x = x + _grid(np.minimum(np.maximum(_grid(_norm(x) @ layer.up), -1), 1) @ layer.down)
    return PRINTABLE[int((_norm(x)[-1] @ toy._unembedding).argmax())]


def _dense_attention(config: ToyConfig, q: npt.NDArray, k: npt.NDArray, v: npt.NDArray) -> npt.NDArray:
    out, d = np.zeros_like(q), config.head_dim
    for head in range(config.heads):
        mine = slice(head * d, (head + 1) * d)
        shared = head // (config.heads // config.kv_heads)
        theirs = slice(shared * d, (shared + 1) * d)
        for i in range(len(q)):
            scores = (k[: i + 1, theirs] @ q[i, mine]) / math.sqrt(d)
            weights = _grid(np.exp(scores - scores.max()), 2**20)
            out[i, mine] = _grid(_grid(weights / weights.sum(), 2**20) @ v[: i + 1, theirs])
    return out


def _norm(x: npt.NDArray) -> npt.NDArray:
    return _grid(x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 2.0**-20))


def _grid(x: npt.NDArray, steps: int = 2**10) -> npt.NDArray:
    return np.round(x * steps) / steps


@both
def test_a_paged_run_equals_the_obvious_dense_one_bit_for_bit(config: ToyConfig) -> None:
    toy = Toy(config)
    assert generate(toy, empty(config), PROMPT, list(range(16)), N_NEW) == dense_run(toy, PROMPT, N_NEW)


@both
def test_the_order_of_the_pages_does_not_matter(config: ToyConfig) -> None:
    toy = Toy(config)
    in_order = generate(toy, empty(config), PROMPT, list(range(16)), N_NEW)
    shuffled = [int(page) for page in np.random.default_rng(7).permutation(32)[:16]]
    assert generate(toy, empty(config), PROMPT, shuffled, N_NEW) == in_order


@both
@pytest.mark.parametrize("chunk", [1, 3, 4, 10])
def test_a_prefill_in_chunks_leaves_the_same_bytes_and_the_same_token(config: ToyConfig, chunk: int) -> None:
    toy, whole, chunked = Toy(config), empty(config), empty(config)
    token = toy.prefill(whole, PROMPT, list(range(7)))
    for start in range(0, len(PROMPT), chunk):
        last = toy.prefill(chunked, PROMPT[: start + chunk], list(range(7)), start)
    assert last == token
    assert chunked.page_bytes(list(range(7))) == whole.page_bytes(list(range(7)))


@both
def test_decode_goes_on_from_copied_pages_in_other_places(config: ToyConfig) -> None:
    toy, here, there = Toy(config), empty(config), empty(config)
    n_pages = config.pages_for(len(PROMPT))
    sources, places = list(range(n_pages)), list(range(20, 20 + n_pages))[::-1]
    tokens = [toy.prefill(here, PROMPT, sources)]
    there.entries[:, places] = here.entries[:, sources]
    pages = [*places, *range(10)]
    while len(tokens) < N_NEW:
        tokens.append(toy.decode(there, tokens[-1], len(PROMPT) + len(tokens) - 1, pages))
    assert tokens == generate(toy, empty(config), PROMPT, list(range(16)), N_NEW)


def test_one_foreign_page_among_the_transferred_ones_changes_the_tokens() -> None:
    config = ToyConfig()
    toy, kv, pages = Toy(config), empty(config, 8), list(range(8))
    prompt = encode("One wrong page in five must not go by unseen, whatever it held before it came here.")
    expected = generate(toy, empty(config, 8), prompt, pages, 30)
    tokens = [toy.prefill(kv, prompt, pages)]
    kv.entries[0, 2] = kv.entries[0, 3]
    while len(tokens) < 30:
        tokens.append(toy.decode(kv, tokens[-1], len(prompt) + len(tokens) - 1, pages))
    assert tokens != expected


def test_another_process_with_other_threads_gives_the_same_tokens() -> None:
    program = (
        "import numpy as np; from pdctl.demo.toy import *; c = ToyConfig();"
        "kv = PagedKV(c, 8, np.zeros(8 * c.page_nbytes, np.uint8));"
        "print(generate(Toy(c), kv, encode('same seed, same words'), list(range(8)), 20), sep='')"
    )
    run = partial(subprocess.run, capture_output=True, check=True, text=True)
    told = [run(["env", f"OPENBLAS_NUM_THREADS={n}", sys.executable, "-c", program]).stdout for n in (1, 2)]
    config = ToyConfig()
    here = generate(Toy(config), empty(config, 8), encode("same seed, same words"), list(range(8)), 20)
    assert told == [f"{here}\n"] * 2


@both
def test_the_pool_names_every_entry_where_it_lies(config: ToyConfig) -> None:
    kv = empty(config)
    pool = kv.pool()
    assert len(pool) == (3 if config.latent else 6)
    assert pool.item_lens == (config.item_nbytes,) * len(pool)
    kv.entries[1, 5] = 1.0
    start = pool.pointers[1] - pool.pointers[0] + 5 * config.item_nbytes
    raw = kv.entries.view(np.uint8).ravel()
    assert raw[start : start + config.item_nbytes].view(np.float32).all()
    assert np.count_nonzero(raw.view(np.float32)) == config.item_nbytes // 4


def test_every_sum_stays_far_below_where_float64_forgets() -> None:
    """The promise behind "exact": the largest sum, in grid steps, of the default toy on a full context."""
    config = ToyConfig()
    toy = Toy(config)
    kv = empty(config, config.pages_for(config.context))
    noise = np.random.default_rng(1).integers(32, 127, config.context).tolist()
    toy.prefill(kv, noise, list(range(kv.n_pages)))
    largest = float(np.abs(kv.entries).max())
    assert largest * 2**10 < 2**24, "KV is kept in float32: every value must be a whole number of steps there"
    assert largest * 2**30 * 2 < 2**53, "shares (2**-20) times values (2**-10), summing to about the largest value"
    assert (np.round(kv.entries * 2**10) == kv.entries * 2**10).all()


def test_the_weights_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(Toy(ToyConfig())._embedding.tobytes()).hexdigest()
    assert digest == "f773824ea9782d6812ab70ce1a4496723417577bb1f8f765103273ff8a10f15e"
