"""Completion scripts: each shell reads its own, and bash completes by it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pdctl.cli import parser
from pdctl.flags.completion import SHELLS
from tests.test_cli import SOON_S

COMPLETE = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={at} COMP_LINE="{line}" COMP_POINT={end}
_shtab_pdctl
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def scripted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[str], Path]:
    def write(shell: str) -> Path:
        args = parser().parse_args(["completion", shell])
        assert args.perform(args) == 0
        script = tmp_path / f"pdctl.{shell}"
        script.write_text(capsys.readouterr().out)
        return script

    return write


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_reads_its_script(shell: str, scripted: Callable[[str], Path]) -> None:
    script = scripted(shell)
    assert all(word in script.read_text() for word in ("serve", "drain", "grace"))
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not on this machine, so that nobody could read it")
    assert run(shell, "-n", str(script)) == ""


def test_bash_completes_commands_flags_and_choices(scripted: Callable[[str], Path]) -> None:
    script = scripted("bash")

    def completed(*words: str) -> list[str]:
        line = " ".join(words)
        text = COMPLETE.format(script=script, words=line or '""', at=len(words) - 1, line=line, end=len(line))
        return run("bash", "-c", text).split()

    assert completed("pdctl", "dra") == ["drain"]
    assert completed("pdctl", "drain", "--gr") == ["--grace"]
    assert completed("pdctl", "sessions", "--state", "tri") == ["trial"]
    assert completed("pdctl", "store", "war") == ["warmup"]


def test_a_shell_that_nobody_knows_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["completion", "fish"])
    assert end.value.code == 2
    assert "fish" in capsys.readouterr().err


async def test_whoever_reads_no_more_gets_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    command = (sys.executable, "-m", "pdctl", "completion", "zsh")
    child = await asyncio.create_subprocess_exec(*command, stdout=write, stderr=asyncio.subprocess.PIPE)
    os.close(write)
    _, err = await asyncio.wait_for(child.communicate(), SOON_S)
    assert (child.returncode, err) == (141, b"")
