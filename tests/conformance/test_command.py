"""`pdctl conformance` as a person or a pipeline meets it: real processes, their output, their exit status."""

from __future__ import annotations

import json

from pdctl.conformance.promises import PROMISES
from tests.test_cli import ended, served


async def test_all_kept_is_0_and_every_promise_stands_in_a_line_without_colours() -> None:
    async with served("--journal", "memory:") as (url, _):
        status, out, err = await ended("conformance", url, "--idle", "0")
        assert (status, err) == (0, "")
        assert "\x1b" not in out
        for promise in PROMISES:
            assert [line for line in out.splitlines() if line.split()[1:2] == [promise.name]], promise.name
        assert "0 broken" in out
        status, out, err = await ended("conformance", url, "--idle", "0", "--json", "--rooms", "10")
        told = json.loads(out)
        assert (status, told["ok"]) == (1, False), "10 rooms are taken, and 10 is what was asked for as too many"
        assert {row["name"] for row in told["promises"] if row["verdict"] == "broken"} == {"many-rooms"}
        assert all(row["asked"] and row["promise"] and row["found"] for row in told["promises"])


async def test_a_fleet_is_a_usage_error_and_no_registry_is_69() -> None:
    async with served("--journal", "memory:") as (url, _):
        assert (await ended("register", "--registry", url, "--rank-host", "127.0.0.1", "--rank-port", "40999"))[0] == 0
        status, out, err = await ended("conformance", url)
        assert (status, out) == (2, "")
        assert "--force" in err
        status, out, err = await ended("conformance", f"{url}/v1")
        assert (status, out) == (69, "")
        assert "no bootstrap registry" in err
