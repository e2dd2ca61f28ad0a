"""
The wheel's store class, with the environment that it reads set before it is imported. Nothing is called on it here.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any, Final

from pdctl.engine import wheel
from pdctl.engine.environment import prepare_store
from pdctl.errors import EngineUnavailable

MODULE: Final = "mooncake.store"


def store_class(
    protocol: str,
    *,
    importer: Callable[[str], ModuleType] = importlib.import_module,
    environ: MutableMapping[str, str] | None = None,
) -> Callable[[], Any]:
    """What makes a store object. Raises EngineUnavailable naming what to install, ConfigError for a variable."""
    prepare_store(protocol, os.environ if environ is None else environ, MODULE in sys.modules)
    try:
        module = importer(MODULE)
    except ImportError as cause:
        raise EngineUnavailable(wheel.remedy(str(cause))) from cause
    wheel.silence(module)
    return module.MooncakeDistributedStore  # type: ignore[no-any-return]


def environment() -> MutableMapping[str, str]:
    """What the wheel reads at every set-up."""
    return os.environ
