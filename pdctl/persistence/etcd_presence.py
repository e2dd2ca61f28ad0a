"""
Which registries serve over one etcd, and where: PREFIX/replicas/WRITER, under a lease that each keeps alive itself.

One write when a registry begins to serve, none afterwards. A registry that ends takes its key along; of one that was
killed it is gone after LEASE_S. Nothing of the journal depends on it: no group, no order, no epoch.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Final, NoReturn

from pdctl.errors import Unreachable
from pdctl.persistence.etcd_leases import AGAIN
from pdctl.persistence.etcd_place import EtcdPlace
from pdctl.persistence.etcd_wire import Etcd, KeyValue, Put
from pdctl.retry import retrying

LEASE_S: Final = 10
RENEW_S: Final = 3.0
GOODBYE_S: Final = 1.0
MAX_URL: Final = 512


class Presence:
    """Fed by the journal's listing and watch; `run` speaks to etcd."""

    def __init__(self, etcd: Etcd, place: EtcdPlace, writer: str) -> None:
        self._etcd = etcd
        self._place = place
        self._writer = writer
        self._urls: dict[str, str] = {}
        self._own: str | None = None
        self._wanted = asyncio.Event()

    @property
    def others(self) -> Mapping[str, str]:
        """URLs by writer."""
        return {writer: url for writer, url in self._urls.items() if writer != self._writer}

    def announce(self, url: str) -> None:
        self._own = url
        self._wanted.set()

    def take_listing(self, keys: Iterable[KeyValue]) -> None:
        """All that there are."""
        self._urls = {}
        for found in keys:
            self.take_event(found)

    def take_event(self, event: KeyValue) -> None:
        writer = self._place.name(event.key).removeprefix("replicas/")
        url = None if event.value is None else _url(event.value)
        if url is None:
            self._urls.pop(writer, None)
        else:
            self._urls[writer] = url

    async def run(self) -> NoReturn:
        """Be known, once it was announced; until cancelled."""
        await self._wanted.wait()
        while True:
            await retrying(AGAIN, self._stay, keep_trying=True)

    async def _stay(self) -> None:
        """Until the lease is lost, as by a wiped disk."""
        lease = await self._etcd.grant(LEASE_S)
        try:
            value = json.dumps({"url": self._own}).encode()
            await self._etcd.commit([Put(self._place.key(f"replicas/{self._writer}"), value, lease)])
            async with self._etcd.keep_alive() as stream:
                while True:
                    await stream.renew(lease)
                    _, left_s = await stream.answer()
                    if not left_s:
                        return
                    await asyncio.sleep(RENEW_S)
        except asyncio.CancelledError:
            with suppress(Unreachable, TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await self._etcd.revoke(lease)
            raise


def _url(value: bytes) -> str | None:
    """None for what a later version may write there."""
    try:
        url = json.loads(value)["url"]
    except (ValueError, KeyError, TypeError):
        return None
    return url if isinstance(url, str) and url.startswith(("http://", "https://")) and len(url) <= MAX_URL else None
