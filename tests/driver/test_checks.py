"""What people give Trainer.fit: each row is refused with a clear error before any job, or trains as Keras does."""

from __future__ import annotations

import logging
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from dlspark import ConfigError, DataError, Trainer
from dlspark.data.sharding import epoch_order
from dlspark.local import LocalBackend
from dlspark.storage.store import Store
from dlspark.testing import toys

pytestmark = pytest.mark.timeout(60)

ROWS, SEED = 60, 5
X, Y = toys.separable(ROWS)
ONE_HOT = np.eye(3, dtype=np.float32)[Y]
NUMBERS = X[:, :1].copy()
IMAGES = np.arange(ROWS * 16, dtype=np.float32).reshape(ROWS, 4, 4) / 1000
WORDS = np.arange(ROWS * 5, dtype=np.float32).reshape(ROWS, 5, 1) / 100
TAGS = (np.arange(ROWS * 5) % 3).reshape(ROWS, 5)
MASKS = (np.arange(ROWS * 16) % 3).reshape(ROWS, 4, 4).astype(np.uint8)
layers, losses, metrics = keras.layers, keras.losses, keras.metrics
Pair = namedtuple("Pair", "b a")


def model(loss: Any = "sparse_categorical_crossentropy", units: int = 3, **compiled: Any) -> Any:
    keras.utils.set_random_seed(1)
    activation = "softmax" if units > 1 else "sigmoid"
    found = keras.Sequential([layers.Input((8,)), layers.Dense(units, activation=activation)])
    found.compile("sgd", loss, **compiled)
    return found


def unbuilt(loss: Any = "sparse_categorical_crossentropy") -> Any:
    keras.utils.set_random_seed(1)
    found = keras.Sequential([layers.Dense(3, activation="softmax")])
    found.compile("sgd", loss)
    return found


def two_inputs(*, named: bool = False, swapped: bool = False) -> Any:
    keras.utils.set_random_seed(1)
    a, b = layers.Input((8,), name="a"), layers.Input((8,), name="b")
    y = layers.Dense(3, activation="softmax")(layers.subtract([layers.Dense(4)(a), layers.Dense(4)(b)]))
    inputs: Any = [b, a] if swapped else [a, b]
    if named:
        inputs = {"b": b, "a": a} if swapped else {"a": a, "b": b}
    found = keras.Model(inputs, y)
    found.compile("sgd", "sparse_categorical_crossentropy")
    return found


def two_outputs(*, named: bool = False, loss: Any = None, **compiled: Any) -> Any:
    keras.utils.set_random_seed(1)
    x = layers.Input((8,))
    kind, size = layers.Dense(3, activation="softmax", name="kind")(x), layers.Dense(1, name="size")(x)
    found = keras.Model(x, {"kind": kind, "size": size} if named else [kind, size])
    found.compile("sgd", loss or {"kind": "sparse_categorical_crossentropy", "size": "mse"}, **compiled)
    return found


def sequence(**compiled: Any) -> Any:
    """A class for each of any number of words."""
    keras.utils.set_random_seed(1)
    found = keras.Sequential([layers.Input((None, 1)), layers.Dense(3, activation="softmax")])
    found.compile("sgd", "sparse_categorical_crossentropy", **compiled)
    return found


def segmentation(**options: Any) -> Any:
    keras.utils.set_random_seed(1)
    found = keras.Sequential([layers.Input((4, 4, 1)), layers.Conv2D(3, 1, activation="softmax")])
    found.compile("sgd", losses.SparseCategoricalCrossentropy(**options))
    return found


@keras.saving.register_keras_serializable(package="test_checks")
class Subclassed(keras.Model):  # type: ignore[misc]
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(3, activation="softmax")

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)


def subclassed(*, built: bool) -> Any:
    keras.utils.set_random_seed(1)
    found = Subclassed()
    found.compile("sgd", "sparse_categorical_crossentropy")
    if built:
        found(X[:1])
    return found


@keras.saving.register_keras_serializable(package="test_checks")
class OwnStep(Subclassed):
    """Learns with numbers as labels, or without labels."""

    def train_step(self, data: Any) -> Any:
        import tensorflow as tf

        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self(x)[:, 0] ** 2 if y is None else (self(x) - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def own_step() -> Any:
    keras.utils.set_random_seed(1)
    found = OwnStep()
    found.compile("sgd")
    found(X[:1])
    return found


@keras.saving.register_keras_serializable(package="test_checks")
class Activity(keras.layers.Layer):  # type: ignore[misc]
    """Adds the only loss."""

    def call(self, inputs: Any) -> Any:
        self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def without_loss() -> Any:
    keras.utils.set_random_seed(1)
    found = keras.Sequential([layers.Input((8,)), layers.Dense(3), Activity()])
    found.compile("sgd")
    return found


def argmax() -> Any:
    x = layers.Input((8,))
    found = keras.Model(x, keras.ops.argmax(layers.Dense(3)(x), axis=-1))
    found.compile("sgd", "sparse_categorical_crossentropy")
    return found


class Vector(keras.metrics.Metric):  # type: ignore[misc]
    """The mean of each output, or a dict of them."""

    def __init__(self, named: bool = False) -> None:
        super().__init__(name="means")
        self.named = named
        self.total = self.add_weight(shape=(3,), initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.total.assign_add(keras.ops.sum(y_pred, axis=0))

    def result(self) -> Any:
        return {"first": self.total[0]} if self.named else keras.ops.convert_to_tensor(self.total)


def with_fault(value: float, labels: Any = NUMBERS) -> Any:
    broken = labels.astype(np.float32)
    broken[7] = value
    return broken


class Foreign:
    """An array of another library: a tensor or a data frame."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return X

    def __len__(self) -> int:
        return ROWS


SPARSE, ONE_PER_CLASS = losses.SparseCategoricalCrossentropy, "categorical_crossentropy"
BY_CLASS = {"class_weight": {0: 2.0}}


@dataclass(frozen=True)
class Case:
    """A model, data and other arguments of fit, and what the error says."""

    of: Callable[[], Any]
    data: Any
    says: str
    error: type[Exception]
    options: dict[str, Any]


def case(of: Callable[[], Any], data: Any, says: str = "", error: type[Exception] = DataError, **options: Any) -> Case:
    return Case(of, data, says, error, options)


REFUSED = {
    # Metrics of several numbers.
    "F1 per class": case(
        lambda: model(ONE_PER_CLASS, metrics=[metrics.F1Score(average=None)]),
        (X, ONE_HOT),
        r"the metric 'f1_score' that gives an array of shape \(3,\)\. Set average='macro'",
        ConfigError,
    ),
    "Precision at thresholds (tensorflow#49161)": case(
        lambda: model("binary_crossentropy", 1, metrics=[metrics.Precision(thresholds=[0.3, 0.6])]),
        (X, Y == 1),
        r"the metric 'precision' that gives an array of shape \(2,\)",
        ConfigError,
    ),
    "a weighted metric per class": case(
        lambda: model(ONE_PER_CLASS, weighted_metrics=[metrics.FBetaScore(average=None)]),
        (X, ONE_HOT),
        "one threshold, or give one metric per class",
        ConfigError,
    ),
    "a metric of a vector": case(lambda: model(metrics=[Vector()]), (X, Y), "the metric 'means' that gives an", ConfigError),
    "a metric of a dict": case(
        lambda: model(metrics=[Vector(named=True)]), (X, Y), "'means' that gives a dict", ConfigError
    ),
    "a metric for one-hot labels": case(
        lambda: model(metrics=[metrics.F1Score(average="macro")]), (X, Y), "losses and metrics take; got int32"
    ),
    "an unknown loss": case(
        lambda: model("crossentropi"), (X, Y), "a loss that Keras knows; got 'crossentropi'", ConfigError
    ),
    "an unknown metric": case(
        lambda: model(metrics=["acuracy"]), (X, Y), "metrics that Keras knows; got 'acuracy'", ConfigError
    ),
    "a metric of an unknown output": case(
        lambda: two_outputs(metrics={"kynd": ["accuracy"]}),
        (X, (Y, NUMBERS)),
        r"(?s)losses and metrics take.*Invalid `metrics`",
    ),
    "a metric of one-hot labels in a sequence": case(
        lambda: sequence(metrics=[metrics.F1Score(average="macro")]), (WORDS, TAGS), "losses and metrics take"
    ),
    # Labels against losses.
    "one-hot for a sparse loss": case(
        model, (X, ONE_HOT), r"got labels of shape \(3,\) per row, as one-hot.* give y.argmax"
    ),
    "indices for a one-hot loss": case(
        lambda: model(ONE_PER_CLASS), (X, Y), r"one-hot labels of shape \(3,\).*got labels of shape \(\)\. Use the"
    ),
    "indices in a column for a one-hot loss": case(lambda: model(ONE_PER_CLASS), (X, Y[:, None]), r"to_categorical\(y, 3\)"),
    "one-hot for one output of two": case(
        two_outputs, (X, (ONE_HOT, NUMBERS)), "for the loss 'sparse_categorical_crossentropy'; got labels of shape"
    ),
    "indices for one output of two": case(
        lambda: two_outputs(named=True, loss={"kind": ONE_PER_CLASS, "size": "mse"}),
        (X, {"kind": Y, "size": NUMBERS}),
        "Expected one-hot labels",
    ),
    "one-hot for an unbuilt model": case(unbuilt, (X, ONE_HOT), "as one-hot labels have"),
    "one-hot for a subclass": case(lambda: subclassed(built=True), (X, ONE_HOT), "as one-hot labels have"),
    "one-hot for an unbuilt subclass": case(lambda: subclassed(built=False), (X, ONE_HOT), "as one-hot labels have"),
    "one-hot for the loss function": case(
        lambda: model(losses.sparse_categorical_crossentropy), (X, ONE_HOT), "as one-hot labels have"
    ),
    "masks as channels": case(
        segmentation, (IMAGES, np.eye(3, dtype=np.float32)[MASKS]), r"labels of shape \(4, 4, 3\) per row"
    ),
    "one mask row too few": case(segmentation, (IMAGES, MASKS[:, :3]), r"shape \(4, 4\).* got shape \(3, 4\)"),
    "fractions": case(model, (X, Y + np.float32(0.5)), r"whole numbers; got fractions from 0\.5 to 2\.5"),
    "scores instead of classes": case(model, (X, Y / 2), "or use a loss for numbers"),
    "NaN among indices": case(model, (X, with_fault(np.nan, Y)), "got labels from nan to nan"),
    "classes from 1": case(model, (X, Y + 1), "from 0 to 2, as the model has 3 outputs; got labels from 1 to 3"),
    "classes from 1 in one output": case(two_outputs, (X, (Y + 1, NUMBERS)), "got labels from 1 to 3"),
    "classes from 1 for a subclass": case(lambda: subclassed(built=True), (X, Y + 1), "got labels from 1 to 3"),
    "classes from 1 for an unbuilt model": case(unbuilt, (X, Y + 1), "got labels from 1 to 3"),
    "void without ignore_class": case(segmentation, (IMAGES, np.where(MASKS == 2, 255, MASKS)), "got labels from 0 to 255"),
    "another void": case(lambda: segmentation(ignore_class=254), (IMAGES, np.where(MASKS == 2, 255, MASKS)), "to 255"),
    "classes 1 and 2 for two (keras#14046)": case(
        lambda: model("binary_crossentropy", 1), (X, Y % 2 + 1), "labels from 0 to 1.*got labels from 1 to 2"
    ),
    "labels of -1 and 1 for a probability": case(
        lambda: model(losses.BinaryCrossentropy(), 1), (X, Y % 2 * 2 - 1), "got labels from -1 to 1"
    ),
    "indices for probabilities": case(
        lambda: model("binary_crossentropy"), (X, Y), r"labels of shape \(3,\) per row.* got shape \(\)"
    ),
    "one number for three": case(lambda: model("mse"), (X, NUMBERS), r"of shape \(3,\).*got shape \(1,\)"),
    "three numbers for one": case(lambda: model("mae", 1), (X, X[:, :3]), r"of shape \(1,\).*got shape \(3,\)"),
    "NaN among numbers": case(lambda: model("mse", 1), (X, with_fault(np.nan)), "finite numbers as labels"),
    "infinity among numbers": case(lambda: model("huber", 1), (X, with_fault(np.inf)), "finite numbers as labels"),
    "no labels": case(model, (X, None), r"got y=None\. Give \(x, y\)"),
    "a tuple of inputs alone": case(model, (X,), r"a tuple \(x, y\).*gets \(x, x\)"),
    "inputs alone": case(model, X, "got numpy.ndarray. Give the arrays of all rows"),
    "four arrays": case(model, (X, Y, Y, Y), r"or \(x, y, sample_weight\)"),
    "empty labels": case(model, (X, ()), "at least one array as y of data; got an empty tuple"),
    "labels without columns": case(model, (X, Y[:, None][:, :0]), r"int32 of shape \(60, 0\) as y"),
    "empty inputs": case(model, ({}, Y), "at least one array as x of data; got an empty dict"),
    "labels with other names": case(
        two_outputs, (X, {"kind": Y, "height": NUMBERS}), r"as a dict with the keys \['kind', 'size'\]"
    ),
    "labels with other names for named outputs": case(
        lambda: two_outputs(named=True), (X, {"kind": Y, "height": NUMBERS}), "structure of the model's outputs"
    ),
    "labels for one output of two": case(two_outputs, (X, Y), r"outputs, \(array, array\); got array"),
    "one-hot labels of more classes than outputs (keras#7339)": case(
        lambda: model(ONE_PER_CLASS), (X, np.eye(5)[Y]), r"of shape \(3,\) per row.* got shape \(5,\)"
    ),
    "a text of labels for one output (keras#17368)": case(model, (X, MASKS[:, 0]), r"of shape \(\) per.* got shape \(4,\)"),
    "the argmax as output (tensorflow#33855)": case(argmax, (X, Y), "not their argmax", ConfigError),
    # Weights.
    "weights of classes and rows (keras#497)": case(
        model, (X, Y, np.ones(ROWS)), "got both. Give one", ConfigError, **BY_CLASS
    ),
    "weights of classes for two outputs": case(
        two_outputs,
        (X, (Y, NUMBERS)),
        r"one array of labels with class_weight; got \(array, arr",
        ConfigError,
        **BY_CLASS,
    ),
    "weights of classes for masks": case(segmentation, (IMAGES, MASKS), "one label per row", ConfigError, **BY_CLASS),
    "weights of classes as a list (keras#1875)": case(
        model, (X, Y), r"dict\(enumerate\(weights", ConfigError, class_weight=[1.0, 2.0, 1.0]
    ),
    "balanced by name": case(model, (X, Y), "got 'balanced'. Give", ConfigError, class_weight="balanced"),
    "weights by name of class": case(
        model, (X, Y), "a key of class_weight as a whole", ConfigError, class_weight={"nv": 1.0}
    ),
    "weights by fractions (tensorflow#98283)": case(
        model, (X, Y), "a key of class_weight as a whole", ConfigError, class_weight={0.5: 1.0}
    ),
    "weights of two columns of labels (keras#16311)": case(
        lambda: model("mse", 2), (X, X[:, :2]), "classes 0 to 1 in class_weight", ConfigError, class_weight={0: 1.0, 2: 1.0}
    ),
    "weights as text": case(model, (X, Y), r"class_weight\[0\] as a finite number", ConfigError, class_weight={0: "2"}),
    "weights of classes for -1 and 1": case(
        lambda: model("hinge", 1),
        (X, Y % 2 * 2 - 1),
        "class indices as labels.*from -1 to 1",
        ConfigError,
        **BY_CLASS,
    ),
    "weights of another shape": case(
        model, (X, Y, np.ones((ROWS, 5))), r"sample_weight with one number per row, in data; got shape \(5,\)"
    ),
    "one weight per row of a sequence": case(
        sequence, (WORDS, TAGS, np.ones(ROWS)), r"of shape \(None,\) per row.*got shape \(\)"
    ),
    "one weight per mask": case(
        segmentation, (IMAGES, MASKS, np.ones(ROWS)), r"of shape \(4, 4\) per row.* or \(1, 1\), in"
    ),
    "named weights for a list of outputs": case(
        two_outputs,
        (X, {"kind": Y, "size": NUMBERS}, {"kind": np.ones(ROWS), "size": np.ones(ROWS)}),
        r"sample_weight in data with the structure of the model's outputs, \(array, array\)",
    ),
    "NaN among weights": case(model, (X, Y, with_fault(np.nan, np.ones(ROWS))), "in 1 row of sample_weight, first in"),
    "weights of another structure": case(
        two_outputs, (X, (Y, NUMBERS), (np.ones(ROWS),)), r"structure of y.*got \(array,\)"
    ),
    "weights per pixel for two outputs": case(
        two_outputs, (X, (Y, NUMBERS), np.ones((ROWS, 2))), "one sample_weight per row for several outputs"
    ),
    "fewer weights than rows": case(model, (X, Y, np.ones(59)), r"got \[59, 60\]: x has 60, y has 60, sample_w"),
    # Kinds of arrays.
    "a masked array": case(model, (np.ma.masked_greater(X, 1), Y), "got numpy.MaskedArray as x. The mask would be lost"),
    "masked labels": case(model, (X, np.ma.masked_equal(Y, 2)), "MaskedArray as y"),
    "a matrix": case(model, (np.matrix(X), Y), r"numpy.matrix as x\. Give np.asarray"),
    "lists of numbers (keras#3009)": case(model, (X.tolist(), Y.tolist()), r"float as x/0/0\. Give np.asarray"),
    "a list of labels": case(model, (X, Y.tolist()), r"got int as y/0"),
    "a list of rows (tensorflow#42175)": case(model, (list(X), Y), r"x/0 has 8.* \(61 in all\)\. A list .*np.stack"),
    "objects": case(model, (X.astype(object), Y), r"object of shape \(60, 8\) as x\. Cast it"),
    "text labels": case(model, (X, Y.astype(str)), r"as y\. Cast it .* index text"),
    "dates": case(model, (X.astype("datetime64[s]"), Y), "datetime64"),
    "complex numbers": case(model, (X.astype(complex), Y), "complex128"),
    "long doubles": case(model, (X.astype(np.longdouble), Y), "float128"),
    "one number": case(model, (np.float32(1), Y), "got numpy.float32 as x"),
    "an array of one number": case(model, (np.array(1.0), Y), r"float64 of shape \(\) as x"),
    "an array of another library": case(model, (Foreign(), Y), r"Foreign as x\. Give np.asarray"),
    "a tensor": case(model, (keras.ops.convert_to_tensor(X), Y), r"as x\. Give np.asarray"),
    "nothing": case(model, (None, Y), "got NoneType as x"),
    "None as data": case(model, None, "got NoneType. Give the arrays"),
    "a folder": case(model, "store/ham10000", r"Give ImageDataset.open\('store/ham10000'\).train"),
    "a generator": case(model, (batch for batch in ()), "got generator. Give the arrays of all rows"),
    "a set": case(model, ({1, 2}, Y), r"got set as x\. Give np.asarray"),
    # Structures and names.
    "numbers as keys": case(lambda: two_inputs(named=True), ({0: X, 1: X}, Y), "text as keys of x in data; got 0"),
    "other keys": case(lambda: two_inputs(named=True), ({"a": X, "c": X}, Y), r"keys \['a', 'b'\] in x.* got \['a', 'c'\]"),
    "another key too many (keras#23258)": case(
        lambda: two_inputs(named=True), ({"a": X, "b": X, "A": X}, Y), r"'A', 'a', 'b'\]"
    ),
    "a missing key": case(two_inputs, ({"a": X, "B": X}, Y), r"without \['b'\]"),
    "a wrong key": case(model, ({"image": X}, Y), "names of the model's inputs as keys"),
    "a tuple for unsorted keys (keras#20613)": case(
        lambda: two_inputs(named=True, swapped=True), ((X, X), Y), r"as a dict with the keys \['a', 'b'\]"
    ),
    "one input of two": case(two_inputs, (X, Y), r"Expected 2 inputs .*got 1\. Give x with the structure \(array, array"),
    "validation with two inputs": case(
        lambda: subclassed(built=True), (X, Y), "x of validation_data with the struc", validation_data=((X, X), Y)
    ),
    "validation without labels": case(model, (X, Y), r"Expected validation_data as a part", validation_data=(X,)),
    "validation labels of another kind": case(model, (X, Y), "in validation_data, for", validation_data=(X, ONE_HOT)),
    # Settings.
    "the class of a callback": case(
        model,
        (X, Y),
        r"class EarlyStopping\. Give EarlyStopping\(…\)",
        ConfigError,
        callbacks=[keras.callbacks.EarlyStopping],
    ),
    "a list of callbacks with None": case(model, (X, Y), "got a NoneType", ConfigError, callbacks=[None]),
    "a CallbackList": case(
        model, (X, Y), "Give the list of its callbacks", ConfigError, callbacks=keras.callbacks.CallbackList()
    ),
    "a large seed": case(model, (X, Y), "Expected seed as a whole number of at most 4294967295", ConfigError, seed=2**32),
    "a fraction of an epoch": case(model, (X, Y), "Expected epochs as a whole number", ConfigError, epochs=1.0),
    "epochs as text": case(model, (X, Y), "Expected epochs as a whole number", ConfigError, epochs="3"),
    "batch_size None": case(model, (X, Y), "Expected batch_size as a whole number", ConfigError, batch_size=None),
    "batch_size -1": case(model, (X, Y), "Expected batch_size as a whole number", ConfigError, batch_size=-1),
    "verbose as text": case(model, (X, Y), "Expected verbose as one of", ConfigError, verbose="1"),
    "verbose as an array": case(model, (X, Y), "Expected verbose as one of", ConfigError, verbose=np.array([1, 2])),
    "verbose as a bool": case(model, (X, Y), "Expected verbose as one of", ConfigError, verbose=True),
    "resume as text": case(model, (X, Y), "Expected resume as True or False; got 'no'", ConfigError, resume="no"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_before_any_job(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalBackend, "fit", lambda *_: pytest.fail("the job was launched"))
    given = case.of()
    before = given.get_weights()
    with pytest.raises(case.error, match=case.says):
        Trainer("local").fit(given, case.data, **{"verbose": 0, "batch_size": 20, **case.options})
    assert all((a == b).all() for a, b in zip(before, given.get_weights(), strict=False))


def big_endian(array: Any) -> Any:
    return array.astype(array.dtype.newbyteorder(">"))


def read_only(array: Any) -> Any:
    found = array.copy()
    found.setflags(write=False)
    return found


TRAINS = {
    "class indices": case(model, (X, Y)),
    "indices in a column": case(model, (X, Y[:, None])),
    "indices as floats": case(model, (X, Y.astype(np.float32))),
    "indices as int8": case(model, (X, Y.astype(np.int8))),
    "indices as uint64": case(model, (X, Y.astype(np.uint64))),
    "two classes as bools": case(lambda: model("binary_crossentropy", 1), (X, Y == 1)),
    "one-hot": case(lambda: model(ONE_PER_CLASS), (X, ONE_HOT)),
    "soft labels": case(lambda: model(ONE_PER_CLASS), (X, ONE_HOT * 0.8 + np.float32(0.05))),
    "Keras' choice of crossentropy": case(lambda: model("crossentropy"), (X, Y)),
    "numbers without a column (keras#14627)": case(lambda: model("mse", 1), (X, NUMBERS[:, 0])),
    "a loss per name": case(two_outputs, (X, {"size": NUMBERS, "kind": Y})),
    "named outputs": case(lambda: two_outputs(named=True), (X, {"size": NUMBERS, "kind": Y})),
    "one weight for two outputs": case(two_outputs, (X, (Y, NUMBERS), np.linspace(0, 1, ROWS))),
    "ignored labels": case(
        lambda: segmentation(ignore_class=255), (IMAGES, np.where(MASKS == 2, 255, MASKS).astype(np.uint8))
    ),
    "ignored labels of -1": case(
        lambda: segmentation(ignore_class=-1), (IMAGES, np.where(MASKS == 2, -1, MASKS.astype(np.int64)))
    ),
    "images without a channel": case(segmentation, (IMAGES, MASKS)),
    "weights per pixel (keras#15181)": case(segmentation, (IMAGES, MASKS, MASKS / 2)),
    "labels of a sequence": case(sequence, (WORDS, TAGS)),
    "weights of labels": case(sequence, (WORDS, TAGS, TAGS / 2)),
    "weights of rows of labels": case(sequence, (WORDS, TAGS, np.linspace(0, 1, ROWS)[:, None])),
    "a loss of one output of two": case(
        lambda: two_outputs(named=True, loss={"kind": "sparse_categorical_crossentropy"}), (X, {"kind": Y})
    ),
    "losses of one output": case(lambda: model(["mse", "mae"], 1), (X, NUMBERS)),
    "macro F1": case(lambda: model(ONE_PER_CLASS, metrics=[metrics.F1Score(average="macro")]), (X, ONE_HOT)),
    "weights of some classes (keras#23071)": case(model, (X, Y), class_weight={0: 2.0}),
    "weights of one-hot classes (keras#9186)": case(lambda: model(ONE_PER_CLASS), (X, ONE_HOT), class_weight={0: 2, 1: 3}),
    "weights of two classes": case(lambda: model("binary_crossentropy", 1), (X, Y % 2), class_weight={0: 2.0}),
    "weights of bools": case(lambda: model("binary_crossentropy", 1), (X, Y == 1), class_weight={1: 3.0}),
    "weights of uint8": case(model, (X, Y.astype(np.uint8)), class_weight={0: 2.0}),
    "no weights of classes": case(model, (X, Y), class_weight={}),
    "negative weights": case(model, (X, Y, np.linspace(-1, 1, ROWS))),
    "bools": case(model, (X > 0, Y)),
    "float16": case(model, (X.astype(np.float16), Y)),
    "float64": case(model, (X.astype(np.float64), Y)),
    "int8": case(model, ((X * 10).astype(np.int8), Y)),
    "uint64": case(model, ((X * X).astype(np.uint64), Y)),
    "every second row and column": case(model, (np.repeat(np.repeat(X, 2, 0), 2, 1)[::2, ::2], Y)),
    "Fortran's order": case(model, (np.asfortranarray(X), Y)),
    "read-only": case(model, (read_only(X), read_only(Y))),
    "big-endian": case(model, (big_endian(X), big_endian(Y))),
    "a list of one input": case(model, ([X], Y)),
    "inputs in a tuple": case(two_inputs, ((X, X * 2), Y)),
    "inputs in a list": case(two_inputs, ([X, X * 2], Y)),
    "inputs by name": case(two_inputs, ({"b": X * 2, "a": X}, Y)),
    "inputs by name, swapped (keras#20136)": case(lambda: two_inputs(swapped=True), ({"a": X, "b": X * 2}, Y)),
    "inputs by name and more": case(two_inputs, ({"a": X, "b": X * 2, "id": Y}, Y)),
    "named inputs": case(lambda: two_inputs(named=True), ({"b": X * 2, "a": X}, Y)),
    "named inputs, swapped": case(lambda: two_inputs(named=True, swapped=True), ({"b": X * 2, "a": X}, Y)),
    "named inputs in order": case(lambda: two_inputs(named=True), ([X, X * 2], Y)),
    "an OrderedDict": case(two_inputs, (OrderedDict(b=X * 2, a=X), Y)),
    "a namedtuple": case(two_inputs, (Pair(X, X * 2), Y)),
    "a subclass": case(lambda: subclassed(built=True), (X, Y)),
    "an unbuilt subclass": case(lambda: subclassed(built=False), (X, Y)),
    "a step without labels": case(own_step, (X, None)),
    "a step with float64 labels": case(own_step, (X, X[:, :3].astype(np.float64))),
    "a loss of a layer, without labels": case(without_loss, (X, None)),
    "a loss of a layer, with labels": case(without_loss, (X, X[:, :3])),
    "callbacks=None": case(model, (X, Y), callbacks=None),
    "one callback": case(model, (X, Y), callbacks=keras.callbacks.TerminateOnNaN()),
    "callbacks in lists": case(model, (X, Y), callbacks=[[keras.callbacks.TerminateOnNaN()]]),
    "numbers of NumPy": case(model, (X, Y), epochs=np.int64(1), seed=np.int32(SEED), verbose=np.int64(0)),
}


@pytest.mark.parametrize("case", TRAINS.values(), ids=TRAINS)
def test_trains_as_keras_does(case: Case) -> None:
    """Weights equal those of Keras' own fit to the bit."""
    ours, theirs = case.of(), case.of()
    result = Trainer("local").fit(ours, case.data, **{"batch_size": 20, "seed": SEED, "verbose": 0, **case.options})
    order = epoch_order(ROWS, SEED, 0)
    ordered = keras.tree.map_structure(lambda array: None if array is None else array[order], case.data)
    x, y, weights = keras.utils.unpack_x_y_sample_weight(ordered)
    by_class = case.options.get("class_weight")
    fit = theirs.fit(x, y, sample_weight=weights, class_weight=by_class, batch_size=20, shuffle=False, verbose=0)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(result.history) == set(fit.history)


def test_no_array_replaces_another(tmp_path: Path) -> None:
    """Names of columns are made from keys; {"a/b": …} and {"a": {"b": …}} had the same."""
    from dlspark.data import write_rows

    keys: list[Any] = ["a/b", "a%2Fb", "a.b", "", "/", "0", "x", "ä"]
    x = {**{key: np.full(3, number) for number, key in enumerate(keys)}, "a": {"b": np.full(3, 98), "": (np.full(3, 99),)}}
    rows = write_rows(Store(tmp_path), "rows", x, np.arange(3))
    with rows.open() as reader:
        found, _ = reader.batch(np.arange(3))
    assert {key: found[key][0] for key in keys} == {key: number for number, key in enumerate(keys)}
    assert (found["a"]["b"][0], found["a"][""][0][0]) == (98, 99)


def test_nan_in_inputs_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models handle it; the loss of the others is NaN, which stops the run."""
    monkeypatch.setattr(LocalBackend, "fit", lambda *_: (_ for _ in ()).throw(ArithmeticError))
    for wrong in (np.nan, np.inf, -np.inf):
        x = X.copy()
        x[[3, 9], 2] = wrong
        with caplog.at_level(logging.WARNING), pytest.raises(ArithmeticError):
            Trainer("local").fit(model(), (x, Y), verbose=0)
        assert "data has NaN or infinity in 2 rows of x, first in row 3." in caplog.text
        caplog.clear()


@pytest.mark.parametrize("store", [3, b"runs", ["runs"]])
def test_a_store_that_is_no_path(store: Any) -> None:
    with pytest.raises(ConfigError, match="Expected the path or URI of a folder"):
        Store(store)
    with pytest.raises(ConfigError, match="Expected the path or URI of a folder"):
        Trainer("local", store=store).fit(model(), (X, Y), verbose=0)


@pytest.mark.parametrize("name", [["local"], None, 3, {"local"}])
def test_a_backend_that_is_no_name(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"Expected the name of a backend, such as 'local'; got"):
        Trainer(name)
