"""
Opens the registry of `pdctl serve` in order and closes it in reverse: journal, wires, listeners, loops.

The only place that knows who is wired to whom there. It listens last, when there is something to say. No engine, no
link and no room is known here: those are the ranks', in node.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from random import SystemRandom

from pdctl import drainer, server
from pdctl.admission import Turnstile
from pdctl.beside import beside
from pdctl.config import Settings
from pdctl.core.admission import Admission
from pdctl.core.draining import DrainPolicy
from pdctl.core.lives import ERA, Life
from pdctl.core.registry import Registry
from pdctl.core.rooms import EXTENSIONS, RoomBook
from pdctl.core.witness import Verdict, WitnessPolicy, WitnessTable
from pdctl.dated import Dated
from pdctl.dialects import native, page, sglang
from pdctl.door import open_door
from pdctl.engine.asking import Asking
from pdctl.journals import journal_url
from pdctl.links import Links
from pdctl.looking import Looking
from pdctl.metrics import Metrics
from pdctl.persistence.base import Shared
from pdctl.persistence.open import open_journal
from pdctl.registrar import Registrar
from pdctl.replicas import own_url
from pdctl.traced import traced
from pdctl.tracing import open_tracing
from pdctl.wires import OtherWires, bind_all, instance_at
from pdctl.witness import Witness, asking


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A registry that serves. `url` is where it has been bound; `listeners`, those that speak for one instance."""

    url: str
    registrar: Registrar
    listeners: tuple[tuple[str, str], ...] = ()


@asynccontextmanager
async def sidecar(settings: Settings) -> AsyncIterator[Sidecar]:
    """The service of `pdctl serve`. Raises ConfigError and AddressTaken before anything else is opened."""
    metrics = Metrics()
    door = open_door(settings.access, metrics)
    async with AsyncExitStack() as stack:
        socks = [stack.enter_context(closing(sock)) for sock in bind_all(settings.serve)]
        longest_s = settings.serve.room_ttl_s * (1 + EXTENSIONS)
        opening = open_journal(
            journal_url(settings.serve), rooms_kept_s=longest_s, metrics=metrics.journal, etcd=settings.etcd
        )
        journal = await stack.enter_async_context(opening)
        rooms = RoomBook(settings.serve.max_rooms, settings.serve.room_ttl_s)
        registrar = Registrar(
            Registry(settings.limits), rooms, journal, metrics, time.monotonic, first_epoch=_new_era()
        )
        kept = await registrar.restore()
        instance = instance_at(socks, settings.serve)
        plain = sglang.Plain(registrar, instance)
        others = OtherWires.open(settings, journal, kept.notes, metrics)
        news = native.broadcast(registrar, metrics, settings.watch, others.engines)
        others.tell(registrar, news)
        ours = native.router(registrar, news, others.engines)
        links = Links.open(settings, Asking(), metrics, native.refusing(registrar))
        url = journal_url(settings.serve)
        shared = journal if isinstance(journal, Shared) else None
        looking = Looking.open(settings, registrar, news, others.engines, links, metrics, url, shared=shared)
        shown = [looking.router, page.router()]
        routers = [plain.router(), *others.routers(registrar, instance), ours, links.router, *shown]
        inner = sglang.in_front(plain, server.app(routers, metrics, unready=registrar.unready))
        admission, lookout = Admission(settings.admission), looking.lookout
        admitted = Turnstile(looking.in_front(inner), admission, time.monotonic, metrics, lookout.put_off)
        service = admitted if shared is None else Dated(admitted, lambda: registrar.copy_age_s)
        spans = await stack.enter_async_context(open_tracing(settings.trace, role="registry"))
        witness = _witness(settings.witness, registrar, metrics)
        http = door.services(traced(service, spans), socks, settings.serve.grace_s, lookout.denied)
        loops = {
            "listening": registrar.listen(),
            "news": news.run(),
            "keys": others.watch(),
            "vllm": others.roster.watch(),
            **looking.loops,
        }
        others_asked = {"witness": witness, "drains": _drains(settings.drain, registrar)}
        async with beside(**http, **loops, **links.loops, **others_asked, sweep=registrar.sweep()):
            for sock in socks:
                server.listen(sock)  # last: see `server.bind`
            if shared is not None and (own := await own_url(door.scheme, server.bound(socks[0]), url, settings.etcd)):
                shared.announce(own)
            urls = [f"http://{server.bound(sock)}" for sock in socks[1:]]
            names = (each.name for each in settings.serve.listeners())
            yield Sidecar(f"{door.scheme}://{server.bound(socks[0])}", registrar, tuple(zip(names, urls, strict=True)))


def _new_era() -> int:
    """Its first epoch; what comes of it stays below 2 ** 53, where JSON's numbers are whole for everybody."""
    return ERA * SystemRandom().randrange(1, 1 << 20)


async def _witness(policy: WitnessPolicy, registrar: Registrar, metrics: Metrics) -> None:
    """Watch the ranks without a lease until cancelled; idle where nobody has said how they are to be asked."""
    if not policy.enabled:
        await asyncio.Event().wait()

    async def tell(said: Verdict) -> None:
        await registrar.witnessed(said.instance, said.seat, said.epoch, said.alive, said.why)

    def watched() -> Iterator[Life]:
        return (life for view in registrar.views() for life in view.under_witness)

    async with asking(policy) as ask:
        table = WitnessTable(policy, SystemRandom().random)
        witness = Witness(table, watched, tell, ask, clock=time.monotonic, metrics=metrics)
        registrar.herald.subscribe(witness.lives_changed)
        await witness.run()


async def _drains(policy: DrainPolicy, registrar: Registrar) -> None:
    """End the drains of stock engines that have nothing under way; idle where nobody has said how to ask them."""
    if not policy.loads_url:
        await asyncio.Event().wait()
    async with drainer.asking() as ask:
        drains = drainer.Drainer(policy, registrar.view, registrar.drained, ask, time.monotonic)
        registrar.herald.subscribe(drains.lives_changed)
        for view in registrar.views():
            drains.follow(view.name)  # who drained before this process began
        await drains.run()
