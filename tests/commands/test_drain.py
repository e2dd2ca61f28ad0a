"""`pdctl drain` as an operator meets it, at a registry as `pdctl serve` runs it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from pdctl.config import load
from pdctl.dismissal import Gone, Whom, drain_and_wait
from pdctl.errors import BadField, NotReady, RegistryRefused, Unreachable
from tests.commands.conftest import Fleet
from tests.test_cli import SOON_S, pdctl

Run = Callable[..., Awaitable[int]]


async def test_ranks_that_are_waited_for_are_told_as_they_go_and_others_stay(
    fleet: Fleet, pdctl_here: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    await fleet.seat(0)
    await fleet.seat(1)
    assert await pdctl_here("drain", "p/tp1", "--wait", "--grace", "0.2") == 0
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("p")]
    asked, gone, done = out
    assert asked.startswith("p/tp1 drains: ")
    assert asked.endswith("; 1 here")
    assert gone.startswith("p/tp1 is gone after ")
    assert (gone.rpartition(" s: ")[2].startswith("drained"), done) == (True, "p/tp1 is drained")
    assert [row["seat"] for row in (await fleet.instance())["alive_seats"]] == ["dp0/cp0/tp0/pp0"]


async def test_a_drain_goes_on_by_itself_whoever_waited_for_it(fleet: Fleet, pdctl_here: Run) -> None:
    await fleet.seat(0)
    async with pdctl("drain", "p", "--wait", "--grace", "60", "--at", fleet.url) as child:
        assert child.stdout is not None
        asked = await asyncio.wait_for(child.stdout.readline(), SOON_S)
        assert b"p drains" in asked
        assert b"\x1b" not in asked
        child.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(child.wait(), SOON_S) == 130
        assert child.stderr is not None
        assert await child.stderr.read() == b""
    assert (await fleet.instance())["draining"] is True
    assert await pdctl_here("drain", "p", "--grace", "0.1") == 0
    async with asyncio.timeout(SOON_S):
        while (await fleet.instance())["alive"]:  # noqa: ASYNC110  the registry's own doing
            await asyncio.sleep(0.02)


async def test_who_is_not_there_and_a_registry_that_is_not_are_told_apart(fleet: Fleet, pdctl_here: Run) -> None:
    with pytest.raises(RegistryRefused, match="nobody"):
        await pdctl_here("drain", "nobody", "tp1")
    with pytest.raises(BadField, match="grace_s"):
        await pdctl_here("drain", "p", "--grace", "-1")
    fleet.url = "http://127.0.0.1:9"
    with pytest.raises(Unreachable, match="refused"):
        await pdctl_here("drain", "p")


async def test_ranks_that_stay_are_named_in_the_end(registry_url: str) -> None:
    """The registry's clock stands still, so that no grace is ever over."""
    async with aiohttp.ClientSession() as http:
        await Fleet(registry_url, http).seat(0)
    gone: list[Gone] = []
    asked: list[int] = []
    settings = load({"node.registry": registry_url})
    with pytest.raises(NotReady, match=r"p/tp0 did not go in 0.3 s: .pdctl explain p"):
        await drain_and_wait(settings, Whom("p"), 0.1, asked=asked.append, tell=gone.append, beyond_s=0.2)
    assert (asked, gone) == ([1], [])


@pytest.mark.parametrize(
    ("words", "said"),
    [(("p",), "p"), (("p", "tp1"), "p/tp1"), (("p/dp0-tp1",), "p/tp1"), (("p/dp1/tp3",), "p/dp1-tp3")],
)
def test_a_rank_is_named_as_every_command_names_it(words: tuple[str, ...], said: str) -> None:
    assert str(Whom.parse(*words)) == said


@pytest.mark.parametrize(
    ("words", "field"), [(("p", "xx1"), "seat"), (("a b",), "instance"), (("",), "instance"), (("vllm:a",), "instance")]
)
def test_what_is_no_name_is_refused_by_its_field(words: tuple[str, ...], field: str) -> None:
    with pytest.raises(BadField) as error:
        Whom.parse(*words)
    assert error.value.field == field
