"""
Which journal a registry has when nobody says so, and how all of one goes to another.

Opens journals; what they promise stands in `persistence.base`.
"""

from __future__ import annotations

from pdctl import config
from pdctl.config import Settings
from pdctl.core.rooms import EXTENSIONS
from pdctl.errors import ConfigError
from pdctl.persistence.copying import Copied, copy
from pdctl.persistence.open import open_journal
from pdctl.persistence.place import MEMORY, SQLITE, path_in
from pdctl.sections import ServeSettings


def journal_url(serve: ServeSettings) -> str:
    """What was said; else what `ServeSettings` says of that, and the directory is made, as nobody else will."""
    if serve.journal or not serve.port:
        return serve.journal or MEMORY
    directory = config.state_dir(config.environment())
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"no journal was given, and the directory for one cannot be made ({error}): give --journal sqlite:PATH, "
            "or --journal memory:, which forgets with the process"
        ) from error
    return f"{SQLITE}{directory / f'registry-{serve.port}.journal'}"


async def copy_journal(settings: Settings, source: str, target: str) -> Copied:
    """All that the journal at `source` keeps, to `target`. Raises ConfigError, JournalUnusable, JournalUnavailable."""
    if MEMORY in (source, target):
        raise ConfigError("a journal in memory ends with its process: give sqlite:PATH or etcd://HOST:PORT")
    longest_s = settings.serve.room_ttl_s * (1 + EXTENSIONS)
    path = path_in(source) if source.startswith(SQLITE) else None
    if path is not None and not path.exists():
        raise ConfigError(f"there is no journal {path}: give the one that the registry served from")
    async with (
        open_journal(source, rooms_kept_s=longest_s, etcd=settings.etcd) as kept,
        open_journal(target, rooms_kept_s=longest_s, etcd=settings.etcd) as empty,
    ):
        return await copy(kept, empty)
