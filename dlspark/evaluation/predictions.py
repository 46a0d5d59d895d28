"""What a classifier says of rows that it is not trained on: their probabilities, and Keras' own loss and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark._require import whole_number
from dlspark.data import Feed, ShardedRows
from dlspark.driver import checks
from dlspark.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What `predict_rows` found; row i of both arrays is row i of the data.

    Attributes:
        labels: the true classes, int32 of shape (rows,).
        probabilities: of every class, float32 of shape (rows, classes).
        classes: their names, in the order of the labels.
        metrics: "loss" and every compiled metric over all rows; empty for a model that is not compiled.
        seconds: how long it took.
    """

    labels: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    classes: tuple[str, ...]
    metrics: Mapping[str, float]
    seconds: float


def predict_rows(
    model: Any,
    rows: ShardedRows,
    *,
    batch_size: int = 32,
    on_batch: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Predict every row once, batch by batch, in this process.

    Images are held for a batch only; memory grows by the probabilities. Loss and metrics equal those of
    ``model.evaluate``. A model whose loss says ``from_logits`` gives logits, which are turned into probabilities.

    Args:
        model: gives a probability, or a logit, of every class for ``rows.x``: shape (batch, classes).
        rows: a part of an `ImageDataset`, or any rows whose ``y`` is one column of class indices.
        batch_size: the most rows predicted at a time.
        on_batch: called with the rows done and the rows in all after every batch.

    Raises:
        ConfigError: ``batch_size`` is no whole number of at least 1.
        DataError: the rows do not fit the model, in their shape or in how many classes they have.
    """
    import keras

    whole_number("batch_size", batch_size)
    checks.rows("data", rows, model, batch_size, 1)
    shape = getattr(model, "output_shape", None)
    if rows.num_classes is None or not isinstance(shape, tuple) or shape[1:] != (rows.num_classes,):
        raise DataError(
            f"The data has {rows.num_classes} classes, so the model should give (batch, {rows.num_classes}) scores; it "
            f"gives {shape}. Evaluate a model on the classes that it was trained for."
        )
    started = time.perf_counter()
    labels = np.empty(rows.rows, np.int32)
    scores = np.empty((rows.rows, rows.num_classes), np.float32)
    total_loss, done, metrics = 0.0, 0, {}
    if model.compiled:
        model.reset_metrics()
    with Feed(rows, batch_size=batch_size) as feed:
        for x, y in feed:
            found = model.predict_on_batch(x)
            batch = slice(done, done + len(y))
            labels[batch], scores[batch] = y, found
            if model.compiled:
                target, prediction = keras.ops.convert_to_tensor(y), keras.ops.convert_to_tensor(found)
                loss = model.compute_loss(x=x, y=target, y_pred=prediction, training=False)
                total_loss += float(loss) * len(y)
                metrics = model.compute_metrics(x, target, prediction)
            done += len(y)
            if on_batch is not None:
                on_batch(done, rows.rows)
    if model.compiled:  # Keras' own mean of the loss is kept by test_step, which predicts once more
        metrics = {name: float(value) for name, value in metrics.items()} | {"loss": total_loss / done}
    if getattr(getattr(model, "loss", None), "from_logits", False):
        scores = keras.ops.convert_to_numpy(keras.ops.softmax(scores))
    return Predictions(
        labels=labels,
        probabilities=scores,
        classes=rows.classes or tuple(map(str, range(rows.num_classes))),
        metrics=dict(sorted(metrics.items(), key=lambda item: item[0] != "loss")),
        seconds=time.perf_counter() - started,
    )
