"""ImageFeaturizer, KerasTransformer and SQL functions, on real Spark and real networks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlspark.errors import ConfigError
from dlspark.images.decode import decode
from dlspark.ml import ImageFeaturizer, KerasTransformer, register_udf

pytestmark = [pytest.mark.spark, pytest.mark.timeout(300)]


def frame(spark: Any, images: Any, kind: str = "binary") -> Any:
    return spark.createDataFrame(list(enumerate(images)), f"id int, image {kind}").repartition(2)


def column(found: Any, name: str) -> list[Any]:
    return [row[name] for row in found.orderBy("id").collect()]


def expected(model: Any, images: list[bytes], size: tuple[int, int] = (8, 8)) -> Any:
    return np.asarray(model(np.stack([decode(image, size) for image in images]).astype("float32"), training=False))


def cut(model: Any, layer: str) -> Any:
    import keras

    return keras.Model(model.inputs[0], model.get_layer(layer).output)


def plan(found: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    found.explain()
    return capsys.readouterr().out


def test_one_bad_row_of_64(
    spark: Any, classifier: Any, pictures: list[bytes], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """F25: only the bad row fails. The function runs once for both columns, however they are selected."""
    images: list[bytes | None] = [*pictures]
    images[7] = b"no image"
    stage = ImageFeaturizer(inputCol="image", outputCol="features", model=classifier, layer="pooling", batchBytes=5 * 192)
    with caplog.at_level(logging.WARNING, "dlspark"):
        found = stage.transform(frame(spark, images)).cache()
    assert not caplog.records  # dlspark's own sessions already send few rows at a time
    assert found.columns == ["id", "image", "features", "features_error"]
    errors, features = column(found, "features_error"), column(found, "features")
    assert features[7] is None
    assert "not a JPEG" in errors[7]
    assert [error for error in errors if error] == [errors[7]]
    good = [image for number, image in enumerate(pictures) if number != 7]
    np.testing.assert_allclose([f.toArray() for f in features if f], expected(cut(classifier, "pooling"), good), atol=1e-6)
    found.unpersist()
    found = stage.transform(frame(spark, images))
    asked = found.filter("features_error IS NULL AND id > 3").select("features", "features_error", "features")
    for each in (found, asked):
        assert plan(each, capsys).count("ArrowEvalPython [outcomes(") == 1


def test_a_backbone_gives_what_its_classifiers_see(spark: Any, pictures: list[bytes], tmp_path: Path) -> None:
    from dlspark.models.classifier import build_classifier

    model = build_classifier("mobilenetv2", 3, image_size=(32, 32), weights=None, augment=("flip",))
    file = tmp_path / "backbone.weights.h5"
    model.get_layer("mobilenetv2").save_weights(file)
    stage = ImageFeaturizer(inputCol="image", outputCol="features", backbone="mobilenetv2", weights=file, imageSize=(32, 32))
    rows = frame(spark, pictures[:6])
    pooled = np.stack([vector.toArray() for vector in column(stage.transform(rows), "features")])
    np.testing.assert_allclose(pooled, expected(cut(model, "pooling"), pictures[:6], (32, 32)), atol=1e-5)
    maps = column(stage.copy({stage.pooling: "none"}).transform(rows), "features")
    assert len(maps[0]) == 1280  # 1 x 1 maps at 32 pixels
    np.testing.assert_allclose(maps[0].toArray(), pooled[0], atol=1e-6)
    # The classifier, which nests the backbone as a model, gives the same.
    raw = ImageFeaturizer(inputCol="image", outputCol="features", model=model, layer="mobilenetv2").transform(rows)
    np.testing.assert_allclose([v.toArray() for v in column(raw, "features")], [v.toArray() for v in maps], atol=1e-5)


def test_paths_and_image_structs(spark: Any, classifier: Any, pictures: list[bytes], tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(pictures[number])
    stage = ImageFeaturizer(inputCol="image", outputCol="out", errorCol="why", model=classifier)
    truth = expected(classifier, pictures[:4])
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    from_paths = stage.transform(frame(spark, [*paths, str(tmp_path / "gone.png")], "string"))
    np.testing.assert_allclose([v.toArray() for v in column(from_paths, "out")[:4]], truth, atol=1e-6)
    assert "No such file" in column(from_paths, "why")[4]
    (tmp_path / "4.png").write_bytes(b"no image")
    structs = spark.read.format("image").load(str(tmp_path)).selectExpr("image.origin AS id", "image")
    from_structs = stage.transform(structs)
    np.testing.assert_allclose([v.toArray() for v in column(from_structs, "out")[:4]], truth, atol=1e-6)
    assert "could not decode" in column(from_structs, "why")[4]


def test_the_network_is_loaded_once_in_every_process(spark: Any, tmp_path: Path) -> None:
    """A custom layer, which is sent with the stage, records each load and the threads that Spark gave the task."""
    import keras

    @keras.saving.register_keras_serializable(package="tests")
    class Tells(keras.layers.Layer):
        def __init__(self, folder: str, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.folder = folder

        def build(self, shape: Any) -> None:
            import os
            import uuid

            import tensorflow as tf

            threads = tf.config.threading.get_intra_op_parallelism_threads()
            with open(f"{self.folder}/{uuid.uuid4().hex}", "w") as file:
                file.write(f"{os.getpid()} {threads}")

        def call(self, inputs: Any) -> Any:
            return inputs * 2

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "folder": self.folder}

    stage = KerasTransformer(
        inputCol="x", outputCol="y", model=keras.Sequential([keras.Input((2,)), Tells(str(tmp_path))]), batchBytes=16
    )
    for file in tmp_path.iterdir():
        file.unlink()
    tasks = 12
    rows = spark.range(40).selectExpr("id", "array(id, id + 1) AS x").repartition(tasks)
    for _ in range(2):
        found = stage.transform(rows)
        assert [list(v) for v in column(found, "y")] == [[2 * n, 2 * n + 2] for n in range(40)]
    told = [file.read_text().split() for file in tmp_path.iterdir()]
    # Spark reuses idle processes in turn, also those of earlier queries: one-vs-rest uses a process per class and slot.
    assert len({pid for pid, _ in told}) == len(told) < 2 * tasks
    assert {threads for _, threads in told} == {"1"}


def test_vectors_and_nested_arrays(spark: Any) -> None:
    import keras
    from pyspark.ml.feature import VectorAssembler
    from pyspark.ml.linalg import Vectors
    from pyspark.mllib.linalg import Vectors as OldVectors

    layers = [keras.Input((2, 2)), keras.layers.Flatten(), keras.layers.Dense(3, name="inner"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    rows = spark.createDataFrame(
        [(0, 1.0, 2.0, 3.0, 4.0), (1, 5.0, 6.0, 7.0, 8.0)], "id int, a double, b double, c double, d double"
    )
    inputs = VectorAssembler(inputCols=["a", "b", "c", "d"], outputCol="vector").transform(rows)
    inputs = inputs.selectExpr("*", "array(array(int(a), int(b)), array(int(c), int(d))) AS nested", "array(a, b) AS short")
    truth = np.asarray(cut(model, "inner")(np.arange(1.0, 9).reshape(2, 2, 2).astype("float32")))
    stage = KerasTransformer(outputCol="out", model=model, layer="inner")
    for name in ("vector", "nested"):
        found = column(stage.setInputCol(name).transform(inputs), "out")
        np.testing.assert_allclose([vector.toArray() for vector in found], truth, atol=1e-5)
    words = keras.Sequential([keras.Input((2,), dtype="int32"), keras.layers.Embedding(9, 1)])
    ids = KerasTransformer(inputCol="short", outputCol="embedded", model=words).transform(inputs)
    table = np.asarray(words.layers[0].embeddings)[:, 0]
    np.testing.assert_allclose([vector.toArray() for vector in column(ids, "embedded")], [table[[1, 2]], table[[5, 6]]])
    colours = keras.Sequential(
        [keras.Input((2, 2, 3)), keras.layers.Flatten(), keras.layers.Dense(1, kernel_initializer="ones")]
    )
    tall = spark.createDataFrame([(0, Vectors.dense(np.arange(12) + 0.5)), (1, None)], ["id", "tall"])
    totals = KerasTransformer(inputCol="tall", outputCol="total", model=colours).transform(tall)
    assert [vector and vector.toArray().tolist() for vector in column(totals, "total")] == [[72.0], None]
    assert column(totals, "total_error") == [None, "the value is null"]
    holed = spark.createDataFrame([(0, [1.0, None, 3.0, 4.0]), (1, [1.0, 2.0, 3.0, 4.0])], "id int, holed array<double>")
    assert column(stage.setInputCol("holed").transform(holed), "out_error") == ["the value is null", None]
    assert (
        "expected 4 numbers, of shape (2, 2); got 2" in column(stage.setInputCol("short").transform(inputs), "out_error")[0]
    )
    older = spark.createDataFrame([(0, OldVectors.dense([1, 2, 3, 4])), (1, OldVectors.dense([5, 6, 7, 8]))], ["id", "old"])
    found = column(stage.setInputCol("old").transform(older), "out")
    np.testing.assert_allclose([vector.toArray() for vector in found], truth, atol=1e-5)
    with pytest.raises(ConfigError, match="vectors or arrays of numbers in column 'a'; it is of type double"):
        stage.setInputCol("a").transform(inputs)
    with pytest.raises(ConfigError, match="distinct names in the DataFrame; got 'b' and 'B'"):
        stage.setInputCol("vector").transform(inputs.selectExpr("*", "a AS B"))


def test_sql(spark: Any, classifier: Any, pictures: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register_udf(spark, "red_or_blue", classifier)
    frame(spark, [*pictures[:4], b"no image", None]).createOrReplaceTempView("photos")
    found = spark.sql("SELECT id, red_or_blue(image) AS p, red_or_blue(image)[0] AS red FROM photos ORDER BY id")
    assert found.schema["p"].dataType.simpleString() == "array<float>"
    assert plan(found, capsys).count("ArrowEvalPython [red_or_blue(") == 1
    rows = found.collect()
    np.testing.assert_allclose([row.p for row in rows[:4]], expected(classifier, pictures[:4]), atol=1e-6)
    assert [row.p for row in rows[4:]] == [None, None]
    assert rows[0].red == rows[0].p[0]

    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, image in zip(paths, pictures, strict=False):
        Path(path).write_bytes(image)
    frame(spark, paths, "string").createOrReplaceTempView("files")
    by_path = spark.sql("SELECT red_or_blue(image) AS p FROM files ORDER BY id").collect()
    # Not bit by bit: the last digits of a row may differ between a batch of three and a batch of four.
    np.testing.assert_allclose([row.p for row in by_path], [row.p for row in rows[:3]], rtol=0, atol=1e-6)

    import keras

    numbers = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    register_udf(spark, "added", numbers)
    assert spark.sql("SELECT added(array(1.5, 2)) AS sum").collect()[0]["sum"] == [3.5]


def test_pipelines_and_grids(spark: Any, classifier: Any, pictures: list[bytes]) -> None:
    from pyspark.ml import Pipeline
    from pyspark.ml.classification import LogisticRegression
    from pyspark.ml.evaluation import MulticlassClassificationEvaluator
    from pyspark.ml.tuning import CrossValidator, ParamGridBuilder

    stage = ImageFeaturizer(inputCol="image", outputCol="features", model=classifier)
    pipeline = Pipeline(stages=[stage, LogisticRegression(maxIter=5)])
    grid = ParamGridBuilder().addGrid(stage.layer, ["pooling", "probabilities"]).build()
    evaluator = MulticlassClassificationEvaluator(metricName="accuracy")
    rows = frame(spark, pictures[:24]).selectExpr("image", "id % 2 AS label").coalesce(1)
    model = CrossValidator(
        estimator=pipeline, estimatorParamMaps=grid, evaluator=evaluator, numFolds=2, seed=1, parallelism=2
    ).fit(rows)
    assert model.avgMetrics[0] > 0.9
    assert model.bestModel.stages[0].getLayer() == "pooling"
    assert evaluator.evaluate(model.transform(rows)) > 0.9
    assert not stage.isSet(stage.layer)


def test_params(classifier: Any) -> None:
    stage = ImageFeaturizer(inputCol="a", outputCol="b", backbone="mobilenetv2", weights=None)
    assert (stage.getWeights(), stage.getErrorCol(), stage.getPooling()) == (None, "b_error", "avg")
    assert "backbone: network of keras.applications: resnet50" in stage.explainParams()
    copy = stage.copy({stage.backbone: "xception", stage.imageSize: (71, 80)})
    assert (copy.uid, copy.getBackbone(), copy.getImageSize()) == (stage.uid, "xception", [71, 80])
    assert stage.getBackbone() == "mobilenetv2"
    assert not stage.isDefined(stage.imageSize)
    assert copy.setErrorCol("c").getErrorCol() == "c"
    loaded = KerasTransformer(model=classifier).getModel()
    assert [layer.name for layer in loaded.layers][1:] == [layer.name for layer in classifier.layers]
    for wrong in ({"backbone": "resnet"}, {"imageSize": (1, 2, 3)}, {"resize": "fill"}, {"weights": 3}, {"pooling": "max"}):
        with pytest.raises(TypeError, match=r"Did you mean|Expected|Known: "):
            ImageFeaturizer(**wrong)
    with pytest.raises(ConfigError, match="got a dict"):
        KerasTransformer(model={})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set backbone or model"),
        ({"backbone": "mobilenetv2", "model": True}, "and not both"),
        ({"backbone": "mobilenetv2", "layer": "pooling"}, "layer is for a model"),
        ({"model": True, "layer": "poling"}, "Did you mean 'pooling'"),
        ({"model": True, "imageSize": (9, 9)}, r"= \(8, 8\); got \[9, 9\]. Leave it out"),
        ({"model": True, "inputCol": "imag"}, "Did you mean 'image'"),
        ({"model": True, "inputCol": "id"}, "it is of type int"),
        ({"model": True, "outputCol": "ID"}, "'ID' exists already"),
        ({"model": True, "batchBytes": 0}, "batch_bytes"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    settings: dict[str, Any], message: str, spark: Any, classifier: Any
) -> None:
    given = {"inputCol": "image", "outputCol": "out", **settings}
    if "model" in given:
        given["model"] = classifier
    with pytest.raises(ConfigError, match=message):
        ImageFeaturizer(**given).transform(frame(spark, [b""]))


def test_networks_of_the_wrong_kind_are_refused(spark: Any, classifier: Any) -> None:
    import keras

    rows = frame(spark, [b""])
    dense = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ConfigError, match="For arrays use KerasTransformer"):
        ImageFeaturizer(inputCol="image", outputCol="o", model=dense).transform(rows)
    two = keras.Input((2,)), keras.Input((2,))
    with pytest.raises(ConfigError, match="has 2 and 1 that Keras knows"):
        KerasTransformer(model=keras.Model(two, keras.layers.add(two)))
    with pytest.raises(ConfigError, match="holds a Lambda"):
        KerasTransformer(model=keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda value: value)]))
    with pytest.raises(ConfigError, match="any number of rows; 'sixes' takes 6"):
        KerasTransformer(model=keras.Sequential([keras.Input(batch_shape=(6, 2)), keras.layers.Dense(1)], name="sixes"))
    with pytest.raises(ConfigError, match="Expected resize as one of 'fit', 'crop'; got 'fill'"):
        register_udf(spark, "filled", classifier, resize="fill")
    with pytest.raises(ConfigError, match="rows of a fixed shape"):
        register_udf(spark, "open", keras.Sequential([keras.Input((None, 2)), keras.layers.Dense(1)]))


def test_a_session_that_hands_over_many_images_is_warned_of(
    spark: Any, classifier: Any, caplog: pytest.LogCaptureFixture
) -> None:
    key = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(key)
    stage = ImageFeaturizer(inputCol="image", outputCol="out", model=classifier)
    try:
        for rows, told in (("10000", "10,000 rows at a time: with images of 200 kB that is 2.0 GB"), ("0", "all its rows")):
            spark.conf.set(key, rows)
            caplog.clear()
            stage.transform(frame(spark, ["a"], "string"))
            assert not caplog.records
            stage.transform(frame(spark, [b"a"]))
            assert told in caplog.text
            assert key in caplog.text
    finally:
        spark.conf.set(key, before)
