"""
Whether there is a device and a wheel for it; `./dev gpu` passes --gpu, and then their absence is a failure.

Asked of another process: a CUDA context stays in the one that has had it.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from pdctl.device.cuda import LIBRARY

ROOT = Path(__file__).parent.parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="fail where no GPU can be used, and do not skip")


@pytest.fixture(scope="session")
def gpu(pytestconfig: pytest.Config) -> str:
    """`cuda:0`."""
    why = _missing()
    if why is None:
        return "cuda:0"
    if pytestconfig.getoption("--gpu", default=False):
        pytest.fail(why)
    pytest.skip(why)


def _missing() -> str | None:
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        return f"no CUDA driver here ({error})"
    asked = [sys.executable, "-m", "tests.gpu.about"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    return None if done.returncode == 0 else (done.stdout + done.stderr).strip().splitlines()[-1]
