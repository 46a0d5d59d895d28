"""Import what is optional where it is used; say how to get it when it is absent."""

from __future__ import annotations

import importlib
from types import ModuleType

from dlspark.errors import MissingDependencyError


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
