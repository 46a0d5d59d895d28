"""The caller's model, callbacks and data, written to the store for the workers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle

from dlspark.data import ShardedRows, check_distinct, write_rows
from dlspark.driver import checks
from dlspark.errors import ConfigError, DataError
from dlspark.job import MODEL_FILE, Payload
from dlspark.storage import Store

logger = logging.getLogger(__name__)


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


def pickled_payload(builder: Callable[[], Any] | None, callbacks: Sequence[Any]) -> bytes:
    """Pickle builder, callbacks and custom objects by value; together, so that they may share objects.

    Raises:
        ConfigError: one of them cannot be pickled; the message names it.
    """
    import keras

    payload = Payload(tuple(callbacks), builder, dict(keras.saving.get_custom_objects()))
    try:
        return cloudpickle.dumps(payload)
    except Exception as error:  # pickling runs the object's own code: anything may be raised
        parts = [("The builder", builder), *((f"Callback {type(c).__name__}", c) for c in callbacks)]
        name = next((name for name, part in parts if not _pickles(part)), "A registered custom object")
        raise ConfigError(
            f"{name} cannot be sent to workers: {type(error).__name__}: {error}. Do not store locks, files, sessions or "
            "models in it; open them where it runs (in on_train_begin, or inside the builder)."
        ) from error


def _pickles(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:  # as above; the first error of all is the one that is raised
        return False
    return True


def save_model(store: Store, model: Any) -> None:
    """Save the model to the store, from which workers load it.

    Raises:
        ConfigError: workers could not load it, because it has Lambda layers or classes that are not registered.
    """
    import keras

    with store.open_writer(MODEL_FILE) as path:
        model.save(path)
        # The user's own classes may be unregistered, and Lambda layers are refused. Find out here, not on a worker.
        if any(not type(layer).__module__.startswith("keras.") for layer in [model, *model.layers]) or any(
            isinstance(layer, keras.layers.Lambda) for layer in model.layers
        ):
            try:
                with warnings.catch_warnings():  # the file need not hold the optimizer's state
                    warnings.filterwarnings("ignore", message="Skipping variable loading for optimizer")
                    keras.saving.load_model(path, safe_mode=True)
            except Exception as error:  # Keras raises many kinds here
                raise ConfigError(
                    f"The model cannot be sent to workers as a .keras file: {error} Register its classes with "
                    "keras.saving.register_keras_serializable, or give fit a function that builds and compiles the model."
                ) from error


def as_rows(name: str, data: Any, store: Store, part: str, model: Any, *, batch_size: int, num_workers: int) -> ShardedRows:
    """``data``, which `checks.rows` has passed, as shards: as they are, or written to the store as ``part``.

    Raises:
        ConfigError, DataError: a DataFrame's rows do not fit; they are checked when its executors have written them.
    """
    if isinstance(data, ShardedRows):
        return data
    if not checks.is_dataframe(data):
        return write_rows(store.child("data"), part, *data)
    from dlspark.spark import write_dataframe

    check_distinct(data, name)
    *features, label = data.columns
    if not features:
        raise DataError(f"Expected feature columns in {name} and the label column last; got {data.columns}.")
    checks.dataframe_labels(name, data, model)
    columns = features[0] if len(features) == 1 else features
    rows = write_dataframe(store.child("data"), part, data, features=columns, label=label)
    checks.rows(name, rows, model, batch_size, num_workers)
    return rows
