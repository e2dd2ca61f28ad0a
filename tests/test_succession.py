"""The socket that an agent listens at: whose it is, who may reach it, and what becomes of one that was left behind."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from pdctl.errors import AddressTaken, ConfigError
from pdctl.succession import inherited, listening


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_only_its_user_reaches_the_socket(tmp_path: Path) -> None:
    at = tmp_path / "run" / "agent.sock"
    with listening(at, for_others=False):
        assert (mode(at), mode(at.parent)) == (0o600, 0o700)
    assert not at.exists()


def test_for_others_the_directory_still_cannot_be_written(tmp_path: Path) -> None:
    at = tmp_path / "run" / "agent.sock"
    with listening(at, for_others=True):
        assert (mode(at), mode(at.parent)) == (0o666, 0o711)


@pytest.mark.parametrize(("wide", "for_others"), [(0o755, False), (0o710, False), (0o1777, True), (0o775, True)])
def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path, wide: int, for_others: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(wide)
    with (
        pytest.raises(ConfigError, match="is open to others"),
        listening(tmp_path / "run" / "s", for_others=for_others),
    ):
        pass


def test_a_socket_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with listening(tmp_path / "s", for_others=False), socket.socket(socket.AF_UNIX) as knock:
        knock.connect(str(tmp_path / "s"))


def test_a_socket_in_use_and_a_file_are_left_alone(tmp_path: Path) -> None:
    with listening(tmp_path / "s", for_others=False):
        with (
            pytest.raises(AddressTaken, match="another process listens at"),
            listening(tmp_path / "s", for_others=False),
        ):
            pass
        assert (tmp_path / "s").exists()
    (tmp_path / "file").write_text("dear")
    with pytest.raises(ConfigError, match="no socket"), listening(tmp_path / "file", for_others=False):
        pass
    assert (tmp_path / "file").read_text() == "dear"


def test_a_socket_whose_queue_is_full_is_in_use(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waits:
        busy.bind(str(tmp_path / "s"))
        busy.listen(0)
        waits.connect(str(tmp_path / "s"))
        with pytest.raises(AddressTaken, match="another"), listening(tmp_path / "s", for_others=True):
            pass
    assert (tmp_path / "s").exists()


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than 107 bytes"), listening(tmp_path / ("x" * 107), for_others=False):
        pass


@pytest.mark.parametrize("text", ["7", "x:y", "999999:1", ""])
def test_a_socket_is_inherited_only_from_who_keeps_it(text: str) -> None:
    with pytest.raises(ConfigError):
        inherited(text)
