"""Pace: the clock of turns, as a Keras callback."""

from __future__ import annotations

from typing import Any

import keras

from dlspark_bench.turns import Clock


class Pace(keras.callbacks.Callback):
    """Takes the turns of a `Clock` inside Keras' ``fit``."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._clock.epoch_begins(epoch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch in (0, (self.params or {}).get("steps", 0) - 1) and logs:
            float(logs["loss"])  # wait for the step: frameworks return before it is computed
        self._clock.step_ended()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._clock.epoch_ended(epoch, logs or {})

    def on_train_end(self, logs: Any = None) -> None:
        self._clock.training_ended()
