"""One classifier of a study: kept rows and features joined, fitted on training rows, its predictions of test rows kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dlspark.data import quoted
from dlspark.ml.tables import read_table, write_table
from dlspark.spark import available_slots, require_slots, told_plainly
from dlspark.storage import Document, Folder, Result
from dlspark.study.pipelines import FitSettings, fit_classifier, predict_classes, with_classes

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

PIPELINE = "pipeline"


def keep_fit(folder: Folder, spark: SparkSession, settings: FitSettings) -> Document:
    """Fit, and keep what the model says of the test rows: columns id and probabilities.

    The pipeline is saved beside it, by Spark, in a store that is a folder; in others Spark would need a Hadoop connector.

    Args:
        folder: needs the results of ``prepare``, ``rows`` and then one of ``featurize`` for each of the settings' vectors.
        spark: the session.
        settings: of the classifier.
    """
    prepared, rows, *features = folder.results
    classes = prepared.document["classes"]
    require_slots(spark, 1)  # a cluster's executors may still be on their way
    joined = _joined(spark, rows, features, classes, settings)
    # Sorted in partitions by id: forests and boosting draw rows by their place.
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
            # With its scheme: to Spark a bare path is one of the cluster's default file system.
            fitted.pipeline.write().overwrite().save(Path(folder.store.child(PIPELINE).uri).as_uri())
    finally:
        train.unpersist()
        test.unpersist()
    told = {"params": fitted.params, "tried": fitted.tried, "explained": fitted.explained, "inputs": fitted.inputs}
    return {**told, "table": table, "pipeline": PIPELINE if folder.store.is_local else None}


def _joined(
    spark: SparkSession, rows: Result, features: Sequence[Result], classes: Sequence[str], settings: FitSettings
) -> DataFrame:
    """Rows with their features: id, label, part, fold, the metadata that is named, and ``features_0`` …, vectors."""
    from pyspark.ml.functions import array_to_vector
    from pyspark.sql import functions as F

    table = read_table(spark, rows.store, rows.document["table"])
    # No others: one may be called as a stage calls its output.
    named = [*dict.fromkeys([*settings.categorical, *settings.numeric])]
    table = table.select("id", "label", "part", "fold", *(quoted(name) for name in named))
    for number, result in enumerate(features):
        vectors = read_table(spark, result.store, result.document["table"], ["id", "features"])
        vector = array_to_vector("features").alias(f"features_{number}")
        table = table.join(vectors.select("id", vector), "id")
    numbers = ("boolean", "tinyint", "smallint", "int", "bigint", "float")
    for name, kind in table.select(*(quoted(name) for name in named)).dtypes:
        if name in settings.numeric or kind in numbers:
            table = table.withColumn(name, F.col(name).cast("double"))  # what Imputer and VectorAssembler take
    return with_classes(table, classes)
