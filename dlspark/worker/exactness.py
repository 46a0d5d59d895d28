"""Whether what the workers compute from their parts can be put together exactly: losses, metrics and states.

The reductions of losses and the classes of metrics say much. Two more assumptions make N workers equal to one process: the
loss of a step is the mean over its rows, and what a step does to a layer's states is known. Both are tried out on a few
rows, on the driver, because neither can be read off a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dlspark.data import ShardedRows
from dlspark.errors import ConfigError
from dlspark.mends import keras_layers
from dlspark.mends.keras_compiled_metrics import compiled_metrics
from dlspark.mends.keras_masked_means import masked_means
from dlspark.worker.agreement import merge_of, states_of
from dlspark.worker.attributes import foreign
from dlspark.worker.process import random_states

MERGEABLE_REDUCTIONS = ("sum_over_batch_size", "mean", "auto")
ROWS = 7  # two uneven parts
TOLERANCE = 1e-4


def check_mergeable(model: Any) -> None:
    """Reject losses and metrics that cannot be computed exactly from the workers' parts.

    Raises:
        ConfigError: a loss has reduction "sum", "none" or "mean_with_sample_weight", or it is unknown how to merge a metric.
    """
    import keras

    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", "mean")
        if reduction not in MERGEABLE_REDUCTIONS:
            raise ConfigError(
                f"Expected a loss that is the mean over rows, with several workers; got {type(loss).__name__}, which has "
                f"reduction {reduction!r}. Set its reduction to {MERGEABLE_REDUCTIONS[0]!r}, or train with num_workers=1."
            )
    for metric in compiled_metrics(model):
        definer = next(cls for cls in type(metric).__mro__ if "update_state" in vars(cls))
        if not definer.__module__.startswith("keras.") and getattr(metric, "merge", None) != "sum":
            raise ConfigError(
                f"Expected metrics whose variables are sums over rows, with several workers; got {type(metric).__name__}, "
                "which does not declare that. If they are, write merge = 'sum' in its class; otherwise train with "
                "num_workers=1."
            )


def check_exact(model: Any, rows: ShardedRows) -> None:
    """Reject losses that are not means over rows, and states that no rule merges.

    Args:
        model: compiled and built. Its weights and states are as before afterwards.
        rows: the training rows.

    Raises:
        ConfigError: the message names the loss or the state.
    """
    import keras

    with rows.open() as reader, random_states():
        batch = reader.batch(np.arange(min(rows.rows, ROWS)))
    x, y, weight = keras.utils.unpack_x_y_sample_weight(keras.tree.map_structure(keras.ops.convert_to_tensor, batch))
    before = [(variable, keras.ops.convert_to_numpy(variable)) for variable in model.non_trainable_variables]
    try:
        _check_states(model, x)
        if type(model).train_step is keras.Model.train_step and rows.rows > 1:  # another step computes its own loss
            predictions = _predictions(model, x)
            _check_loss(model, x, y, weight, predictions)
            _check_metrics(model, x, y, predictions)
    finally:
        for variable, value in before:
            variable.assign(value)
        model.reset_metrics()


def _check_states(model: Any, x: Any) -> None:
    import keras

    for layer in keras_layers.flatten(model):
        if getattr(layer, "stateful", False):
            raise ConfigError(
                f"Expected layers that keep no state from batch to batch, with several workers; got {layer.name!r}, which "
                "is stateful. Set stateful=False, or train with num_workers=1."
            )
    unknown = [(variable, layer) for variable, layer in states_of(model) if merge_of(layer) is None]
    if not unknown:
        return
    values = [keras.ops.convert_to_numpy(variable) for variable, _ in unknown]
    model(x, training=True)
    for (variable, layer), value in zip(unknown, values, strict=True):
        if keras.ops.convert_to_numpy(variable).tobytes() != value.tobytes():
            raise ConfigError(
                f"Expected layers that declare how to merge their states, with several workers; got {variable.path}, which "
                f"a step changes. In the class {type(layer).__name__}, write merge = 'sum' (adds the changes of all "
                "workers), 'mean' (averages), or 'same' (the state does not depend on the rows). Or train with "
                "num_workers=1."
            )


def _check_loss(model: Any, x: Any, y: Any, weight: Any, predictions: Any) -> None:
    import keras

    count = keras.tree.flatten(x)[0].shape[0]
    parts = [slice(0, (count + 1) // 2), slice((count + 1) // 2, count)]
    adds = _adds_losses(model)
    valid: list[Any] = []

    def loss_of(part: slice, factor: Callable[[Any], Any]) -> float:
        def of(values: Any) -> Any:
            return keras.tree.map_structure(lambda value: None if value is None else value[part], values)

        if adds:
            model(of(x), training=False)
        with masked_means(factor):
            try:
                loss = model.compute_loss(of(x), of(y), of(predictions), of(weight), training=False)
            except Exception as error:  # the user's own code
                raise ConfigError(
                    f"The loss cannot be computed from the first rows: {type(error).__name__}: {error} Compare it with the "
                    "labels and the model's outputs."
                ) from error
        return float(keras.ops.convert_to_numpy(loss))

    def noted(found: Any) -> None:
        valid.append(found)

    whole = loss_of(slice(0, count), noted)
    if not np.isfinite(whole) or whole != loss_of(slice(0, count), lambda _: None):
        return  # it draws at random, or the first rows have no loss: nothing can be told
    merged = 0.0
    for part in parts:
        rows, everywhere = part.stop - part.start, iter(valid)

        def factor(found: Any, rows: int = rows, everywhere: Any = everywhere) -> Any:
            return keras.ops.divide_no_nan(found * count, rows * next(everywhere))

        merged += loss_of(part, factor) * rows / count
    if abs(merged - whole) > TOLERANCE * (abs(whole) + TOLERANCE):
        raise ConfigError(
            f"Expected a loss that is the mean over rows, with several workers; got {whole:.6g} for {count} rows and "
            f"{merged:.6g} as the mean of their parts: {_suspects(model)} is a sum, or is computed from all rows together. "
            "Use a mean over rows, or train with num_workers=1."
        )


def _check_metrics(model: Any, x: Any, y: Any, predictions: Any) -> None:
    """Reject metrics given as functions that return one number for all rows: the parts of a batch would weigh equally."""
    import keras

    if y is None:
        return
    model.reset_metrics()
    model.compute_metrics(x, y, predictions)
    for metric in compiled_metrics(model):
        # A mean counts its values.
        if type(metric) is keras.metrics.MeanMetricWrapper and float(keras.ops.convert_to_numpy(metric.count)) == 1:
            raise ConfigError(
                f"Expected metrics with one value for each row, with several workers; got {metric.name!r}, which returns "
                "one number for all rows. Return one value for each row, or train with num_workers=1."
            )


def _predictions(model: Any, x: Any) -> Any:
    """Random outputs in (0, 1).

    Random, because a new model predicts nearly the same for every row, and then all losses are means.
    """
    import keras

    outputs = getattr(model, "outputs", None)
    if not outputs or any(None in tensor.shape[1:] for tensor in outputs):
        outputs = model(x, training=False)
    elif len(outputs) == 1:
        (outputs,) = outputs
    else:
        outputs = model.output
    count, random = keras.tree.flatten(x)[0].shape[0], np.random.default_rng(0)
    return keras.tree.map_structure(
        lambda tensor: keras.ops.cast(random.uniform(0.05, 0.95, (count, *tensor.shape[1:])), tensor.dtype), outputs
    )


def _adds_losses(model: Any) -> bool:
    """Whether layers may add losses when they are called."""
    return any(
        getattr(layer, "activity_regularizer", None) is not None or foreign(layer) for layer in keras_layers.flatten(model)
    )


def _suspects(model: Any) -> str:
    import keras

    names = [getattr(each, "name", getattr(each, "__name__", each)) for each in keras.tree.flatten(model.loss)]
    return f"{', '.join(map(str, names)) or 'the loss'}, or a loss that a layer adds,"
