"""Half-written objects are found by their lengths, at whatever byte the writer died."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from pdctl.errors import ConfigError
from pdctl.store.torn import FOLDER, clear_torn

KEY, OBJECT = b"default\x00" + b"k" * 200, bytes(range(256)) * 2
WHOLE = b"\x0a\xd0\x01" + KEY + b"\x12\x80\x04" + OBJECT


def file_of(directory: Path, content: bytes, name: str = "default_k") -> Path:
    """As the wheel lays them out."""
    file = directory / FOLDER / "a" / "p" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def test_what_is_whole_stays(tmp_path: Path) -> None:
    file = file_of(tmp_path, WHOLE)
    beside = tmp_path / "7.bucket"
    beside.write_bytes(b"not of this kind")
    assert clear_torn(tmp_path) == 0
    assert (file.read_bytes(), beside.exists()) == (WHOLE, True)


def test_an_object_is_removed_at_whatever_byte_its_writer_died(tmp_path: Path) -> None:
    whole = file_of(tmp_path, WHOLE, "default_whole")
    for end in range(len(WHOLE)):
        torn = file_of(tmp_path, WHOLE[:end])
        with capture_logs() as logs:
            assert clear_torn(tmp_path) == 1, end
        assert not torn.exists()
        assert logs[0]["names"] == ["default_k"]
    assert whole.read_bytes() == WHOLE


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"hello", id="a text"),
        pytest.param(WHOLE + b"x", id="more than an object"),
        pytest.param(b"\x0a\x01k\x1a\x01o", id="another field"),
        pytest.param(b"\x0a" + b"\xff" * 20, id="a length without end"),
    ],
)
def test_what_is_no_object_is_named_and_nothing_is_removed(tmp_path: Path, content: bytes) -> None:
    files = [file_of(tmp_path, WHOLE[:9]), file_of(tmp_path, content, "README"), file_of(tmp_path, WHOLE[:9], "z")]
    with pytest.raises(ConfigError, match=rf"holds {FOLDER}/a/p/README, which is no object of a store"):
        clear_torn(tmp_path)
    assert all(file.exists() for file in files)


def test_where_nothing_was_ever_written_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert clear_torn(tmp_path) == 0
