"""The recordings are what stock SGLang says: recorded again, they are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.wire.stock.conftest import ROOT, environment

WIRE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recorded_again(stock_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wire")
    command = [sys.executable, "-m", "tests.wire.capture", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment(stock_folder), check=True, capture_output=True, timeout=60)
    return folder


def content(path: Path) -> Any:
    """Without texts that are the HTTP library's own: they change with its version."""
    read = json.loads(path.read_text())
    if read.get("only_status") or read.get("response", {}).get("status") == 500:
        del read["response"]["body"]
    return read


@pytest.mark.parametrize("wire", ["http", "zmq"])
def test_stock_says_today_what_was_recorded(recorded_again: Path, wire: str) -> None:
    again = {path.name: content(path) for path in (recorded_again / wire).iterdir()}
    assert again == {path.name: content(path) for path in (WIRE / wire).iterdir()}
