"""What goes from the caller's model and data to the workers, and what comes back into the model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle

from dlspark.data import ShardedRows
from dlspark.driver import checks
from dlspark.errors import ConfigError, DataError
from dlspark.job import MODEL_FILE, Payload
from dlspark.storage import Store

logger = logging.getLogger(__name__)


def take_model(model_or_builder: Any, seed: int) -> tuple[Callable[[], Any] | None, Any]:
    """(builder or None, compiled model)."""
    import keras

    builder: Callable[[], Any] | None = None
    model = model_or_builder
    if not isinstance(model, keras.Model):
        if not callable(model):
            raise ConfigError(
                f"fit needs a compiled Keras model or a function that builds one; a {type(model).__name__} came."
            )
        builder = model
        keras.utils.set_random_seed(seed)
        model = model()
        if not isinstance(model, keras.Model):
            raise ConfigError(f"The builder must return a compiled Keras model; it returned a {type(model).__name__}.")
    if not model.compiled or model.optimizer is None:
        raise ConfigError("The model is not compiled. Call model.compile(optimizer=…, loss=…) before fit.")
    return builder, model


def pickled_payload(builder: Callable[[], Any] | None, callbacks: Sequence[Any]) -> bytes:
    """What only Python can carry to the workers, pickled by value and together, so that callbacks may share objects.

    Raises:
        ConfigError: something cannot be pickled; the message names it.
    """
    import keras

    payload = Payload(tuple(callbacks), builder, dict(keras.saving.get_custom_objects()))
    try:
        return cloudpickle.dumps(payload)
    except Exception as error:  # pickling runs the object's own code: anything may be raised
        parts = [("The builder", builder), *((f"Callback {type(c).__name__}", c) for c in callbacks)]
        name = next((name for name, part in parts if not _pickles(part)), "A registered custom object")
        raise ConfigError(
            f"{name} cannot be sent to workers: {type(error).__name__}: {error}. Keep locks, files, sessions and "
            "models out of it; open them where it runs (in on_train_begin, or inside the builder)."
        ) from error


def _pickles(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:  # as above; the first error of all is the one that is raised
        return False
    return True


def save_model(store: Store, model: Any) -> None:
    """Put the model into the store as workers load it.

    Raises:
        ConfigError: they could not: it has Lambda layers, or classes that are not registered.
    """
    import keras

    with store.open_writer(MODEL_FILE) as path:
        model.save(path)
        # Classes of the user's own may be unregistered, and Lambda layers are refused: better said here than by a worker.
        if any(not type(layer).__module__.startswith("keras.") for layer in [model, *model.layers]) or any(
            isinstance(layer, keras.layers.Lambda) for layer in model.layers
        ):
            try:
                with warnings.catch_warnings():  # the file may hold no state of the optimizer: it need not
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
    if isinstance(data, tuple | list):
        from dlspark.data import write_rows

        return write_rows(store.child("data"), part, *data)
    if checks.is_dataframe(data):
        from dlspark.spark import write_dataframe

        *features, label = data.columns
        if not features:
            raise DataError(f"{name} needs feature columns and, last, the label column; it has only {data.columns}.")
        checks.dataframe_labels(name, data, model)
        columns = features[0] if len(features) == 1 else features
        rows = write_dataframe(store.child("data"), part, data, features=columns, label=label)
        checks.rows(name, rows, model, batch_size, num_workers)
        return rows
    raise DataError(
        f"{name} must be a part of an ImageDataset, a tuple (x, y) of NumPy arrays or a Spark DataFrame; "
        f"a {type(data).__name__} came."
    )
