"""
How ranks hold their place in a registry: by a lease, and where there are none, as each role can.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial

import structlog

from pdctl.client import RegistryClient
from pdctl.config import Settings
from pdctl.lease import Lease, LeaseTerms, NoLeases

log = structlog.get_logger(__name__)


async def hold_prefill(client: RegistryClient, lease: Lease, terms: LeaseTerms, settings: Settings) -> None:
    """Hold a lease until cancelled; at a registry that has none, announce on SGLang's wire again and again."""
    try:
        await lease.hold()
    except NoLeases as told:
        log.info("registry has no leases, announcing on the plain paths", registry=client.url, answered=str(told))
    await client.hold(terms.announcement, settings.node.announce_every_s, settings.node.exhaustion)


@dataclass(frozen=True, slots=True)
class Listed:
    """A decode's place in a registry. `alone` is set where it holds no leases, which keeps no decode from serving."""

    client: RegistryClient
    settings: Settings
    alone: asyncio.Event = field(default_factory=asyncio.Event)

    def unready(self) -> list[str]:
        done = self.client.registered or self.alone.is_set()
        return [] if done else [f"not registered at {self.client.url}"]

    async def hold(self, lease: Lease) -> None:
        """Hold a lease until cancelled.

        Never on SGLang's wire: it knows no roles, and other decodes would take this one for a prefill.
        """
        try:
            await lease.hold()
        except NoLeases as told:
            registry = self.client.url
            log.warning("registry has no leases, this decode is not listed", registry=registry, answered=str(told))
        self.alone.set()
        await asyncio.Event().wait()


def lease_of(client: RegistryClient, terms: LeaseTerms, settings: Settings) -> Lease:
    insist = partial(client.insist, terms.announcement, exhaustion=settings.node.exhaustion)
    return Lease(client.tell, insist, terms, settings.retry)


async def register(settings: Settings) -> None:
    """Register one rank for an engine that cannot; with `hold`, hold its lease until cancelled.

    Without it nobody stays to renew, and no lease is asked for. Raises as RegistryClient.register, and Superseded.
    """
    given, how = settings.rank, settings.node
    announcement = given.announcement()
    async with RegistryClient(how.registry, policy=settings.retry, credentials=settings.client) as client:
        if given.hold:
            terms = LeaseTerms(how.instance, announcement, how.ttl_s)
            await hold_prefill(client, lease_of(client, terms, settings), terms, settings)
        try:
            await lease_of(client, LeaseTerms(how.instance, announcement, None), settings).take()
        except NoLeases:
            await client.register(announcement, how.exhaustion)
