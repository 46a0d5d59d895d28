"""Installed backends, found by entry point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from dlspark.backend import Backend
from dlspark.errors import ConfigError, MissingDependencyError, did_you_mean

GROUP = "dlspark.backends"

# This project's plug-ins and the commands that install them, for messages about absent ones.
PLUGINS: Mapping[str, str] = {
    "mirrored": "pip install ./backends/mirrored   (in a checkout of dlspark)",
    "horovod": "python tools/build_horovod.py && pip install ./backends/horovod   (in a checkout; needs a C++ compiler)",
    "elephas": "pip install ./backends/elephas   (in a checkout of dlspark)",
}


def available_backends() -> list[str]:
    """Names of the installed backends, sorted. Nothing is imported."""
    return sorted(_entry_points())


def load_backend(name: str) -> type[Backend]:
    """The class of backend ``name``.

    Raises:
        ConfigError: the name is unknown, or two distributions claim it.
        MissingDependencyError: a plug-in of this project is not installed; the message has the command that installs it.
        Exception: the plug-in's own error, unchanged, if its import fails.
    """
    points = _entry_points()
    if name not in points:
        if name in PLUGINS:
            raise MissingDependencyError(f"Backend {name!r} is not installed. Run: {PLUGINS[name]}")
        raise ConfigError(f"Unknown backend {name!r}. {did_you_mean(str(name), {*points, *PLUGINS})}")
    backend = points[name].load()
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise ConfigError(
            f"Expected the entry point of backend {name!r} to be a subclass of dlspark's Backend; got {backend!r}."
        )
    return backend


def _entry_points() -> dict[str, metadata.EntryPoint]:
    found: dict[str, metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise ConfigError(
                f"Two installed distributions claim the backend name {point.name!r}: {other.value} and {point.value}. "
                "Uninstall one of them."
            )
    return found
