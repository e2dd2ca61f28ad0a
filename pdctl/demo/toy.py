"""
A small decoder-only transformer whose answers are exact, so that one wrong byte of KV can be seen.

Byte tokens, weights from a fixed seed, RMSNorm, learned positions, grouped-query attention, greedy decoding. Its KV
memory is given from outside and only ever touched through a page table, laid out as SGLang's ranks lay out theirs
(all K layers, then all V layers; with `latent`, one compressed entry a layer as MLA has it).

Every factor of every sum lies on a binary grid coarse enough for float64 to hold the sum exactly. So the order of
summation, the number of threads, the chunking of a prefill and the addresses of the pages cannot change one bit, and
"equal" needs no tolerance. `exp` is the one step whose last bit is the machine's own; its result is put on a grid
2**32 times coarser than that bit.

It will never be a useful language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import Pool

Floats = npt.NDArray[np.float64]
PRINTABLE = range(32, 127)  # what it may say: a page of nonsense that a terminal survives
_ACTIVATION, _PROBABILITY = 2.0**10, 2.0**20


@dataclass(frozen=True, slots=True)
class ToyConfig:
    """Sizes. 12 KiB of KV a token by default: small enough to compute, large enough to watch it move.

    `latent` > 0 keeps one compressed vector of that width a layer in place of K and V.
    """

    layers: int = 6
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    latent: int = 0
    page_size: int = 16
    context: int = 1024
    seed: int = 20_25

    @property
    def entries(self) -> int:
        return self.layers if self.latent else 2 * self.layers

    @property
    def entry_width(self) -> int:
        return self.latent or self.kv_heads * self.head_dim

    @property
    def item_nbytes(self) -> int:
        """Bytes of one page of one entry (float32)."""
        return self.page_size * self.entry_width * 4

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page over all entries."""
        return self.entries * self.item_nbytes

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)


class PagedKV:
    """`n_pages` pages in each entry, cut out of `memory`: uint8, contiguous, at least `n_pages * page_nbytes` long."""

    def __init__(self, config: ToyConfig, n_pages: int, memory: npt.NDArray[np.uint8]) -> None:
        self.config, self.n_pages = config, n_pages
        used = memory[: n_pages * config.page_nbytes].view(np.float32)
        self.entries = used.reshape(config.entries, n_pages, config.page_size, config.entry_width)

    def pool(self) -> Pool:
        pointers = tuple(int(entry.ctypes.data) for entry in self.entries)
        return Pool(pointers, (self.config.item_nbytes,) * self.config.entries, self.n_pages)

    def write(self, entry: int, pages: list[int], position: int, rows: Floats) -> None:
        """Token `position + i` gets row i."""
        places = np.arange(position, position + len(rows))
        page = np.asarray(pages)[places // self.config.page_size]
        self.entries[entry, page, places % self.config.page_size] = rows

    def read(self, entry: int, pages: list[int], n_tokens: int) -> Floats:
        """Rows of the first `n_tokens` tokens, shape (n_tokens, entry_width)."""
        held = self.entries[entry, pages[: self.config.pages_for(n_tokens)]]
        return held.reshape(-1, self.config.entry_width)[:n_tokens].astype(np.float64)

    def page_bytes(self, pages: list[int]) -> bytes:
        """What the pages hold, in the order given, entry after entry."""
        return self.entries[:, pages].tobytes()


@dataclass(frozen=True, slots=True)
class _Layer:
    query: Floats
    cached: tuple[Floats, ...]  # hidden -> what is kept: (K, V) or (latent,)
    unpack: tuple[Floats, ...]  # kept -> K, V; empty when they are kept as they are
    output: Floats
    up: Floats
    down: Floats


class Toy:
    """The weights. Stateless beside them: all memory of a request lies in the pages."""

    def __init__(self, config: ToyConfig) -> None:
        rng = np.random.default_rng(config.seed)
        self.config = config
        self._embedding = _weights(rng, 256, config.hidden, peak=1023)
        self._positions = _weights(rng, config.context, config.hidden, peak=511)
        self._layers = [_layer(rng, config) for _ in range(config.layers)]
        self._unembedding = _weights(rng, config.hidden, len(PRINTABLE))

    def prefill(self, kv: PagedKV, tokens: list[int], pages: list[int], start: int = 0) -> int:
        """Fill the pages with tokens `start..`, what lies before being there already; returns the next token."""
        return self._extend(kv, tokens[start:], start, pages)

    def decode(self, kv: PagedKV, token: int, position: int, pages: list[int]) -> int:
        """Put `token` at `position`; returns the token after it."""
        return self._extend(kv, [token], position, pages)

    def _extend(self, kv: PagedKV, tokens: list[int], start: int, pages: list[int]) -> int:
        end = start + len(tokens)
        x = self._embedding[tokens] + self._positions[start:end]
        for number, layer in enumerate(self._layers):
            x = x + self._attention(kv, number, layer, _norm(x), start, pages)
            x = x + _snap(np.clip(_snap(_norm(x) @ layer.up), -1.0, 1.0) @ layer.down)
        logits = _norm(x[-1:]) @ self._unembedding
        return PRINTABLE[int(np.argmax(logits))]

    def _attention(self, kv: PagedKV, number: int, layer: _Layer, x: Floats, start: int, pages: list[int]) -> Floats:
        end = start + len(x)
        numbers = [number + i * self.config.layers for i in range(len(layer.cached))]
        for entry, matrix in zip(numbers, layer.cached, strict=True):
            kv.write(entry, pages, start, _snap(x @ matrix))
        kept = [kv.read(entry, pages, end) for entry in numbers]
        keys, values = [_snap(kept[0] @ matrix) for matrix in layer.unpack] or kept
        heads = (self.config.kv_heads, self.config.head_dim)
        attended = _attend(_snap(x @ layer.query), keys.reshape(end, *heads), values.reshape(end, *heads), start)
        return _snap(attended @ layer.output)


def generate(toy: Toy, kv: PagedKV, prompt: list[int], pages: list[int], n_new: int) -> list[int]:
    """The whole run in one place: `n_new` tokens after `prompt`."""
    tokens = [toy.prefill(kv, prompt, pages)]
    while len(tokens) < n_new:
        tokens.append(toy.decode(kv, tokens[-1], len(prompt) + len(tokens) - 1, pages))
    return tokens


def encode(text: str) -> list[int]:
    return list(text.encode())


def as_text(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def _snap(x: Floats, steps: float = _ACTIVATION) -> Floats:
    return np.rint(x * steps) / steps


def _weights(rng: np.random.Generator, rows: int, columns: int, peak: int = 127) -> Floats:
    """Whole 1024ths in -peak..peak: the default keeps a sum over 256 normalised inputs near 1."""
    return rng.integers(-peak, peak + 1, size=(rows, columns)) / _ACTIVATION


def _layer(rng: np.random.Generator, config: ToyConfig) -> _Layer:
    """Sharp queries and a loud output: measured, one foreign page among five changes most of the next forty tokens."""
    hidden, width, kv_width = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    return _Layer(
        query=_weights(rng, hidden, width, peak=511),
        cached=tuple(_weights(rng, hidden, config.entry_width) for _ in range(1 if config.latent else 2)),
        unpack=tuple(_weights(rng, config.latent, kv_width) for _ in range(2 if config.latent else 0)),
        output=_weights(rng, width, hidden, peak=255),
        up=_weights(rng, hidden, 2 * hidden),
        down=_weights(rng, 2 * hidden, hidden),
    )


def _norm(x: Floats) -> Floats:
    return _snap(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 2.0**-20))


def _attend(query: Floats, keys: Floats, values: Floats, start: int) -> Floats:
    """query (n, heads * d) at positions start.. and keys, values (start + n, kv_heads, d) give (n, heads * d)."""
    n, (m, kv_heads, dim) = len(query), keys.shape
    grouped = query.reshape(n, kv_heads, -1, dim).transpose(1, 2, 0, 3)  # (kv_heads, group, n, d)
    scores = grouped @ keys.transpose(1, 2, 0)[:, None] / np.sqrt(dim)
    scores = np.where(np.arange(m) <= start + np.arange(n)[:, None], scores, -np.inf)
    weights = _snap(np.exp(scores - scores.max(axis=-1, keepdims=True)), _PROBABILITY)
    shares = _snap(weights / weights.sum(axis=-1, keepdims=True), _PROBABILITY)
    attended = shares @ values.transpose(1, 0, 2)[:, None]
    return _snap(attended.transpose(2, 0, 1, 3).reshape(n, -1))
