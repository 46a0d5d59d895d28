"""Checks of losses and metrics, by computing them here for a few rows: what fails here would fail on a worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dlspark.errors import ConfigError, DataError
from dlspark.mends.keras_compiled_metrics import compiled_metrics

ROWS = 4  # of a trial: enough that a wrong shape rarely equals another one by chance


def probe(model: Any) -> Any:
    """A model without layers whose losses and metrics are named as those of ``model``."""
    import keras

    class Probe(keras.Model):
        output_names = getattr(model, "output_names", None)

    return Probe()


def trial(name: str, model: Any, outputs: Any, y: Any, weight: Any, shapes: Mapping[int, tuple[int, ...]]) -> None:
    """Compute copies of the losses and metrics for a few rows and outputs of zeros.

    Args:
        name: what the data is, for messages.
        model: compiled.
        outputs: the model's, symbolic.
        y: the labels of all rows.
        weight: their weights, or None.
        shapes: those of the labels by the ``id`` of their output, for axes of outputs that depend on the input.
    """
    import keras

    def size(tensor: Any, axis: int) -> int | None:
        known = shapes.get(id(tensor), ())
        return tensor.shape[axis] or (known[axis] if axis < len(known) else None)

    sizes = {id(t): [size(t, axis) for axis in range(1, len(t.shape))] for t in keras.tree.flatten(outputs)}
    if any(None in each for each in sizes.values()):
        return
    mine = probe(model)
    try:
        config = model.get_compile_config()
        saved = {key: config.get(key) for key in ("loss", "loss_weights", "metrics", "weighted_metrics")}
        used = keras.saving.deserialize_keras_object(saved)
        mine.compile(**used)
    except Exception:  # objects that are not registered: a builder may have them
        return
    if model.loss is not None and not used["loss"]:
        return  # the model's own compile() is saved in another way
    _known_names([used["metrics"], used["weighted_metrics"]])
    parts = [y] if weight is None else [y, weight]
    given = keras.tree.map_structure(lambda leaf: leaf[np.arange(ROWS) % len(leaf)], parts)
    zeros = keras.tree.map_structure(lambda tensor: keras.ops.zeros((ROWS, *sizes[id(tensor)]), tensor.dtype), outputs)
    try:
        some, *weights = keras.tree.map_structure(keras.ops.convert_to_tensor, given)
        if model.loss is not None:
            mine.compute_loss(None, some, zeros, *weights)
        if type(model).compute_metrics is keras.Model.compute_metrics:
            mine.compute_metrics(None, some, zeros, *weights)
        results = mine.get_metrics_result() if mine.metrics else {}
    except Exception as error:  # Keras, its backend and the user's own code raise many kinds
        shapes = keras.tree.map_structure(lambda leaf: f"{leaf.dtype}{list(leaf.shape[1:])}", given[0])
        raise DataError(
            f"Expected labels in {name} that the model's losses and metrics take; got {shapes} per row: "
            f"{type(error).__name__}: {error}. Change the labels, or the loss and metrics of compile()."
        ) from error
    for metric, value in results.items():
        _one_number(metric, value)


def one_number_each(model: Any) -> None:
    """Reject metrics that are known to give several numbers."""
    import keras

    if type(model).get_metrics_result is not keras.Model.get_metrics_result:
        return  # it may turn states of several numbers into one
    for metric in compiled_metrics(model):
        try:
            value = metric.result()
        except Exception:  # not built yet
            continue
        if metric.name != "compile_metrics":
            _one_number(metric.name, value)


def _known_names(metrics: Any) -> None:
    import keras

    for metric in keras.tree.flatten(metrics):
        if isinstance(metric, str) and metric.lower() not in ("accuracy", "acc", "crossentropy", "ce"):
            try:
                keras.metrics.get(metric)
            except ValueError as error:
                raise ConfigError(f"Expected metrics that Keras knows; got {metric!r}. Correct it in compile().") from error


def _one_number(metric: str, value: Any) -> None:
    shape = tuple(getattr(value, "shape", ()))
    if isinstance(value, Mapping) or shape:
        raise ConfigError(
            f"Expected metrics that give one number each, as the history has one per epoch; got the metric {metric!r} that "
            f"gives {'a dict' if isinstance(value, Mapping) else f'an array of shape {shape}'}. Set average='macro', give "
            "one threshold, or give one metric per class."
        )
