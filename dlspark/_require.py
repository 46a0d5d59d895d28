"""Require what is optional or plain: a package that may be absent, a whole number, one of some values."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from dlspark.errors import ConfigError, MissingDependencyError


def require(module: str, *, install: str, purpose: str) -> ModuleType:
    """Import and return ``module``.

    Args:
        module: dotted name of what to import.
        install: what to give to ``pip install``, for instance ``"dlspark[spark]"``.
        purpose: what needs it, for the message: ``"Reading images with Spark"``.

    Raises:
        MissingDependencyError: it is not installed. An installed package that fails to import raises its own error,
            because "absent" and "broken" have different cures.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # it is there, and something that it needs is not: its own message is the better one
        raise MissingDependencyError(
            f"{purpose} needs {top!r}, which is not installed. Run: pip install '{install}'"
        ) from error


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """``value`` as a Python int, NumPy's too; refuses what is not an integer of at least ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}; {value!r} came.")
    return operator.index(value)


def choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse what is not among ``allowed``."""
    allowed = tuple(allowed)
    if value not in allowed or isinstance(value, bool):
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}; {value!r} came.")
