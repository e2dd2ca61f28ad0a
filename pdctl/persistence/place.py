"""What a journal's URL means: `memory:`, `sqlite:PATH` or `etcd://HOST:PORT`. Nothing is opened, no store is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pdctl.errors import ConfigError
from pdctl.persistence.etcd_place import ETCD, EtcdPlace

MEMORY: Final = "memory:"
SQLITE: Final = "sqlite:"


def check(url: str) -> None:
    """Raises ConfigError."""
    if url.startswith(ETCD):
        EtcdPlace.parse(url)
    else:
        path_in(url)


def path_in(url: str) -> Path | None:
    """The file that `url` names, None for `memory:`. Raises ConfigError."""
    if url == MEMORY:
        return None
    scheme, path = url[: len(SQLITE)], url[len(SQLITE) :]
    if scheme != SQLITE or not path.strip() or "\0" in path:
        raise ConfigError(
            f"journal is {url!r}: give sqlite:PATH, etcd://HOST:PORT, or memory:, which forgets with the process"
        )
    return Path(path)
