"""The time that a rank's own part of all steps takes, without its waits for other ranks."""

from __future__ import annotations

from typing import Any


class OwnTime:
    """A clock in TensorFlow's graph, which runs between tensors of a step. Under other frameworks it stands at 0."""

    def __init__(self) -> None:
        self._started: Any = None
        self._seconds: Any = None  # a TensorFlow variable

    def start(self, after: list[Any]) -> None:
        """Start after ``after`` was computed."""
        self._started = _now(after)

    def stop(self, after: list[Any]) -> None:
        """Stop after ``after`` was computed."""
        now = _now(after)
        if now is None:
            return
        import tensorflow as tf

        if self._seconds is None:
            with tf.init_scope():
                self._seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        self._seconds.assign_add(now - self._started)

    def seconds(self) -> float:
        """The total so far."""
        return 0.0 if self._seconds is None else float(self._seconds.numpy())


def _now(after: list[Any]) -> Any:
    import keras

    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    with tf.control_dependencies(after):
        return tf.timestamp()
