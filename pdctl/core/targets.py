"""
Where the ranks of a fleet answer `/metrics`, as Prometheus' HTTP service discovery wants to be told.

A rank says in its lease where it answers (`HTTP_KEY` in the metadata). It is believed for its own host only: who may
register could otherwise have Prometheus ask anybody anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pdctl.core.address import Endpoint
from pdctl.core.instances import InstanceView
from pdctl.core.lives import Life
from pdctl.core.naming import HTTP_KEY
from pdctl.errors import BadField


@dataclass(frozen=True, slots=True)
class Target:
    """One rank; `labels` go to everything that is scraped there."""

    address: Endpoint
    scheme: str
    instance: str
    role: str
    seat: str

    @property
    def labels(self) -> dict[str, str]:
        return {
            "__scheme__": self.scheme,
            "pdctl_instance": self.instance,
            "pdctl_role": self.role,
            "pdctl_seat": self.seat,
        }

    def to_body(self) -> dict[str, Any]:
        return {"targets": [str(self.address)], "labels": self.labels}


def targets(views: Iterable[InstanceView]) -> Iterator[Target]:
    """In the order of the views, of both incarnations where one replaces the other."""
    for view in views:
        for incarnation in view.incarnations:
            for seat, life in sorted(incarnation.alive.items()):
                if (found := _answers_at(life)) is not None:
                    scheme, address = found
                    yield Target(address, scheme, view.name, incarnation.role, str(seat))


def _answers_at(life: Life) -> tuple[str, Endpoint] | None:
    said = life.claim.metadata.get(HTTP_KEY)
    if not isinstance(said, str):
        return None
    try:
        url = urlsplit(said)
        address = Endpoint.parse(url.netloc)
    except (BadField, ValueError):
        return None
    if url.scheme not in ("http", "https") or address.host != life.address.host:
        return None
    return url.scheme, address
