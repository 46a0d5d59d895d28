"""How a classifier does on rows it is not trained on: loss, metrics, and which classes it takes for which."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlspark import _checks
from dlspark.data.feed import Feed
from dlspark.data.shards import ShardedRows
from dlspark.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate_classifier` found.

    Attributes:
        rows: how many were evaluated.
        seconds: how long that took.
        metrics: "loss" and every compiled metric over all rows; empty for a model that is not compiled.
        classes: their names, in the order of the labels.
        confusion: rows by true class (first index) and predicted class (second), in the order of ``classes``.
    """

    rows: int
    seconds: float
    metrics: Mapping[str, float]
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]

    @property
    def recall(self) -> dict[str, float | None]:
        """Of the rows of each class, the fraction predicted as that class; None where there are no rows."""
        return {
            name: counts[number] / sum(counts) if sum(counts) else None
            for number, (name, counts) in enumerate(zip(self.classes, self.confusion, strict=True))
        }


def load_classifier(path: str | os.PathLike[str]) -> Any:
    """The model of a ``.keras`` file, loaded in safe mode: code in the file is refused, not run.

    Raises:
        ConfigError: it is damaged, needs classes that are not registered, or holds code.
    """
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"Expected a .keras file: {os.fspath(path)!r} is damaged, or a file of another kind.")
    import keras

    import dlspark.optimizers  # noqa: F401 - registers the optimizer that build_classifier may have used

    try:
        return keras.saving.load_model(path, safe_mode=True)
    except Exception as error:  # Keras, zipfile and h5py raise many kinds here
        raise ConfigError(
            f"The model {os.fspath(path)!r} cannot be loaded ({type(error).__name__}): {error} Expected a .keras file "
            "without Lambda layers, of Keras' own classes."
        ) from error


def evaluate_classifier(
    model: Any, rows: ShardedRows, *, batch_size: int = 32, on_batch: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Predict every row once, batch by batch, in this process.

    Memory does not grow with the rows. Loss and metrics equal those of ``model.evaluate``.

    Args:
        model: gives probabilities or scores of shape (batch, classes) for ``rows.x``.
        rows: a part of an `ImageDataset`, or any rows whose ``y`` is one column of class indices.
        batch_size: the most rows predicted at a time.
        on_batch: called with the rows done and the rows in all after every batch.

    Raises:
        ConfigError: ``batch_size`` is no whole number of at least 1.
        DataError: the rows do not fit the model: their shape, or how many classes they have.
    """
    import keras

    _checks.whole_number("batch_size", batch_size)
    _checks.rows("data", rows, model, batch_size, 1)
    shape = getattr(model, "output_shape", None)
    if rows.num_classes is None or not isinstance(shape, tuple) or shape[1:] != (rows.num_classes,):
        raise DataError(
            f"The data has {rows.num_classes} classes, so the model should give (batch, {rows.num_classes}) scores; it "
            f"gives {shape}. Evaluate a model on the classes that it was trained for."
        )
    started = time.perf_counter()
    confusion = np.zeros((rows.num_classes, rows.num_classes), np.int64)
    total_loss, done, metrics = 0.0, 0, {}
    if model.compiled:
        model.reset_metrics()
    with Feed(rows, batch_size=batch_size) as feed:
        for x, y in feed:
            scores = model.predict_on_batch(x)
            np.add.at(confusion, (y, np.argmax(scores, axis=-1)), 1)
            if model.compiled:
                target, prediction = keras.ops.convert_to_tensor(y), keras.ops.convert_to_tensor(scores)
                loss = model.compute_loss(x=x, y=target, y_pred=prediction, training=False)
                total_loss += float(loss) * len(y)
                metrics = model.compute_metrics(x, target, prediction)
            done += len(y)
            if on_batch is not None:
                on_batch(done, rows.rows)
    if model.compiled:  # Keras' own mean of the loss is kept by test_step, which predicts once more
        metrics = {name: float(value) for name, value in metrics.items()} | {"loss": total_loss / done}
    return Evaluation(
        rows=done,
        seconds=time.perf_counter() - started,
        metrics=dict(sorted(metrics.items(), key=lambda item: item[0] != "loss")),
        classes=rows.classes or tuple(map(str, range(rows.num_classes))),
        confusion=tuple(tuple(map(int, line)) for line in confusion),
    )
