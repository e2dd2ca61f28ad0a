"""What every dialect does at its edge."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdctl.dialects.edge import parsed
from pdctl.errors import BadField

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
MARKS = st.sampled_from(list('{}[]",:0123456789.eE+-\\u tfn\n\x00'))


@given(value=VALUES, ascii_only=st.booleans())
@example(value=10**4000, ascii_only=True)
@example(value="\ud800", ascii_only=True)
@example(value=["\u2028", -0.0, 1e308 * 10], ascii_only=False)
def test_what_is_json_is_read_as_python_reads_it(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    body = text.encode("utf-8", "surrogatepass")
    try:
        expected = repr(json.loads(body.decode()))
    except UnicodeDecodeError:
        with pytest.raises(BadField, match="UTF-8"):
            parsed(body)
    else:
        assert repr(parsed(body)) == expected  # by repr: NaN, -0.0 and 1.0 are not 1


@given(value=VALUES, edits=st.lists(st.tuples(st.integers(0, 10_000), MARKS), min_size=1, max_size=4))
@example(value={"a": 1, "b": 2}, edits=[(11, "a")])  # one name twice: the last counts
@example(value=10, edits=[(1, "\x00")])  # as UTF-16 this would be 1
def test_what_is_hardly_json_is_read_as_python_reads_it_or_refused(value: object, edits: list[tuple[int, str]]) -> None:
    text = list(json.dumps(value))
    for place, mark in edits:
        text[place % len(text)] = mark
    body = "".join(text)
    try:
        expected = repr(json.loads(body))
    except ValueError:
        with pytest.raises(BadField):
            parsed(body.encode())
    else:
        assert repr(parsed(body.encode())) == expected


@pytest.mark.parametrize("depth", [100, 400])
def test_nested_json_is_read_to_some_hundreds_of_levels(depth: int) -> None:
    assert json.dumps(parsed(b"[" * depth + b"]" * depth)) == "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 4301, "a number too long"),
        (b'{"a": 1', "is not JSON"),
        (b"\xef\xbb\xbf1", "is not JSON"),
    ],
    ids=["nothing", "no text", "bottomless", "endless number", "half", "byte order mark"],
)
def test_what_is_no_json_is_refused_in_words(body: bytes, said: str) -> None:
    with pytest.raises(BadField, match=said):
        parsed(body)
