"""Checks of the arguments of Trainer.fit, before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlspark._require import whole_number
from dlspark.data import ShardedRows, fewest_rows, num_steps, quoted
from dlspark.errors import ConfigError, DataError
from dlspark.mends.keras_batch_norm import has_own_moments, synchronized_layers


def callbacks(values: Sequence[Any], num_workers: int) -> None:
    """Reject values that are not Keras callbacks, and BackupAndRestore, with which ranks would start at different epochs."""
    import keras

    if not isinstance(values, list | tuple):
        raise ConfigError(f"Expected callbacks as a list of Keras callbacks; got a {type(values).__name__}.")
    for value in values:
        if not isinstance(value, keras.callbacks.Callback):
            raise ConfigError(f"Expected Keras callbacks; got a {type(value).__name__}.")
        if num_workers > 1 and isinstance(value, keras.callbacks.BackupAndRestore):
            raise ConfigError(
                "BackupAndRestore restores one process only; the workers' epochs would differ. Remove it and give "
                "Trainer a store."
            )


def is_dataframe(data: Any) -> bool:
    """Whether ``data`` is a Spark DataFrame, classic or Connect. Does not import pyspark."""
    return any(cls.__name__ == "DataFrame" and cls.__module__.startswith("pyspark.sql") for cls in type(data).__mro__)


def rows(name: str, data: Any, model: Any, batch_size: int, num_workers: int) -> None:
    """Reject data that is empty, does not fit the model, has labels outside its classes or too few rows per worker."""
    if is_dataframe(data):
        return  # checked when its executors have written and counted its rows
    import keras

    if isinstance(data, ShardedRows):
        count, classes = data.rows, data.num_classes
        units = _classes_of(model)
        if classes is not None and units is not None and classes > units:
            raise DataError(
                f"Expected at most {units} classes in {name}, one for each output of the model; got {classes}. "
                f"Give the model {classes} outputs."
            )
        if count:
            with data.open() as reader:
                x, _, _ = keras.utils.unpack_x_y_sample_weight(reader.batch(np.arange(1)))
            _shapes(name, x, model)
    else:
        count = _arrays(name, data, model)
    if count == 0:
        raise DataError(f"Expected at least one row per worker ({num_workers}) in {name}; got none.")
    fewest = fewest_rows(count, batch_size, num_workers)
    if fewest == 0:
        steps = num_steps(count, batch_size)
        raise ConfigError(
            f"Expected at least {num_workers} rows in a step, one for each worker; got {count // steps}: {name} has {count} "
            f"rows in {steps} steps (batch_size {batch_size}). Use a larger batch_size or fewer workers."
        )


def dataframe_labels(name: str, data: Any, model: Any) -> None:
    """Reject class indices outside the model's classes in a DataFrame's last column, by one small Spark job."""
    units, label = _classes_of(model), data.columns[-1]
    if units is None or dict(data.dtypes)[label] not in ("tinyint", "smallint", "int", "bigint", "float", "double"):
        return
    from pyspark.sql import functions as F

    column = F.col(quoted(label))
    low, high = data.agg(F.min(column), F.max(column)).first()
    if low is not None and not 0 <= low <= high < units:
        raise DataError(_outside(name, units, low, high))


def _outside(name: str, units: int, low: Any, high: Any) -> str:
    return (
        f"Expected labels in {name} as class indices from 0 to {units - 1}, as the model has {units} outputs; got labels "
        f"from {low} to {high}."
    )


def batch_norm(model: Any, backend: str, *, synchronous: bool) -> None:
    """Reject ``BatchNormalization(synchronized=True)`` on several workers where it would be ignored.

    Args:
        model: the model.
        backend: the name of the backend.
        synchronous: its workers exchange within every step.
    """
    for layer in synchronized_layers(model):
        if not synchronous:
            raise ConfigError(
                "Expected a backend whose workers exchange within every step, because the model's layer "
                f"{layer.path!r} has synchronized=True; got {backend!r}, which would ignore it. Use 'mirrored' or "
                "'horovod', one worker, or synchronized=False (in build_classifier: batch_norm='train' or 'frozen')."
            )
        if has_own_moments(layer):
            raise ConfigError(
                "Expected Keras' own BatchNormalization where synchronized=True; the model's layer "
                f"{layer.path!r} is a {type(layer).__name__}, which computes its statistics itself, on one worker's rows. "
                "Set synchronized=False, or train with num_workers=1."
            )


def class_weight(value: Mapping[int, float] | None, model: Any) -> None:
    """Reject weights that are not numbers and classes that do not exist."""
    if value is None:
        return
    units = _classes_of(model)
    for index, weight in dict(value).items():
        whole_number("a key of class_weight", index, least=0)
        if not np.isfinite(weight) or weight < 0:
            raise ConfigError(f"Expected class_weight[{index}] as a finite number of at least 0; got {weight!r}.")
        if units is not None and index >= units:
            raise ConfigError(
                f"Expected classes 0 to {units - 1} in class_weight, as the model has {units} outputs; got class {index}."
            )


def _arrays(name: str, data: Any, model: Any) -> int:
    """Check ``(x, y)`` or ``(x, y, sample_weight)`` of arrays; returns the number of rows."""
    import keras

    if not isinstance(data, tuple | list) or not 2 <= len(data) <= 3:
        raise DataError(
            f"Expected {name} as a part of an ImageDataset, a tuple (x, y) of NumPy arrays or a Spark DataFrame; got a "
            f"{type(data).__name__}."
        )
    x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
    leaves = [leaf for leaf in keras.tree.flatten(tuple(data)) if leaf is not None]
    for leaf in leaves:
        if not isinstance(leaf, np.ndarray) or leaf.ndim == 0 or leaf.dtype.kind not in "fiub":
            what = f"{leaf.dtype} of shape {leaf.shape}" if isinstance(leaf, np.ndarray) else type(leaf).__name__
            raise DataError(f"Expected NumPy arrays of numbers in {name}, one row per example; got {what}.")
    counts = {len(leaf) for leaf in leaves}
    if len(counts) != 1:
        raise DataError(f"Expected equally many rows in all arrays of {name}; got {sorted(counts)}.")
    (count,) = counts
    if count:
        _shapes(name, keras.tree.map_structure(lambda leaf: leaf[:1], x), model)
        units = _classes_of(model)
        if units is not None and isinstance(y, np.ndarray) and not 0 <= y.min() <= y.max() < units:
            raise DataError(_outside(name, units, y.min(), y.max()))
    return count


def _shapes(name: str, x: Any, model: Any) -> None:
    """Compare the shapes of one row with the model's, if they are known."""
    import keras

    expected = getattr(model, "inputs", None)
    if not expected:
        return  # a subclassed model has no known shapes
    given = x
    if isinstance(x, dict):
        names = [tensor.name for tensor in expected]
        if set(x) >= set(names):
            given = [x[name] for name in names]
    leaves = keras.tree.flatten(given)
    if len(leaves) != len(expected):
        raise DataError(f"Expected {len(expected)} inputs per row in {name}, as the model takes; got {len(leaves)}.")
    for leaf, tensor in zip(leaves, expected, strict=True):
        want, have = tuple(tensor.shape[1:]), tuple(leaf.shape[1:])
        squeezed = have == () and want == (1,)  # Keras adds that axis itself
        if not squeezed and (len(want) != len(have) or any(w not in (None, h) for w, h in zip(want, have, strict=True))):
            raise DataError(
                f"Expected rows of shape {want} in {name} for the model's input {tensor.name!r}; got {have}. "
                "Prepare the data in the model's size, or build the model for the size of the data."
            )


def _classes_of(model: Any) -> int | None:
    """The number of classes of a model that is trained on class indices; None for any other model."""
    import keras

    loss = getattr(model, "loss", None)
    sparse = loss in ("sparse_categorical_crossentropy",) if isinstance(loss, str) else False
    sparse = sparse or isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
    shape = getattr(model, "output_shape", None) if model.built else None
    return int(shape[-1]) if sparse and isinstance(shape, tuple) and isinstance(shape[-1], int) else None
