"""
What every setting in seconds has to be: finite and above 0.

Reads dataclasses whose fields carry their unit in the name (`..._s`) and holds no bound of its own: who needs at most,
or at least, says so itself. NaN is the reason to have this in one place: it fails no comparison with `<=`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from pdctl.errors import ConfigError


def check_seconds(policy: Any, of: str, *, or_zero: Collection[str] = ()) -> None:
    """Raise ConfigError for a field of the dataclass `policy` that ends in `_s` and is no number of seconds above 0.

    None, where a field may be that, says "no bound". `or_zero` names fields that may be 0; `of`, in the sentence, is
    what the policy is of.
    """
    for field in fields(policy):
        value = getattr(policy, field.name)
        if not field.name.endswith("_s") or value is None or (field.name in or_zero and value == 0):
            continue
        if not (math.isfinite(value) and value > 0):
            least = "0 or more seconds" if field.name in or_zero else "a number of seconds above 0"
            raise ConfigError(f"{of} {field.name} is {value}: give {least}")
