"""Checks of the arguments of Trainer.fit, before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dlspark._require import number, whole_number
from dlspark.data import ShardedRows, fewest_rows, num_steps
from dlspark.driver import array_checks, dataframe_checks, label_checks, metric_checks
from dlspark.errors import ConfigError, DataError
from dlspark.mends.keras_batch_norm import has_own_moments, synchronized_layers

_SEEDS = 2**32  # NumPy's generators take smaller seeds, and each rank adds its number


def seed(value: Any, num_workers: int) -> int:
    """``value`` as an int; rejects a seed that random generators do not take on every rank."""
    found = whole_number("seed", value, least=0)
    if found + num_workers > _SEEDS:
        raise ConfigError(f"Expected seed as a whole number of at most {_SEEDS - num_workers}; got {found}.")
    return found


def flag(name: str, value: Any) -> bool:
    """``value`` as a bool; rejects everything else, because any text counts as true."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"Expected {name} as True or False; got {value!r}.")
    return bool(value)


def callbacks(values: Any, num_workers: int) -> list[Any]:
    """The callbacks in one list, as Keras' ``fit`` flattens them.

    Rejects values that are not Keras callbacks, and BackupAndRestore, with which ranks would start at different epochs.
    """
    import keras

    found = [] if values is None else keras.tree.flatten(values)
    for value in found:
        if isinstance(value, type) and issubclass(value, keras.callbacks.Callback):
            raise ConfigError(f"Expected Keras callbacks; got the class {value.__name__}. Give {value.__name__}(…).")
        if isinstance(value, keras.callbacks.CallbackList):
            raise ConfigError("Expected Keras callbacks; got a CallbackList. Give the list of its callbacks.")
        if not isinstance(value, keras.callbacks.Callback):
            raise ConfigError(f"Expected Keras callbacks, or None for none; got a {type(value).__name__}.")
        if num_workers > 1 and isinstance(value, keras.callbacks.BackupAndRestore):
            raise ConfigError(
                "BackupAndRestore restores one process only; the workers' epochs would differ. Remove it and give "
                "Trainer a store."
            )
    return list(found)


def rows(name: str, data: Any, model: Any, batch_size: int, num_workers: int, *, labels: bool = True) -> None:
    """Reject data that is empty, does not fit the model or has too few rows per worker.

    Args:
        name: what the data is, for messages.
        data: arrays or rows of shards. A DataFrame is checked when its executors have written and counted its rows.
        model: compiled. What is unknown of an unbuilt model is not checked; `fits` does that later.
        batch_size: the most rows of a step.
        num_workers: the world size.
        labels: check labels and sample weights too.
    """
    if array_checks.is_dataframe(data):
        dataframe_checks.columns(name, data)
        return
    count = data.rows if isinstance(data, ShardedRows) else array_checks.arrays(name, data)
    if count == 0:
        raise DataError(f"Expected at least one row per worker ({num_workers}) in {name}; got none.")
    fits(name, data, model, labels=labels)
    fewest = fewest_rows(count, batch_size, num_workers)
    if fewest == 0:
        steps = num_steps(count, batch_size)
        raise ConfigError(
            f"Expected at least {num_workers} rows in a step, one for each worker; got {count // steps}: {name} has {count} "
            f"rows in {steps} steps (batch_size {batch_size}). Use a larger batch_size or fewer workers."
        )


def fits(name: str, data: Any, model: Any, *, labels: bool = True) -> None:
    """Reject data that is not empty and does not fit the model: its inputs, its losses and its metrics.

    Args:
        name: what the data is, for messages.
        data: arrays, rows of shards, or a DataFrame, whose labels take a small Spark job.
        model: compiled.
        labels: check labels and sample weights too.
    """
    if array_checks.is_dataframe(data):
        dataframe_checks.labels(name, data, model)
        return
    if isinstance(data, ShardedRows):
        units = label_checks.classes_of(model)
        if data.num_classes is not None and units is not None and data.num_classes > units:
            raise DataError(
                f"Expected at most {units} classes in {name}, one for each output of the model; got {data.num_classes}. "
                f"Give the model {data.num_classes} outputs."
            )
        with data.open() as reader:
            data = reader.batch(np.arange(min(data.rows, metric_checks.ROWS)))
    array_checks.inputs(name, data[0], model)
    if labels:
        label_checks.labels(name, data, model)


def validation(data: Any, validation_data: Any) -> None:
    """Reject validation rows with another structure than the training rows."""
    if not isinstance(data, tuple | list) or not isinstance(validation_data, tuple | list):
        return
    for part, ours, theirs in zip(("x", "y"), data, validation_data, strict=False):
        expected, got = array_checks.structure(ours), array_checks.structure(theirs)
        if expected != got:
            raise DataError(
                f"Expected {part} of validation_data with the structure of data, {expected}; got {got}. Give both alike."
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


def class_weight(value: Any, model: Any, data: Any) -> tuple[dict[int, float] | None, Any]:
    """The weight of every class, 1 for classes without one as Keras counts them, and the data that they weigh.

    Keras' own look-up for datasets knows no default: a class above the largest key fails on a CPU and weighs 0 on a GPU
    (keras-team/keras#23071). It fails for labels of booleans and unsigned integers, which become int32.

    Returns:
        None for no weights, and ``data``.

    Raises:
        ConfigError: weights that are not numbers, classes that do not exist, or rows whose loss cannot be weighed by class.
    """
    if value is None or (isinstance(value, Mapping) and not value):
        return None, data
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"Expected class_weight as a dict of weights by class index; got {value!r}. Give dict(enumerate(weights)), or "
            "class_weight() of an ImageDataset for balanced classes."
        )
    weights = {}
    for key, weight in value.items():
        index = whole_number("a key of class_weight", key, least=0)
        weights[index] = number(f"class_weight[{index}]", weight, "as a finite number of at least 0", lambda w: w >= 0)
    known, most = _weighted_classes(model, data)
    if most is not None and max(weights) >= most:
        raise ConfigError(
            f"Expected classes 0 to {most - 1} in class_weight, as the model has {most} outputs; got class {max(weights)}."
        )
    if isinstance(data, tuple | list) and data[1].dtype.kind in "bu":
        data = (data[0], data[1].astype(np.int32))
    return {index: weights.get(index, 1.0) for index in range(max(known, max(weights) + 1))}, data


def _weighted_classes(model: Any, data: Any) -> tuple[int, int | None]:
    """How many classes must have a weight, as far as is known, and how many there are, if that is known.

    Raises:
        ConfigError: Keras cannot weigh the loss of these rows by class.
    """
    import keras

    units = label_checks.classes_of(model)
    known = units or 2
    if array_checks.is_dataframe(data):
        if data.dtypes[-1][1] == "boolean":
            raise ConfigError("Expected numbers as labels with class_weight; got booleans. Cast the last column to int.")
        return known, units
    if isinstance(data, ShardedRows):
        y, weight = data.y, data.sample_weight
        known = max(known, data.num_classes or 0)
    else:
        _, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    if weight is not None:
        raise ConfigError(
            "Expected class_weight or a sample_weight in data; got both. Give one: sample_weight * weights[y], where "
            "weights are those of the classes."
        )
    if not isinstance(y, str | np.ndarray):
        raise ConfigError(
            f"Expected one array of labels with class_weight; got {array_checks.structure(y)}. Use sample_weight instead."
        )
    if isinstance(y, str):
        return known, units
    columns = y.shape[1] if y.ndim == 2 else 1
    if y.ndim > 2 or (columns > 1 and units is not None):
        raise ConfigError(
            f"Expected one label per row with class_weight; got labels of shape {y.shape[1:]}. Keras would take the "
            "position of the largest for the class. Use sample_weight with a weight for each label."
        )
    if columns > 1:
        return columns, columns
    low, high = np.rint(y.min()), np.rint(y.max())
    if low < 0 or not high < 2**20:
        raise ConfigError(
            f"Expected class indices as labels with class_weight; got labels from {y.min()} to {y.max()}. Use sample_weight "
            "instead."
        )
    return max(known, int(high) + 1), units
