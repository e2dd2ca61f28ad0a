"""
What the demo prefills: a built-in set, a text from the command line, or the shapes of a real trace.

A trace says how long requests are and which 512-token blocks they share, not what they said. Here one block of the
trace becomes one page of the toy, so that lengths shrink 32-fold and shared blocks stay shared, page for page.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pdctl.demo.toy import PRINTABLE, ToyConfig, encode
from pdctl.errors import ConfigError

TRACE_BLOCK = 512  # tokens a hash id stands for


@dataclass(frozen=True, slots=True)
class Prompt:
    name: str
    tokens: tuple[int, ...]
    n_new: int


@dataclass(frozen=True, slots=True)
class Replay:
    """`prompts` made from a trace's lines; `clipped` of them were longer than the toy's context."""

    prompts: tuple[Prompt, ...]
    scale: int
    clipped: int

    @property
    def note(self) -> str:
        return (
            f"trace lengths divided by {self.scale}: one {TRACE_BLOCK}-token block is one page; "
            f"{self.clipped} of {len(self.prompts)} clipped to the toy's context"
        )


def built_in(config: ToyConfig, n_new: int = 32) -> tuple[Prompt, ...]:
    return tuple(from_text(text, config, n_new, name) for name, text in _BUILT_IN.items())


def from_text(text: str, config: ToyConfig, n_new: int = 32, name: str = "--prompt") -> Prompt:
    """The text as bytes; refuses what does not fit rather than cutting it."""
    tokens = encode(text)
    room = config.context - n_new
    if not 0 < len(tokens) <= room:
        raise ConfigError(f"the prompt has {len(tokens)} bytes, the toy takes 1 to {room}: give another text")
    return Prompt(name, tuple(tokens), n_new)


def of_length(n_tokens: int, config: ToyConfig, name: str, n_new: int = 32) -> Prompt:
    """Exactly `n_tokens` of the built-in texts, one after another and from the start again."""
    text = " ".join(_BUILT_IN.values())
    repeated = f"{name}: " + text * (n_tokens // len(text) + 1)
    return from_text(repeated[:n_tokens], config, n_new, name)


def from_trace(path: Path, n_requests: int, config: ToyConfig) -> Replay:
    """The first `n_requests` lines of a Mooncake trace (`input_length`, `output_length`, `hash_ids`)."""
    try:
        with path.open() as lines:
            requests = [
                _request(path, number, line) for number, line in zip(range(1, n_requests + 1), lines, strict=False)
            ]
    except OSError as exc:
        raise ConfigError(f"the trace {path} cannot be read ({exc.strerror}): give a readable file") from exc
    if not requests:
        raise ConfigError(f"the trace {path} gives no request: ask for at least one of a file with lines")
    scaled = [_scaled(number, request, config) for number, request in enumerate(requests, 1)]
    return Replay(
        prompts=tuple(prompt for prompt, _ in scaled),
        scale=TRACE_BLOCK // config.page_size,
        clipped=sum(clipped for _, clipped in scaled),
    )


def shared_pages(prompts: tuple[Prompt, ...], config: ToyConfig) -> int:
    """How many whole pages of the prompts have the same past as a page of an earlier prompt."""
    seen: set[tuple[int, ...]] = set()
    shared = 0
    for prompt in prompts:
        ends = range(config.page_size, len(prompt.tokens) + 1, config.page_size)
        prefixes = {prompt.tokens[:end] for end in ends}
        shared += len(prefixes & seen)
        seen |= prefixes
    return shared


@dataclass(frozen=True, slots=True)
class _Request:
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def _request(path: Path, number: int, line: str) -> _Request:
    try:
        told = json.loads(line)
        request = _Request(
            int(told["input_length"]), int(told["output_length"]), tuple(int(each) for each in told["hash_ids"])
        )
    except (ValueError, TypeError, KeyError) as exc:
        raise ConfigError(f"{path}, line {number}: not a trace request ({exc!r}): give a Mooncake trace") from exc
    if not 0 < request.input_length <= TRACE_BLOCK * len(request.hash_ids):
        raise ConfigError(
            f"{path}, line {number}: {request.input_length} tokens in {len(request.hash_ids)} blocks of 512"
        )
    return request


def _scaled(number: int, request: _Request, config: ToyConfig) -> tuple[Prompt, bool]:
    scale = TRACE_BLOCK // config.page_size
    n_new = min(max(1, -(-request.output_length // scale)), 64)
    wanted = -(-request.input_length // scale)
    tokens = [token for block in request.hash_ids for token in _block(block, config.page_size)]
    kept = min(wanted, config.context - n_new)
    return Prompt(f"trace {number}", tuple(tokens[:kept]), n_new), kept < wanted


def _block(hash_id: int, page_size: int) -> bytes:
    """The same tokens for the same id, and other ones for another."""
    noise = hashlib.blake2b(str(hash_id).encode(), digest_size=page_size).digest()
    return bytes(PRINTABLE[byte % len(PRINTABLE)] for byte in noise)


_BUILT_IN = {
    "a question": "Why do we compute the prompt on one machine and the answer on another?",
    "an answer": (
        "Because the two want different things. Reading a prompt is arithmetic: every token at once, the units full, "
        "nothing to wait for. Writing an answer is memory: one token at a time, all the weights and all the past read "
        "again for each of them. Put both on one machine and each disturbs the other: a long prompt stops every "
        "answer that is being written, and a batch of answers leaves the arithmetic units idle."
    ),
    "a recipe": (
        "Bread for two days. 500 g flour, 340 g water, 10 g salt, 3 g yeast. Mix in the evening, fold twice within the "
        "hour, leave it in the cold until morning. Shape it, let it rise until a finger's mark stays, bake it hot with "
        "steam for twenty minutes and without for twenty more. It is done when it sounds hollow."
    ),
    "a log": (
        "09:14:02 rank 0 registered\n09:14:02 rank 1 registered\n09:14:03 instance complete\n09:20:41 transfer failed: "
        "peer stopped reading after 4 of 64 blocks\n09:20:41 session blocked\n09:21:13 probe answered, same process\n"
        "09:21:13 session trusted again after 32 s\n"
    ),
    "code": "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\nprint([",
    "umlauts": "Über den Wolken läßt sich's gut träumen; 日本語もどうぞ, and a naïve façade, too.",
}
