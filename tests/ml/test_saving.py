"""Saved stages: loading in a fresh process, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dlspark.errors import ConfigError, DataError
from dlspark.ml import ImageFeaturizer, KerasTransformer

pytestmark = [pytest.mark.spark, pytest.mark.timeout(300)]

FRESH = """
import json, sys
from pyspark.ml import PipelineModel
from dlspark.spark import get_session

spark = get_session(1)
rows = spark.read.parquet(sys.argv[1] + "/rows")
found = PipelineModel.load(sys.argv[1] + "/pipeline").transform(rows)
found.select("id", "features", "seen", "probability").write.parquet(sys.argv[1] + "/fresh")
spark.stop()
"""


def test_a_saved_pipeline_predicts_alike_in_a_fresh_process(spark: Any, pictures: list[bytes], tmp_path: Path) -> None:
    """Predictions are equal bit by bit, although the weights were drawn at random on the stage's first use."""
    import keras
    from pyspark.ml import Pipeline
    from pyspark.ml.classification import LogisticRegression

    labelled = [(number, image, float(number % 2)) for number, image in enumerate(pictures[:16])]
    rows = spark.createDataFrame(labelled, "id int, image binary, label double").coalesce(1)
    rows.write.parquet(str(tmp_path / "rows"))
    pipeline = Pipeline(
        stages=[
            ImageFeaturizer(
                inputCol="image",
                outputCol="features",
                backbone="mobilenetv2",
                weights=None,
                imageSize=(32, 32),
                batchBytes=9216,
            ),
            KerasTransformer(
                inputCol="features", outputCol="seen", model=keras.Sequential([keras.Input((1280,)), keras.layers.Dense(3)])
            ),
            LogisticRegression(featuresCol="seen", maxIter=3),
        ]
    )
    rows = spark.read.parquet(str(tmp_path / "rows"))
    model = pipeline.fit(rows)
    model.save(str(tmp_path / "pipeline"))
    stages = sorted((tmp_path / "pipeline" / "stages").iterdir())
    for stage in stages[:2]:
        assert {"metadata", "network.keras"} <= {path.name for path in stage.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    columns = ["id", "features", "seen", "probability"]
    here = sorted(model.transform(rows).select(columns).collect())
    there = sorted(spark.read.parquet(str(tmp_path / "fresh")).collect())
    assert len(here) == 16
    assert here == there


def test_params_of_both_kinds_come_back(spark: Any, classifier: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "stage")
    stage = ImageFeaturizer(inputCol="a", errorCol="why", model=classifier, layer="pooling", weights=None)
    stage.save(path)
    found = ImageFeaturizer.load(path)
    assert found.uid == stage.uid
    assert (found.getInputCol(), found.getErrorCol(), found.getLayer()) == ("a", "why", "pooling")
    assert found.isSet(found.weights)
    assert found.getWeights() is None
    assert not found.isSet(found.resize)
    for ours, theirs in zip(classifier.weights, found.getModel().weights, strict=True):
        assert (ours.numpy() == theirs.numpy()).all()
    with pytest.raises(Exception, match="already exists"):
        stage.save(path)
    stage.write().overwrite().save(path)
    with pytest.raises(AssertionError, match="KerasTransformer"):
        KerasTransformer.load(path)


def test_what_lies_in_a_folder_is_looked_at_first(spark: Any, classifier: Any, tmp_path: Path) -> None:
    import keras

    path = tmp_path / "stage"
    KerasTransformer(inputCol="a", outputCol="b", model=classifier).save(str(path))
    file = path / "network.keras"
    (path / ".network.keras.crc").unlink()  # Hadoop's checksum would detect the change too
    keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()]).save(file)
    with pytest.raises(DataError, match="is not the network that was saved with this stage"):
        KerasTransformer.load(str(path))
    keras.Sequential([keras.Input((1,)), keras.layers.Lambda(lambda value: value)]).save(file)
    with pytest.raises(ConfigError, match="Lambda"):
        KerasTransformer.load(str(path))
    with pytest.raises(ConfigError, match="needs a network"):
        KerasTransformer(inputCol="a").save(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    metadata = json.loads(next((path / "metadata").glob("part-*")).read_text())
    assert metadata["class"] == "dlspark.ml.transformer.KerasTransformer"
    assert "model" not in metadata["paramMap"]
