"""A link that is out, a room that failed by it, and who is to blame: real ranks, real engines, one of them stopped."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from pdctl.core.findings import Culprit, Finding
from tests.engine.processes import Child
from tests.explain.planted import culprits, explained
from tests.service import service


def rank(role: str, registry: str) -> Child:
    name = "default" if role == "prefill" else "link-d"  # a decode asks on the plain paths, which know one instance
    given = {"role": role, "name": name, "registry": registry}
    return Child("tests.explain.moving_rank", json.dumps(given))


async def until_found(what: Culprit, registry: str, *words: str) -> list[Finding]:
    """Ranks report within a quarter of a second."""
    async with asyncio.timeout(120):
        while True:
            found = (await explained(registry, *words)).findings
            if any(finding.what is what for finding in found):
                return found
            await asyncio.sleep(0.1)


async def until_registered(registry: str) -> None:
    async with asyncio.timeout(120):
        while await culprits(registry, "default", "link-d"):  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.1)


async def test_an_ejected_link_is_named_with_who_is_at_its_other_end_and_why(tmp_path: Path) -> None:
    with service(tmp_path / "serve.log", "--journal", "memory:") as running:
        registry = running.url
        with rank("prefill", registry) as prefill, rank("decode", registry) as decode:
            await until_registered(registry)
            assert await decode.ask("receive", room=1) == {}
            assert await prefill.ask("send", room=1) == {"ended": "success"}
            assert await decode.ask("receive", room=2) == {}
            assert await prefill.ask("named") == {}
            decode.stop()
            ended = await prefill.ask("send", room=2)
            assert ended["ended"] != "success"

            found = await until_found(Culprit.EJECTED_LINK, registry, "default", "link-d")
            assert [finding.what for finding in found][:2] == [Culprit.EJECTED_LINK, Culprit.HANGS]
            assert found[0].who == "default/tp0 -> link-d/tp0"
            assert "timed out" in found[0].why
            assert found[1].who == "link-d/tp0"

            of_room = await until_found(Culprit.ROOM_FAILED, registry, "room", "2")
            assert {Culprit.EJECTED_LINK, Culprit.ROOM_FAILED} <= {finding.what for finding in of_room}

            decode.resume()
            back = await explained(registry, "default", "link-d")
            assert [finding.what for finding in back.findings] == [Culprit.EJECTED_LINK]  # its hold is not over
            assert "answers again" in back.findings[0].do
            assert (await culprits(registry, "room", "3"))[-1] == "room_unknown"
