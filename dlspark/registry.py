"""Installed backends, found by entry point."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec

from dlspark._require import Registered
from dlspark.backend import Backend, Engine
from dlspark.errors import ConfigError, MissingDependencyError, did_you_mean

logger = logging.getLogger(__name__)

GROUP = "dlspark.backends"
BACKENDS = Registered(GROUP, "backend")

# This project's plug-ins and the commands that install them, for messages about absent ones; see `install_command`.
PLUGINS: Mapping[str, str] = {
    "mirrored": "pip install './backends/mirrored{spark}'",
    "horovod": "python tools/build_horovod.py && pip install './backends/horovod{spark}'",
    # Elephas itself requires pyspark, which --no-deps keeps out.
    "elephas": "pip install --no-deps elephas==7.3.0 && pip install './backends/elephas{spark}'",
}


def available_backends() -> list[str]:
    """Names of the installed backends, sorted. Nothing is imported."""
    return list(BACKENDS)


def install_command(name: str) -> str:
    """The command that installs this project's plug-in ``name``.

    It brings pyspark only where there is none: a second one would hide the platform's own.
    """
    command = PLUGINS[name].format(spark="" if find_spec("pyspark") else "[spark]")
    return f"{command}   (in a checkout of dlspark)"


def load_backend(name: str) -> type[Backend]:
    """The class of backend ``name``.

    Raises:
        ConfigError: the name is unknown, or two distributions claim it.
        MissingDependencyError: a plug-in of this project is not installed; the message has the command that installs it.
        Exception: the plug-in's own error, unchanged, if its import fails.
    """
    if not isinstance(name, str):
        raise ConfigError(f"Expected the name of a backend, such as 'local'; got {name!r}.")
    if name not in BACKENDS:
        if name in PLUGINS:
            raise MissingDependencyError(f"Backend {name!r} is not installed. Run: {install_command(name)}")
        raise ConfigError(f"Unknown backend {name!r}. {did_you_mean(name, {*BACKENDS, *PLUGINS})}")
    backend = BACKENDS[name]
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise ConfigError(
            f"Expected the entry point of backend {name!r} to be a subclass of dlspark's Backend; got {backend!r}."
        )
    return backend


def installed_engines() -> dict[str, Engine]:
    """The engine of each installed backend, by the backend's name. Backends that cannot be imported are left out."""
    found = {}
    for name in available_backends():
        try:
            found[name] = load_backend(name).engine
        except Exception as error:  # a plug-in's own; `dlspark backends` reports it
            logger.debug("Backend %r cannot be imported: %s", name, error)
    return found
