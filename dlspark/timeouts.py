"""Timeouts: how long each phase of a run may take before the run fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from dlspark._require import number
from dlspark.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """The limits of a run's waits, in seconds. The defaults suit all but very slow steps.

    Attributes:
        launch_seconds: from the launch until every worker has connected to the driver. A restart waits as long for lost
            executors to be replaced.
        first_step_seconds: from a worker's connection to the end of its first step, which includes loading, tracing and
            compiling the model.
        step_seconds: the longest time that a worker may make no progress after its first step. A step of training or
            validation, a callback and a checkpoint are progress.
        heartbeat_seconds: the longest time without a heartbeat of a worker's process. A stopped process sends none; a slow
            one does. Also the longest delay of a worker behind the others in any round after the first.
        end_seconds: from the end of the last worker's work until the engine returns.
        stop_seconds: from a failure until the engine returns. After it, the engine's Spark jobs are cancelled.
        interrupt_seconds: from SIGTERM until a checkpoint is saved. If saving takes longer, the run ends without a
            checkpoint.
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
            number(
                f"the timeout {field.name}",
                getattr(self, field.name),
                "as a number of seconds above 0",
                lambda seconds: seconds > 0,
                "Every wait has a bound: give a large number to wait long.",
            )

    @classmethod
    def of(cls, value: Mapping[str, float] | Timeouts | None) -> Timeouts:
        """Timeouts from a mapping of names to seconds, Timeouts, or None for the defaults.

        Raises:
            ConfigError: an unknown name, or a value that is not a number above 0.
        """
        if value is None or isinstance(value, Timeouts):
            return value or cls()
        if not isinstance(value, Mapping):
            raise ConfigError(f"Expected timeouts as a dict of seconds by name, or Timeouts; got a {type(value).__name__}.")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in known:
                raise ConfigError(f"There is no timeout {name!r}. {did_you_mean(name, known)}")
        return cls(**value)
