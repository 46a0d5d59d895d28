"""A Spark DataFrame as training data: the executors write the rows to the store; the driver never holds them.

python spark_dataframe.py [BACKEND [WORKERS]]
"""

from __future__ import annotations

import sys

import keras
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import DataFrame

from dlspark import Trainer
from dlspark.spark import get_session


def table(rows: int) -> DataFrame:
    """Return the columns id, features (a vector) and label (0 or 1)."""
    numbers = get_session(2).range(rows).selectExpr("id", "sin(id) AS a", "cos(1.7 * id) AS b")
    labelled = numbers.selectExpr("*", "int(a > b) AS label")
    # This makes one model input of several columns. Separate columns would each be an input.
    assembled = VectorAssembler(inputCols=["a", "b"], outputCol="features").transform(labelled)
    return assembled.select("id", "features", "label")


def classifier() -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def main(backend: str = "local", workers: str = "1") -> None:
    rows = table(1000)
    train = rows.where("id % 5 > 0").select("features", "label")  # the last column is the label
    test = rows.where("id % 5 = 0").select("features", "label")
    result = Trainer(backend, num_workers=int(workers)).fit(
        classifier(), train, validation_data=test, epochs=5, batch_size=32, seed=7
    )
    seen = sum(worker.rows for worker in result.workers)
    print(f"{seen} rows in {len(result.epoch_seconds)} epochs, accuracy {result.history['val_accuracy'][-1]:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
