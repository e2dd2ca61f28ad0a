"""Every path that the OpenAPI knows, asked all that its schema allows and much that it does not, over real HTTP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.service import service

CONFIG = Path(__file__).with_name("schemathesis.toml")
DEADLINE_S = 120.0


def fuzz(url: str, place: Path) -> str:
    """What schemathesis says of the service; it exits 0 only where nothing was wrong."""
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        [scripts / "schemathesis", "--config-file", CONFIG, "run", f"{url}/openapi.json"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_request_that_a_schema_could_suggest_makes_a_500_or_an_answer_that_is_not_told_of(tmp_path: Path) -> None:
    with service(tmp_path / "log") as registry:
        said = fuzz(registry.url, tmp_path)
        assert "Tested: " in said
        assert registry.lives()
        assert registry.complaints() == []
