"""Mooncake's metadata through the death of the registry: engines publish once, and must not have to do it again."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.engine.named import ENVIRON
from tests.engine.processes import Child
from tests.service import service


def engine(name: str, registry: str) -> Child:
    return Child("tests.engine.named", name, f"{registry}/metadata", environ=ENVIRON)


def test_an_engine_is_found_by_new_ones_after_the_registry_was_killed(tmp_path: Path) -> None:
    """The stock server comes back empty: nobody publishes again, no new engine finds an old one, all must restart."""
    journal = ("--journal", f"sqlite:{tmp_path / 'journal'}")
    with service(tmp_path / "first", *journal) as registry, engine("node", registry.url) as node:
        assert node.hello["code"] == 0
        registry.kill()
        with (
            service(tmp_path / "second", *journal, "--port", str(registry.port)) as again,
            engine("writer", again.url) as writer,
        ):
            assert writer.ask_now("write", peer="node", value=3) == {"code": 0, "to": node.hello["pointer"]}
            assert node.ask_now("first")["value"] == 3
            node.ask_now("leave")
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{again.url}/metadata?key=mooncake%2Fram%2Fnode", timeout=60)
            assert again.complaints() == []
