"""Tiny models and data with known answers. Importing this module imports Keras."""

from __future__ import annotations

import os
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

PACKAGE = "dlspark.testing"

Arrays = tuple[NDArray[Any], NDArray[Any]]


def separable(rows: int, seed: int = 0) -> Arrays:
    """Points of shape (rows, 8), float32, in three classes (int32) that a small network can separate."""
    x = np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)
    return x, x[:, :3].argmax(axis=1).astype(np.int32)


def dense_classifier(optimizer: Any = None, **compile_options: Any) -> Any:
    """Return a regularised network for the data of ``separable``, without batch statistics or random layers."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.layers.Input((8,)),
            keras.layers.Dense(16, activation="relu", kernel_regularizer=keras.regularizers.L2(1e-4)),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    options: dict[str, Any] = {
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(k=2, name="top_2")],
    }
    model.compile(
        optimizer or keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0), **{**options, **compile_options}
    )
    return model


def normalised_classifier() -> Any:
    """Return a network for the data of ``separable`` with two synchronized batch normalisations."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, activation="relu"), keras.layers.BatchNormalization(synchronized=True)]
    renormalises = keras.layers.BatchNormalization(synchronized=True, renorm=True)
    nested = keras.Sequential([keras.layers.Input((8,)), *layers])
    last = keras.layers.Dense(3, activation="softmax")
    model = keras.Sequential([keras.layers.Input((8,)), renormalises, nested, last])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@keras.saving.register_keras_serializable(package=PACKAGE)
class SeenOnce(keras.metrics.Metric):
    """The number of row ids seen exactly once in a pass, minus 1,000 for every id seen more often.

    The targets are the ids. The state is one count per id: a sum over rows, so it merges over workers.
    """

    merge = "sum"

    def __init__(self, ids: int, name: str = "seen_once", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.ids = ids
        self.counts = self.add_weight(shape=(ids,), initializer="zeros", name="counts")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        ids = keras.ops.reshape(keras.ops.cast(y_true, "int32"), (-1,))
        self.counts.assign_add(keras.ops.sum(keras.ops.one_hot(ids, self.ids), axis=0))

    def result(self) -> Any:
        once = keras.ops.sum(keras.ops.cast(keras.ops.equal(self.counts, 1), "float32"))
        more = keras.ops.sum(keras.ops.cast(keras.ops.greater(self.counts, 1), "float32"))
        return once - 1000 * more

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "ids": self.ids}


def counting_model(ids: int) -> Any:
    """Return a model whose metric ``seen_once`` counts the row ids (its targets) seen exactly once.

    It includes batch statistics and dropout, which differ between workers.
    """
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    model = keras.Sequential([keras.layers.Input((1,)), *layers])
    model.compile(keras.optimizers.SGD(1e-6), "mean_squared_error", metrics=[SeenOnce(ids)])
    return model


def row_ids(rows: int) -> Arrays:
    """Return ``rows`` rows whose targets are their ids."""
    ids = np.arange(rows, dtype=np.float32)
    return ids[:, None] / rows, ids


@keras.saving.register_keras_serializable(package=PACKAGE)
def class_of_id(y_true: Any, y_pred: Any) -> Any:
    """Return the crossentropy of each row, whose class is its id (the target) modulo 3."""
    classes = keras.ops.mod(keras.ops.cast(y_true, "int32"), 3)
    return keras.losses.sparse_categorical_crossentropy(classes, y_pred)


def counting_classifier(ids: int) -> Any:
    """``dense_classifier`` for the rows of ``numbered``, with the metric ``seen_once`` over their ids."""
    return dense_classifier(loss=class_of_id, metrics=[SeenOnce(ids)])


def numbered(rows: int) -> Arrays:
    """Points of shape (rows, 8), float32, whose targets (int32) are the rows' ids; the class of a row is its id modulo 3."""
    ids = np.arange(rows, dtype=np.int32)
    x = np.random.default_rng(0).normal(size=(rows, 8)).astype(np.float32)
    x[ids, ids % 3] += 3
    return x, ids


@keras.saving.register_keras_serializable(package=PACKAGE)
class FailsOnRank(keras.layers.Layer):
    """Raises in training on one rank; passes its input through everywhere else."""

    def __init__(self, rank: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rank = rank

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training and os.environ.get("DLSPARK_RANK") == str(self.rank):
            raise ArithmeticError(f"this layer fails on rank {self.rank}")
        return inputs

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rank": self.rank}


def failing_classifier(rank: int) -> Any:
    """``dense_classifier`` with a layer that raises on ``rank``."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Input((8,)), FailsOnRank(rank), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model
