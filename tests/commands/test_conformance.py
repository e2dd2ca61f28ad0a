"""`pdctl conformance` as a person or a pipeline meets it: its output, its exit status."""

from __future__ import annotations

import json

import pytest

from pdctl import config
from pdctl.cli import parser
from pdctl.conformance.promises import PROMISES
from pdctl.errors import ConfigError, Unreachable
from tests.commands.conftest import Fleet
from tests.test_cli import ended


async def conformance(*words: str) -> int:
    args = parser().parse_args(["conformance", *words])
    return int(await args.run(config.load({}), args))


async def test_all_kept_is_0_and_every_promise_stands_in_a_line_without_colours(fleet: Fleet) -> None:
    status, out, err = await ended("conformance", fleet.url, "--idle", "0")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    for promise in PROMISES:
        assert [line for line in out.splitlines() if line.split()[1:2] == [promise.name]], promise.name
    assert "0 broken" in out


async def test_one_that_is_broken_is_1_and_the_document_says_which(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await conformance(fleet.url, "--idle", "0", "--json", "--rooms", "10") == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["name"] for row in told["promises"] if row["verdict"] == "broken"} == {"many-rooms"}, "10 were taken"
    assert all(row["asked"] and row["promise"] and row["found"] for row in told["promises"])


async def test_a_fleet_is_a_usage_error_and_what_is_no_registry_is_unreachable(fleet: Fleet) -> None:
    await fleet.seat(0)
    with pytest.raises(ConfigError, match="--force"):
        await conformance(fleet.url)
    with pytest.raises(Unreachable, match="no bootstrap registry"):
        await conformance(f"{fleet.url}/v1")
