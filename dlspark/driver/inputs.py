"""The caller's model, callbacks and data, written to the store for the workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dlspark.data import ShardedRows, write_rows
from dlspark.driver import array_checks, checks, dataframe_checks
from dlspark.errors import ConfigError
from dlspark.storage import Store


def take_model(model_or_builder: Any, seed: int) -> tuple[Callable[[], Any] | None, Any]:
    """Return the builder (None if a model was given) and the compiled model, which a builder builds here once."""
    import keras

    builder: Callable[[], Any] | None = None
    model = model_or_builder
    if not isinstance(model, keras.Model):
        if not callable(model):
            raise ConfigError(
                f"Expected a compiled Keras model or a function that builds one; got a {type(model).__name__}."
            )
        builder = model
        keras.utils.set_random_seed(seed)
        model = model()
        if not isinstance(model, keras.Model):
            raise ConfigError(f"Expected the builder to return a compiled Keras model; got a {type(model).__name__}.")
    if not model.compiled or model.optimizer is None:
        raise ConfigError(
            "Expected a compiled model; got one without an optimizer. Call model.compile(optimizer=…, loss=…) before fit."
        )
    return builder, model


def as_rows(name: str, data: Any, store: Store, part: str, model: Any, *, batch_size: int, num_workers: int) -> ShardedRows:
    """``data``, which `checks.rows` has passed, as shards: as they are, or written to the store as ``part``.

    Raises:
        ConfigError, DataError: a DataFrame's rows do not fit; they are checked when its executors have written them.
    """
    if isinstance(data, ShardedRows):
        return data
    if not array_checks.is_dataframe(data):
        import keras

        # Keras' own fit casts all arrays of floats to floatx, and a custom train_step may rely on it.
        floatx = keras.backend.floatx()
        return write_rows(store.child("data"), part, *data, float_dtype=None if floatx == "bfloat16" else floatx)
    from dlspark.spark import write_dataframe

    *features, label = data.columns
    dataframe_checks.labels(name, data, model)
    columns = features[0] if len(features) == 1 else features
    rows = write_dataframe(store.child("data"), part, data, features=columns, label=label)
    checks.rows(name, rows, model, batch_size, num_workers)
    return rows
