"""KerasImageClassifier: trained by Trainer, tuned by Spark, saved and loaded."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlspark.errors import ConfigError, DataError
from dlspark.images.decode import decode
from dlspark.ml import KerasImageClassificationModel, KerasImageClassifier
from tests.models.tiny import TINY

pytestmark = [pytest.mark.spark, pytest.mark.timeout(400)]

MOBILENET: dict[str, Any] = {"backbone": "mobilenetv2", "weights": None, "imageSize": (32, 32), "fineTune": "head"}
SMALL = {**MOBILENET, "backbone": TINY}


@pytest.fixture
def rows(spark: Any, pictures: list[bytes]) -> Any:
    from pyspark.ml.feature import StringIndexer

    table = [(number, image, "blue" if number % 2 else "red") for number, image in enumerate(pictures[:24])]
    named = spark.createDataFrame(table, "id int, image binary, colour string").coalesce(2)
    indexer = StringIndexer(inputCol="colour", outputCol="label", stringOrderType="alphabetAsc")
    return indexer.fit(named).transform(named)


def test_fit_predict_save_and_read(
    rows: Any, pictures: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from pyspark.sql import functions as F

    image = F.when(F.col("id") == 5, F.lit(b"no image")).otherwise(F.col("image"))
    spoilt = rows.withColumn("image", image)
    store = tmp_path / "store"
    stage = KerasImageClassifier(
        inputCol="image",
        **MOBILENET,
        batchNorm="frozen",
        dense=(8,),
        dropout=0.1,
        learningRate=0.01,
        epochs=2,
        batchSize=8,
        store=str(store),
    )
    with pytest.raises(DataError, match=r"Expected an image in every row: not a JPEG.*handleInvalid='skip'"):
        stage.fit(spoilt)
    assert not list(store.glob("shards-*"))
    with caplog.at_level(logging.WARNING, "dlspark.ml"):
        model = stage.setHandleInvalid("skip").fit(spoilt)
    assert "1 of 24 rows are left out" in caplog.text
    assert not list(store.glob("shards-*"))
    assert len(list(store.glob("run-*"))) == 1
    assert set(model.history) == {"loss", "accuracy"}
    assert len(model.history["loss"]) == 2
    assert model.uid == stage.uid

    assert model.transform(spoilt).filter("prediction IS NULL OR id = 5").count() == 0  # evaluators reject nulls
    found = model.setHandleInvalid("error").transform(spoilt).orderBy("id")
    assert found.columns == [*rows.columns, "probability", "prediction_error", "prediction"]
    got = found.collect()
    assert (got[5].probability, got[5].prediction) == (None, None)
    assert "not a JPEG" in got[5].prediction_error
    good = [row for row in got if row.id != 5]
    pixels = np.stack([decode(pictures[row.id], (32, 32)) for row in good]).astype("float32")
    truth = np.asarray(model.getModel()(pixels, training=False))
    np.testing.assert_allclose([row.probability.toArray() for row in good], truth, atol=1e-6)
    assert [row.prediction for row in good] == truth.argmax(axis=1).tolist()

    model.save(str(tmp_path / "model"))
    read = KerasImageClassificationModel.load(str(tmp_path / "model"))
    assert read.history == model.history
    assert read.transform(spoilt).orderBy("id").collect() == got
    stage.save(str(tmp_path / "stage"))
    assert KerasImageClassifier.load(str(tmp_path / "stage")).getDense() == [8]


def test_spark_tunes_it(rows: Any) -> None:
    from pyspark.ml.evaluation import MulticlassClassificationEvaluator
    from pyspark.ml.tuning import CrossValidator

    stage = KerasImageClassifier(inputCol="image", **SMALL, batchSize=8)
    evaluator = MulticlassClassificationEvaluator(metricName="accuracy")
    grid = [
        {stage.backbone: TINY, stage.fineTune: "head", stage.dropout: 0.0},
        {stage.backbone: replace(TINY, name="tuned"), stage.fineTune: "top:1", stage.dropout: 0.2},
    ]
    folds = CrossValidator(estimator=stage, estimatorParamMaps=grid, evaluator=evaluator, numFolds=2, seed=3).fit(rows)
    assert len(folds.avgMetrics) == 2
    model, best = folds.bestModel.getModel(), int(np.argmax(folds.avgMetrics))
    backbone = model.get_layer(["tiny", "tuned"][best])
    assert any(layer.trainable for layer in backbone.layers if layer.weights) == (best == 1)
    assert ("dropout" in [layer.name for layer in model.layers]) == (best == 1)
    assert evaluator.evaluate(folds.transform(rows)) >= 0


def test_it_trains_on_spark_workers(rows: Any) -> None:
    stage = KerasImageClassifier(inputCol="image", **SMALL, backend="mirrored", numWorkers=2, batchSize=8, epochs=1)
    model = stage.fit(rows)
    assert len(model.history["loss"]) == 1
    assert model.transform(rows).filter("prediction IS NULL").count() == 0


def test_what_cannot_work_is_refused(spark: Any, rows: Any) -> None:
    for settings, message in (
        ({"backbone": None}, "set backbone"),
        ({"inputCol": "imag"}, "Did you mean 'image'"),
        ({"labelCol": "colour"}, "of type string. Index texts"),
        ({"labelCol": "lable"}, "Did you mean 'label'"),
        ({"handleInvalid": "keep"}, "'error' or 'skip'"),
        ({"backend": "nowhere"}, "nowhere"),
        ({"fineTune": "some"}, "fine_tune"),
    ):
        with pytest.raises(ConfigError, match=message):
            KerasImageClassifier(**{"inputCol": "image", **MOBILENET, **settings}).fit(rows)
    stage = KerasImageClassifier(inputCol="image", **MOBILENET)
    for labels, message in ((0.5, "24 of 24 rows have none"), (0, "two classes or more"), (-1, "have none")):
        from pyspark.sql import functions as F

        with pytest.raises(DataError, match=message):
            stage.fit(rows.select("image", F.lit(labels).alias("label")))
    with pytest.raises(TypeError, match="Did you mean 'epochs'"):
        stage.setParams(epoch=3)
