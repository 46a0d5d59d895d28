"""A Spark DataFrame as data trains like the arrays it was made from; bad labels are refused."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from dlspark import ConfigError, DataError, Trainer
from dlspark.local import LocalBackend
from dlspark.testing import toys

pytestmark = [pytest.mark.spark, pytest.mark.timeout(120)]

X, Y = toys.separable(60)


def frame(spark: Any, labels: Any) -> Any:
    rows = [([float(value) for value in x], int(y)) for x, y in zip(X, labels, strict=True)]
    return spark.createDataFrame(rows, "features array<float>, label int").coalesce(1)


def test_it_trains_as_the_arrays_do(spark: Any) -> None:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 16, "verbose": 0}
    from_frame = Trainer("local").fit(toys.dense_classifier(), frame(spark, Y), validation_data=frame(spark, Y), **settings)
    from_arrays = Trainer("local").fit(toys.dense_classifier(), (X, Y), validation_data=(X, Y), **settings)
    assert from_frame.history == from_arrays.history
    assert all((a == b).all() for a, b in zip(from_frame.weights, from_arrays.weights, strict=True))


def test_labels_outside_the_classes_are_refused(spark: Any) -> None:
    with pytest.raises(DataError, match="class indices from 0 to 2, as the model has 3 outputs; got labels from 0 to 3"):
        Trainer("local").fit(toys.dense_classifier(), frame(spark, np.where(Y == 2, 3, Y)), verbose=0)


def test_two_columns_of_one_name_are_refused(spark: Any) -> None:
    rows = frame(spark, Y)
    with pytest.raises(ConfigError, match="distinct names in data; got 'label' and 'label'"):
        Trainer("local").fit(toys.dense_classifier(), rows.select("features", "label", "label"), verbose=0)


def test_a_frame_without_rows_is_refused(spark: Any) -> None:
    with pytest.raises(DataError, match="row"):
        Trainer("local").fit(toys.dense_classifier(), frame(spark, Y).limit(0), verbose=0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (["features", "label + 0.5D as label"], DataError, "whole numbers; got fractions from 0.5 to 2.5"),
        (["features", "double('NaN') as label"], DataError, "column 'label' in data; got .* nulls or NaN"),
        (
            ["features", "if(label = 1, null, label) as label"],
            DataError,
            r"of column .label. in data; got 23 nulls",
        ),
        (["features", "cast(label as string) as label"], ConfigError, "got the type string.*StringIndexer"),
        (["features", "array(1.0f, 0.0f, 0.0f) as label"], DataError, "as one-hot labels have"),
        (["slice(features, 2, 7) as features", "label"], DataError, r"rows of shape \(8,\) .*got \(7,\)"),
        (["features", "label as x", "label as X"], ConfigError, "distinct names in data; got 'x' and 'X'"),
        (["label"], DataError, "Expected feature columns in data and the label column last"),
    ],
)
def test_frames_that_do_not_fit_are_refused(
    spark: Any, monkeypatch: pytest.MonkeyPatch, changed: list[str], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(LocalBackend, "fit", lambda *_: pytest.fail("the job was launched"))
    with pytest.raises(error, match=message):
        Trainer("local").fit(toys.dense_classifier(), frame(spark, Y).selectExpr(*changed), verbose=0)


def test_ignored_labels_are_no_classes(spark: Any) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=255)
    void = np.where(Y == 1, 255, Y)
    result = Trainer("local").fit(toys.dense_classifier(loss=loss, metrics=[]), frame(spark, void), verbose=0)
    assert np.isfinite(result.history["loss"]).all()
