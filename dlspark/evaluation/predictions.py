"""Predictions: make them with a Keras model, and check arrays of predictions from anywhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark._require import whole_number
from dlspark.data import BLANKS, Feed, ShardedRows, is_missing
from dlspark.driver import checks
from dlspark.errors import ConfigError, DataError
from dlspark.evaluation.bootstrap import Floats

MOST_VALUES = 30
"""The maximum number of distinct values of a column that splits an evaluation."""

_SUM_TOLERANCE = 0.02  # probabilities in bfloat16 add up to 1 within about 1 %


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The result of `predict_rows`; row i of both arrays is row i of the data.

    Attributes:
        labels: true classes, int32 of shape (rows,).
        probabilities: float32 of shape (rows, classes).
        classes: class names, in the order of the labels.
        metrics: "loss" and every compiled metric over all rows; empty for a model that is not compiled.
        seconds: duration.
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

    Memory holds one batch of images and the probabilities of all rows. Loss and metrics equal those of
    ``model.evaluate``. The outputs of a model whose loss has ``from_logits=True`` are converted to probabilities.

    Args:
        model: maps ``rows.x`` to a probability or logit of every class, of shape (batch, classes).
        rows: a part of an `ImageDataset`, or any rows whose ``y`` is one column of class indices.
        batch_size: rows in a batch.
        on_batch: called after every batch with the number of rows done and the total.

    Raises:
        ConfigError: ``batch_size`` is no integer of at least 1.
        DataError: the shape of the rows or their number of classes does not match the model.
    """
    import keras

    whole_number("batch_size", batch_size)
    checks.rows("data", rows, model, batch_size, 1, labels=False)
    shape = getattr(model, "output_shape", None)
    if rows.num_classes is None or not isinstance(shape, tuple) or shape[1:] != (rows.num_classes,):
        raise DataError(
            f"Expected outputs of shape (batch, {rows.num_classes}), for {rows.num_classes} classes; got {shape}. "
            "Evaluate a model on the classes that it was trained for."
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
    if model.compiled:  # Keras averages the loss in test_step only, which would predict again
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


def bands(values: Any, width: float) -> NDArray[Any]:
    """Numbers as strings such as ``"20 to below 40"``, with multiples of ``width``; ``"(unknown)"`` for missing values.

    Raises:
        ConfigError: ``width`` is not above 0.
        DataError: the values are not numbers.
    """
    if not width > 0:
        raise ConfigError(f"Expected bands of a width above 0; got {width!r}.")
    try:
        numbers = np.array([np.nan if is_missing(value) else value for value in np.asarray(values).tolist()], np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"Expected numbers to put into bands; got: {error}. Remove the width.") from error
    lower = np.floor(numbers / width) * width
    texts = [f"{low:g} to below {low + width:g}" if np.isfinite(low) else "(unknown)" for low in lower.tolist()]
    return np.array(texts, object)


def class_indices(name: str, values: Any, num_classes: int) -> NDArray[np.int64]:
    """``values`` as integers; rejects values that are not class indices."""
    found = np.asarray(values)
    whole = found.dtype.kind in "iu" or (found.dtype.kind == "f" and bool(np.all(found == np.floor(found))))
    if found.ndim != 1 or not whole:
        raise DataError(f"Expected {name} as class indices of shape (rows,); got {found.dtype} of shape {found.shape}.")
    if found.size and not 0 <= found.min() <= found.max() < num_classes:
        raise DataError(
            f"Expected {name} from 0 to {num_classes - 1}, for {num_classes} classes; "
            f"got {found.min():g} to {found.max():g}."
        )
    return found.astype(np.int64)


def checked_probabilities(values: Any, rows: int, num_classes: int) -> Floats:
    """``values`` as float64; rejects rows that do not add up to about 1."""
    found = np.asarray(values, np.float64)
    if found.shape != (rows, num_classes):
        raise DataError(f"Expected probabilities of shape ({rows}, {num_classes}); got {found.shape}.")
    sums = found.sum(axis=1, keepdims=True)
    if not (np.all(found >= 0) and np.all(np.abs(sums - 1) <= _SUM_TOLERANCE)):
        raise DataError(
            "Expected probabilities that are at least 0 and add up to 1 in every row; got "
            f"{found.min():.4g} to {found.max():.4g}, and sums of {sums.min():.4g} to {sums.max():.4g}. End the model with "
            "a softmax, or give predicted classes."
        )
    return found


def unit_numbers(groups: Any) -> NDArray[np.int64]:
    """Groups as integers from 0; every row without a group gets an integer of its own."""
    numbers: dict[Any, int] = {}
    keys = [
        (row, None) if is_missing(group) else group.strip(BLANKS) if isinstance(group, str) else group
        for row, group in enumerate(np.asarray(groups).tolist())
    ]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def value_texts(name: str, values: Any, width: float | None = None) -> NDArray[Any]:
    """The values of a column as strings, ``"(unknown)"`` for missing ones; with ``width`` numbers in `bands`.

    Raises:
        ConfigError: see `bands`.
        DataError: more than `MOST_VALUES` distinct values, or see `bands`.
    """
    found = np.asarray(values) if width is None else bands(values, width)
    texts = [
        "(unknown)" if is_missing(value) else f"{value:g}" if isinstance(value, float) else str(value).strip(BLANKS)
        for value in found.tolist()
    ]
    different = len(set(texts))
    if different > MOST_VALUES:
        raise DataError(
            f"Expected at most {MOST_VALUES} different values in {name!r}; got {different:,}. Put numbers into bands, such "
            "as age:20."
        )
    column = np.empty(len(texts), object)
    column[:] = texts
    return column


def in_order(texts: NDArray[Any]) -> list[str]:
    """The distinct strings, sorted by the numbers in them; strings in parentheses last."""

    def key(text: str) -> tuple[Any, ...]:
        parts = re.split(r"(\d+(?:\.\d+)?)", text)
        return text.startswith("("), [float(part) if i % 2 else part for i, part in enumerate(parts)]

    return sorted(set(texts.tolist()), key=key)
