"""The step ``fit``: join rows and features, fit a classifier on training rows, keep its predictions of test rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlspark.data import quoted, try_cast
from dlspark.ml.tables import read_table, write_table
from dlspark.spark import available_slots, require_slots, told_plainly
from dlspark.storage import Document, Folder, Result
from dlspark.study.pipelines import FitSettings, fit_classifier, predict_classes, with_classes

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

PIPELINE = "pipeline"


def keep_fit(folder: Folder, spark: SparkSession, settings: FitSettings) -> Document:
    """Fit, and keep the predictions of the test rows: columns id and probabilities.

    If the store is a local folder, Spark also saves the pipeline there; elsewhere it would need a Hadoop connector.

    Args:
        folder: has the results of ``prepare``, ``rows`` and one ``featurize`` for each of the settings' vectors.
        spark: the session.
        settings: the classifier and its features.
    """
    prepared, rows, *features = folder.results
    classes = prepared.document["classes"]
    require_slots(spark, 1)  # executors of a cluster may still be starting
    joined = _joined(spark, rows, features, classes, settings)
    # Sorted by id within partitions, because forests and boosting sample rows by position.
    train, test = (
        joined.filter(f"part = '{part}'").repartition(available_slots(spark), "id").sortWithinPartitions("id").persist()
        for part in ("train", "test")
    )
    try:
        with told_plainly():
            fitted = fit_classifier(train, settings, num_classes=len(classes))
            predicted = predict_classes(fitted, test, num_classes=len(classes))
            table = write_table(folder.store, predicted.select("id", "probabilities"))
        if folder.store.is_local:
            # With a scheme, because Spark takes a bare path to be on the cluster's default file system. Not Path.as_uri:
            # Hadoop would not decode "a%20b".
            fitted.pipeline.write().overwrite().save(f"file://{folder.store.child(PIPELINE).uri}")
    finally:
        train.unpersist()
        test.unpersist()
    about = {"params": fitted.params, "tried": fitted.tried, "explained": fitted.explained, "inputs": fitted.inputs}
    return {**about, "table": table, "pipeline": PIPELINE if folder.store.is_local else None}


def _joined(
    spark: SparkSession, rows: Result, features: Sequence[Result], classes: Sequence[str], settings: FitSettings
) -> DataFrame:
    """Rows with features: id, label, part, fold, the named metadata, and vectors ``features_0``, ``features_1`` etc."""
    from pyspark.ml.functions import array_to_vector

    table = read_table(spark, rows.store, rows.document["table"])
    # No other columns: one could have the name of a stage's output.
    named = [*dict.fromkeys([*settings.categorical, *settings.numeric])]
    table = table.select("id", "label", "part", "fold", *(quoted(name) for name in named))
    for number, result in enumerate(features):
        vectors = read_table(spark, result.store, result.document["table"], ["id", "features"])
        vector = array_to_vector("features").alias(f"features_{number}")
        table = table.join(vectors.select("id", vector), "id")
    numbers = ("boolean", "tinyint", "smallint", "int", "bigint", "float")
    for name, kind in table.select(*(quoted(name) for name in named)).dtypes:
        if name in settings.numeric or kind in numbers:
            table = table.withColumn(name, try_cast(name, "double"))  # what Imputer and VectorAssembler take
    return with_classes(table, classes)
