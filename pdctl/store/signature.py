"""
What a wheel's `setup` takes, read from its own signature and never guessed from an exception's text.

A pybind function has no Python signature; its docstring states one for each overload. A class in Python (a stand-in, a
wrapper) has a real one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

_OVERLOAD = re.compile(r"^(?:\d+\. )?\w+\((.*)\) -> ", re.MULTILINE)
_NAMED = re.compile(r"(\w+): ")
_NESTED = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|'[^']*'")


def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The names that may be passed to `function`; empty where neither signature nor docstring tells."""
    try:
        found = frozenset(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        found = frozenset()
    if found and found != {"args", "kwargs"}:
        return found - {"self"}
    return _from_docstring(inspect.getdoc(function) or "")


def _from_docstring(text: str) -> frozenset[str]:
    """Of the overload with the most names: the others take one dictionary."""
    overloads = [frozenset(_NAMED.findall(_flat(arguments))) - {"self"} for arguments in _OVERLOAD.findall(text)]
    return max(overloads, key=len, default=frozenset())


def _flat(arguments: str) -> str:
    """Without what stands inside brackets and quotes, where colons mean something else."""
    while (less := _NESTED.sub("", arguments)) != arguments:
        arguments = less
    return arguments
