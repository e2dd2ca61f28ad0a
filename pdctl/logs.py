"""
One line an event: key=value for people, JSON for machines; the rank stands in every line that has one.

Shells call `structlog.get_logger(__name__)` and bind nothing; whoever opens a rank does it within `rank_bound`, and
every task born there inherits it. What libraries say through `logging` (uvicorn, asyncio) leaves in the same shape.
"""

from __future__ import annotations

import logging
import math
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

from pdctl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LogSettings:
    """`format`: "kv" (key=value) or "json"; `level`: the least level that is printed.

    `rooms_a_second`: lines of rooms that succeed, at most, in a rank; the next line says how many had none. A line
    costs 50 us, a twentieth of a room; rooms that fail have theirs always. 0: none.
    """

    format: Literal["kv", "json"] = "kv"
    level: Literal["debug", "info", "warning", "error"] = "info"
    rooms_a_second: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.rooms_a_second < math.inf:
            raise ConfigError(f"log rooms_a_second is {self.rooms_a_second}: give a number from 0")


def configure(settings: LogSettings, stream: TextIO = sys.stderr) -> None:
    """Route structlog and `logging` to `stream`, one line an event. Called once, by the command line."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.processors.UnicodeDecoder(),
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(settings)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())


def rank_bound(rank: str, **more: Any) -> AbstractContextManager[None]:
    """Put `rank`, and what else tells it from its siblings, into every line of the block and of tasks born in it."""
    return structlog.contextvars.bound_contextvars(rank=rank, **more)


def _renderer(settings: LogSettings) -> Processor:
    if settings.format == "json":
        return structlog.processors.JSONRenderer()
    return structlog.processors.LogfmtRenderer(
        key_order=["timestamp", "level", "event", "rank"], drop_missing=True, bool_as_flag=False
    )
