"""What the demo prefills: real texts whole, and traces whose shared blocks stay shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdctl.demo.prompts import built_in, from_text, from_trace, of_length, shared_pages
from pdctl.demo.toy import ToyConfig
from pdctl.errors import ConfigError

CONFIG = ToyConfig()  # 16-token pages, so a 32-fold scale; 1024 tokens of context


def trace_of(folder: Path, *requests: tuple[int, int, list[int]]) -> Path:
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(dict(zip(keys, (0, *request), strict=True))) + "\n" for request in requests))
    return path


def test_the_built_in_prompts_fit_and_differ() -> None:
    prompts = built_in(CONFIG)
    assert len({prompt.tokens for prompt in prompts}) == len(prompts) >= 5
    assert all(0 < len(prompt.tokens) + prompt.n_new <= CONFIG.context for prompt in prompts)


def test_a_prompt_is_its_bytes() -> None:
    assert bytes(from_text("Zürich", CONFIG).tokens) == "Zürich".encode()


@pytest.mark.parametrize("text", ["", "x" * 1024], ids=["empty", "too long"])
def test_a_prompt_that_does_not_fit_is_refused_not_cut(text: str) -> None:
    with pytest.raises(ConfigError, match="1 to 992"):
        from_text(text, CONFIG)


@pytest.mark.parametrize("n", [40, 900])
def test_a_long_prompt_has_the_length_asked_for_and_its_own_start(n: int) -> None:
    one, other = of_length(n, CONFIG, "one"), of_length(n, CONFIG, "two")
    assert len(one.tokens) == len(other.tokens) == n
    assert shared_pages((one, other), CONFIG) == 0


def test_one_block_of_the_trace_becomes_one_page_and_lengths_shrink_alike(tmp_path: Path) -> None:
    replay = from_trace(trace_of(tmp_path, (1024, 320, [5, 6]), (600, 3, [5, 7])), 2, CONFIG)
    assert [len(prompt.tokens) for prompt in replay.prompts] == [32, 19]
    assert [prompt.n_new for prompt in replay.prompts] == [10, 1]
    assert (replay.scale, replay.clipped) == (32, 0)


def test_equal_hash_ids_give_equal_tokens_and_others_give_others(tmp_path: Path) -> None:
    path = trace_of(tmp_path, (1536, 32, [0, 1, 2]), (1536, 32, [0, 1, 3]), (1024, 32, [9, 1]))
    first, second, third = from_trace(path, 3, CONFIG).prompts
    assert first.tokens[:32] == second.tokens[:32]
    assert first.tokens[32:] != second.tokens[32:]
    assert first.tokens[16:32] == third.tokens[16:32]
    assert shared_pages((first, second, third), CONFIG) == 2, "the third shares a block but not the way to it"


def test_a_request_longer_than_the_context_is_clipped_and_counted(tmp_path: Path) -> None:
    replay = from_trace(trace_of(tmp_path, (512 * 80, 6400, list(range(80)))), 1, CONFIG)
    (prompt,) = replay.prompts
    assert (len(prompt.tokens), prompt.n_new) == (1024 - 64, 64)
    assert replay.clipped == 1
    assert "1 of 1 clipped" in replay.note
    assert "divided by 32" in replay.note


def test_only_as_many_requests_are_read_as_asked_for(tmp_path: Path) -> None:
    path = trace_of(tmp_path, *[(100, 10, [n]) for n in range(5)])
    assert len(from_trace(path, 3, CONFIG).prompts) == 3
    assert len(from_trace(path, 9, CONFIG).prompts) == 5


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("not json\n", "line 1"),
        ('{"input_length": 5, "output_length": 5}\n', "hash_ids"),
        ('{"input_length": 513, "output_length": 5, "hash_ids": [1]}\n', "513 tokens in 1 block"),
        ('{"input_length": 0, "output_length": 5, "hash_ids": [1]}\n', "0 tokens"),
        ("[1]\n", "line 1"),
        ("", "no request"),
    ],
    ids=["no json", "key missing", "too few blocks", "no tokens", "no object", "empty"],
)
def test_a_file_that_is_no_trace_is_refused_with_its_line(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=told):
        from_trace(path, 5, CONFIG)


def test_a_missing_trace_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        from_trace(tmp_path / "none.jsonl", 5, CONFIG)
