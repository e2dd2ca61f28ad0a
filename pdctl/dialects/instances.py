"""
For which instance a plain request speaks: the two things that `core.naming` looks at, taken from the request.

A room has no instance: it is known by its number alone, whichever name it was announced at. Numbers are drawn from
2**63, and a decode that asks at another name than its prefill announced at finds it all the same.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import Scope

from pdctl.core.access import plain_host
from pdctl.core.naming import DEFAULT, Names


def instance_of(names: Names) -> Callable[[Scope], str]:
    """Asked for every request on a plain path."""
    if names.says_nothing:
        return lambda _: DEFAULT

    def named(scope: Scope) -> str:
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        return names.of(_local(scope), host)

    return named


def _local(scope: Scope) -> tuple[str, int] | None:
    """Where the connection came in."""
    here = scope.get("server")
    return (plain_host(here[0]), here[1]) if here and here[1] is not None else None
