"""Check what a caller gives or has installed: packages, their versions, entry points, numbers, choices."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from importlib import metadata
from numbers import Integral, Real
from types import ModuleType
from typing import Any

from dlspark.errors import ConfigError, MissingDependencyError, did_you_mean, nearest

DISTRIBUTION = "dlspark-keras"
"""What pip installs; `dlspark` on PyPI is another project."""


def extra(name: str) -> str:
    """What ``pip install`` takes for one of this project's extras."""
    return f"{DISTRIBUTION}[{name}]"


def require(module: str, *, install: str, purpose: str) -> ModuleType:
    """Import and return ``module``.

    Args:
        module: dotted name of the module.
        install: the argument of ``pip install``, for instance ``extra("spark")``.
        purpose: who needs it, for the message: ``"Reading images with Spark"``.

    Raises:
        MissingDependencyError: the package is not installed. An installed package that fails to import raises its own
            error, because "absent" and "broken" have different cures.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the package is installed, and one of its own dependencies is not
        raise MissingDependencyError(
            f"{purpose} needs {top!r}, which is not installed. Run: pip install '{install}'"
        ) from error


def installed_version(name: str) -> str | None:
    """The version of the distribution ``name``; None if it is not installed. "dlspark" is this project, `DISTRIBUTION`."""
    try:
        return metadata.version(DISTRIBUTION if name == "dlspark" else name)
    except metadata.PackageNotFoundError:
        return None


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions by name of those distributions that are installed."""
    return {name: found for name in names if (found := installed_version(name)) is not None}


class Registered(Mapping[str, Any]):
    """The objects that installed distributions register under a group of entry points, by name.

    Listing the names imports nothing; an object is imported when it is looked up.

    Args:
        group: the group of entry points, such as ``"dlspark.layouts"``.
        kind: what the objects are, for messages: ``"layout"``.
    """

    def __init__(self, group: str, kind: str) -> None:
        self.group = group
        self.kind = kind

    def points(self, **selected: Any) -> dict[str, metadata.EntryPoint]:
        """The entry points by name, sorted; with ``name`` or ``value``, only those of that name or value.

        Raises:
            ConfigError: two distributions register different objects under one of these names.
        """
        found: dict[str, metadata.EntryPoint] = {}
        for point in sorted(metadata.entry_points(group=self.group, **selected), key=lambda point: point.name):
            other = found.setdefault(point.name, point)
            if other.value != point.value:
                raise ConfigError(
                    f"Two installed distributions claim the {self.kind} name {point.name!r}: {other.value} and "
                    f"{point.value}. Uninstall one of them."
                )
        return found

    def find(self, name: str, advice: str = "") -> Any:
        """The object called ``name``.

        Raises:
            ConfigError: an unknown name; the message lists the known ones and ends with ``advice``.
            Exception: the import fails: the module's own error.
        """
        if name not in self:
            raise ConfigError(f"Unknown {self.kind} {name!r}. {did_you_mean(name, self)} {advice}".rstrip())
        return self[name]

    def __getitem__(self, name: str) -> Any:
        return self.points(name=name)[name].load()

    def __contains__(self, name: object) -> bool:
        return name in self.points(name=name)

    def __iter__(self) -> Iterator[str]:
        # Without the check of `points`: the command line lists names, and must not fail because of two layouts.
        return iter(sorted({point.name for point in metadata.entry_points(group=self.group)}))

    def __len__(self) -> int:
        return len(list(iter(self)))


LAYOUTS = Registered("dlspark.layouts", "layout")  # here, because importing dlspark.images imports NumPy


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """``value`` as a Python int; NumPy integers are accepted.

    Raises:
        ConfigError: not an integer, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"Expected {name} as a whole number of at least {least}; got {value!r}.")
    return int(value)


def number(name: str, value: Any, expected: str, accept: Callable[[float], bool], advice: str = "") -> float:
    """``value`` as a finite Python float; integers and NumPy's numbers are accepted.

    Args:
        name: what the number is.
        value: the number.
        expected: what it must be: ``"as a number above 0"``.
        accept: whether a finite number is in that range.
        advice: the end of the message.

    Raises:
        ConfigError: not a number, not finite, or out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not accept(float(value)):
        raise ConfigError(f"Expected {name} {expected}; got {value!r}. {advice}".rstrip())
    return float(value)


def known(what: str, name: str, names: Collection[str]) -> None:
    """Check that ``name`` is one of ``names``.

    Raises:
        ConfigError: it is not; the message says ``what`` is expected, names the nearest and lists all.
    """
    if name not in names:
        raise ConfigError(f"Expected {what}; got {name!r}. {did_you_mean(name, names)}")


def choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Check that ``value`` is one of ``allowed``.

    Raises:
        ConfigError: it is not; the message lists them.
    """
    allowed = tuple(allowed)
    if isinstance(value, bool) or not isinstance(value, Hashable) or value not in allowed:
        hint = nearest(value, filter(lambda each: isinstance(each, str), allowed)) if isinstance(value, str) else ""
        raise ConfigError(f"Expected {name} as one of {', '.join(map(repr, allowed))}; got {value!r}. {hint}".rstrip())
