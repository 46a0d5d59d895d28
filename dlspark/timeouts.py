"""Timeouts: how long each phase of a run may take before it is ended with an error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from dlspark.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """The bounds of a run's waits, each of them in seconds. The defaults suit anything but very slow steps.

    Attributes:
        launch_seconds: from the launch until every worker has connected to the driver. Also how long a restart waits for
            lost executors to be replaced.
        first_step_seconds: from a worker's connection until its first step has ended: it loads the model, traces, compiles.
        step_seconds: without progress of a worker after that: the next step of training or validation, a callback, a
            checkpoint.
        heartbeat_seconds: without a sign of life of a worker's process. One that is stopped gives none; one that computes,
            however slowly, does. Also how much later than the others a worker may come to a round after the first.
        end_seconds: from the end of the last worker's work until the engine has returned.
        stop_seconds: from a failure until the engine has returned; then its Spark jobs are cancelled.
        interrupt_seconds: from SIGTERM until a checkpoint is written; then the run ends without it.
    """

    launch_seconds: float = 600.0
    first_step_seconds: float = 1800.0
    step_seconds: float = 600.0
    heartbeat_seconds: float = 60.0
    end_seconds: float = 60.0
    stop_seconds: float = 10.0
    interrupt_seconds: float = 15.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(
                    f"timeouts: {field.name} must be a number of seconds above 0; {value!r} came. Every wait has a bound: "
                    "give a large number to wait long."
                )

    @classmethod
    def of(cls, value: Mapping[str, float] | Timeouts | None) -> Timeouts:
        """``value`` as Timeouts: a mapping of names to seconds, Timeouts, or None for the defaults.

        Raises:
            ConfigError: an unknown name (the nearest known one is named), or a value that is no number above 0.
        """
        if value is None or isinstance(value, Timeouts):
            return value or cls()
        if not isinstance(value, Mapping):
            raise ConfigError(f"timeouts must be a dict of seconds by name, or Timeouts; a {type(value).__name__} came.")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in known:
                raise ConfigError(f"There is no timeout {name!r}. {did_you_mean(name, known)}")
        return cls(**value)
