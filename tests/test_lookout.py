"""What a registry makes of ranks that tell another one, by a clock that is turned by hand."""

from __future__ import annotations

from typing import Any

from pdctl.core.elsewhere import Copied
from pdctl.core.overview import Place
from pdctl.core.report import Report
from pdctl.core.route import Seat
from pdctl.looking import Looking
from pdctl.lookout import Lookout
from pdctl.registrar import Registrar
from tests.conftest import Clock
from tests.dialects.test_native import HERE, claim

TP0: Place = ("default", Seat(0, 0, 0, 0))
B = "http://b:8998"


async def told(looking: Looking, registrar: Registrar) -> Lookout:
    """A rank without a lease has registered and told how it is."""
    await registrar.register(claim(0, size=1))
    looking.lookout.report(TP0, Report("prefill"), b"{}", HERE)
    return looking.lookout


def copied(lookout: Lookout, epoch: int = 1) -> None:
    assert lookout.elsewhere.take("b", TP0, Copied(epoch, lookout.clock(), b"{}"))


def kinds(lookout: Lookout) -> list[str]:
    return [event.kind for event in lookout.events.since(0, 99)[0]]


async def test_a_rank_that_tells_another_registry_by_now_is_not_lost(
    looking: Looking, registrar: Registrar, clock: Clock
) -> None:
    lookout = await told(looking, registrar)
    missed = [lookout.misses_some]
    clock.forward(8.0)
    missed.append(lookout.misses_some)
    assert missed == [False, True], "time to ask the others, before it is told that it is lost"
    clock.forward(7.5)
    copied(lookout)
    lookout.tick()
    assert lookout.reports.get(TP0) is None
    assert "report_lost" not in kinds(lookout)
    clock.forward(15.0)
    lookout.tick()
    assert lookout.elsewhere.freshest(TP0) is None, "nobody has said it again"


async def test_one_that_tells_nobody_is_lost_and_once(looking: Looking, registrar: Registrar, clock: Clock) -> None:
    lookout = await told(looking, registrar)
    clock.forward(15.0)
    lookout.tick()
    assert kinds(lookout).count("report_lost") == 1
    lookout.copied(B, [row("report_lost", instance="default", rank="tp0")])
    assert kinds(lookout).count("report_lost") == 2, "another one has missed it too"


async def test_that_another_misses_a_rank_that_tells_this_one_is_no_news(
    looking: Looking, registrar: Registrar
) -> None:
    lookout = await told(looking, registrar)
    lookout.copied(
        B, [row("report_lost", instance="default", rank="tp0"), row("seated"), row("refused", peer="10.0.0.9")]
    )
    assert kinds(lookout) == ["seated", "completed", "refused"], "lives are known here by themselves"
    (event,) = lookout.events.since(0, 9, kind="refused")[0]
    assert (event.registry, event.peer, event.at) == (B, "10.0.0.9", "2026-11-22T04:00:00.000Z")


async def test_a_life_that_is_over_takes_its_copy_along(looking: Looking, registrar: Registrar) -> None:
    lookout = await told(looking, registrar)
    copied(lookout, epoch=1)
    await registrar.register(claim(0, size=1, port=41000))
    assert lookout.elsewhere.freshest(TP0) is None


def row(kind: str, **more: Any) -> dict[str, Any]:
    usual = {"id": 7, "at": "2026-11-22T04:00:00.000Z", "kind": kind, "sentence": "it was so: look", "registry": None}
    return usual | more
