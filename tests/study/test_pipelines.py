"""Pipelines on generated features: which rows each stage is fitted on, and the accuracy on separable classes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from dlspark.data.split import undersampled
from dlspark.errors import ConfigError
from dlspark.study.pipelines import (
    SPARKS_LARGEST_COVARIANCE,
    FitSettings,
    check_params,
    fit_classifier,
    predict_classes,
    with_classes,
)
from dlspark.study.steps import with_folds

pytestmark = pytest.mark.spark

CLASSES = ("a", "b", "c")
SETTINGS = FitSettings(
    algorithm="logistic_regression",
    vectors=("one", "two"),
    categorical=("sex",),
    numeric=("age",),
    pca=3,
    params={"maxIter": 2},
    grid={},
    folds=2,
)


def table(spark: Any, rows: int = 54) -> Any:
    """Training rows of three separable classes: features in two columns, a string, and a number that is sometimes NaN."""
    from pyspark.ml.functions import array_to_vector
    from pyspark.sql import functions as F

    draw = np.random.default_rng(0)
    labels = np.arange(rows) % 3
    x = draw.normal(size=(rows, 6))
    x[np.arange(rows), labels] += 4
    records = [
        (
            f"{i:03d}",
            int(labels[i]),
            f"g{i // 9}",
            i // 3 % 2,
            x[i, :4].tolist(),
            x[i, 4:].tolist(),
            "fm"[i % 2],
            float("nan") if i % 10 == 0 else 40.0 + 5 * int(labels[i]),
        )
        for i in range(rows)
    ]
    columns = "id string, label int, group string, fold int, x array<float>, y array<float>, sex string, age double"
    df = spark.createDataFrame(records, columns).coalesce(1)
    vectors = {"one": array_to_vector("x"), "two": array_to_vector("y"), "part": F.lit("train")}
    return with_classes(df.withColumns(vectors).drop("x", "y"), CLASSES).persist()


def accuracy(predicted: Any) -> float:
    rows = predicted.collect()
    assert all(abs(sum(row.probabilities) - 1) < 1e-6 and len(row.probabilities) == 3 for row in rows)
    return float(np.mean([int(np.argmax(row.probabilities)) == row.label for row in rows]))


@pytest.mark.slow
def test_each_fold_fits_its_own_rows_once(spark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score of a fold equals that of a pipeline fitted on the other folds by hand; PCA is fitted once for each fold."""
    from pyspark.ml import Pipeline
    from pyspark.ml.evaluation import MulticlassClassificationEvaluator
    from pyspark.ml.feature import PCA

    from dlspark.study import pipelines

    settings = dataclasses.replace(SETTINGS, grid={"regParam": [0.01, 5.0]})
    train = table(spark)
    fits: list[int] = []
    original = PCA._fit
    monkeypatch.setattr(PCA, "_fit", lambda self, dataset: fits.append(dataset.count()) or original(self, dataset))
    found = fit_classifier(train, settings, num_classes=3)
    assert fits == [27, 27, 54]  # the last fit is on all training rows
    monkeypatch.undo()

    scores = []
    for fold in range(2):
        last = pipelines._built(settings, 3)
        others = train.filter(f"fold != {fold}")
        by_hand = Pipeline(stages=[*pipelines._preparation(settings), last]).fit(others, {last.regParam: 5.0})
        scored = by_hand.transform(train.filter(f"fold = {fold}"))
        scores.append(MulticlassClassificationEvaluator(metricName="f1").evaluate(scored))
    assert found.tried[1]["f1"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert found.tried[1]["params"] == {"regParam": 5.0}
    assert found.params == {"maxIter": 2, "regParam": 0.01}
    assert found.inputs == 3 + 2 + 1
    assert accuracy(predict_classes(found, train, num_classes=3)) > 0.8


def test_folds_keep_groups_whole_and_do_not_move(spark: Any) -> None:
    train = table(spark).drop("fold", "one", "two")
    by_row = {row.id: row.fold for row in with_folds(train, 2, stratify=True, group=None, seed=0).collect()}
    again = with_folds(train.repartition(3), 2, stratify=True, group=None, seed=0).collect()
    assert by_row == {row.id: row.fold for row in again}
    assert sorted(np.bincount(list(by_row.values()))) == [27, 27]
    folds_of: dict[str, set[int]] = {}
    for row in with_folds(train, 2, stratify=True, group="group", seed=0).collect():
        folds_of.setdefault(row.group, set()).add(row.fold)
    assert all(len(folds) == 1 for folds in folds_of.values())
    assert set.union(*folds_of.values()) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "params"), [("random_forest", {"numTrees": 3, "maxDepth": 2}), ("gbt", {"maxIter": 1, "maxDepth": 1})]
)
def test_trees(spark: Any, algorithm: str, params: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, algorithm=algorithm, params=params, pca=None, categorical=(), numeric=())
    train = table(spark)
    found = fit_classifier(train, settings, num_classes=3)
    assert (found.tried, found.explained, found.inputs) == ([], None, 6)
    assert accuracy(predict_classes(found, train, num_classes=3)) > 0.8


@pytest.mark.slow
def test_a_grid_of_one_vs_rest_is_of_its_boosters(spark: Any) -> None:
    settings = dataclasses.replace(
        SETTINGS, algorithm="gbt", params={"maxIter": 1}, grid={"maxDepth": [0, 1]}, pca=None, categorical=(), numeric=()
    )
    found = fit_classifier(table(spark), settings, num_classes=3)
    assert [each["params"] for each in found.tried] == [{"maxDepth": 0}, {"maxDepth": 1}]
    depths = {tree.depth for booster in found.pipeline.stages[-1].models for tree in booster.trees}
    assert max(depths) <= found.params["maxDepth"]
    assert found.params["maxDepth"] == max(found.tried, key=lambda each: each["f1"])["params"]["maxDepth"]


def test_undersampling_is_asked_for_by_the_settings(spark: Any) -> None:
    train = table(spark).filter("label != 2 or id < '018'")
    few = undersampled(train, seed=SETTINGS.seed).persist()
    fitted = [
        fit_classifier(rows, dataclasses.replace(SETTINGS, pca=None, undersample=flag), num_classes=3).pipeline.stages[-1]
        for rows, flag in ((train, True), (few, False), (train, False))
    ]
    asked, by_hand, without = (model.coefficientMatrix.toArray() for model in fitted)
    np.testing.assert_allclose(asked, by_hand, atol=1e-6)
    assert not np.allclose(asked, without)


def test_undersampling_is_of_the_rows_that_are_fitted(spark: Any) -> None:
    from pyspark.ml.classification import LogisticRegression
    from pyspark.ml.feature import StandardScaler, VectorAssembler

    from dlspark.ml.prepared_pipeline import PreparedPipeline

    df = table(spark).filter("label != 2 or id < '018'")
    stages = [
        VectorAssembler(inputCols=["one"], outputCol="all"),
        StandardScaler(inputCol="all", outputCol="inputs", withMean=True),
        LogisticRegression(featuresCol="inputs", maxIter=1),
    ]
    seen: list[Any] = []

    class Recording(StandardScaler):
        def _fit(self, dataset: Any) -> Any:
            seen.append(dict(dataset.groupBy("label").count().collect()))
            return super()._fit(dataset)

    stages[1] = Recording(inputCol="all", outputCol="inputs", withMean=True)
    model = PreparedPipeline(stages=stages, undersample=0).fit(df)
    assert seen == [{0.0: 6, 1.0: 6, 2.0: 6}]
    assert model.transform(df).count() == df.count()  # predictions are not undersampled


def test_unknown_parameters_are_refused(spark: Any) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'regParam'"):
        check_params(dataclasses.replace(SETTINGS, params={"regparam": 0.1}))
    with pytest.raises(ConfigError, match="maxDepth"):
        check_params(dataclasses.replace(SETTINGS, algorithm="gbt", params={}, grid={"maxDepth": ["deep"]}))


def test_variance_explained_of_raw_maps(spark: Any) -> None:
    """With too many columns for Spark's covariance matrix, the fraction is still of the total variance."""
    from pyspark.ml.functions import array_to_vector

    rows, columns, k = 12, SPARKS_LARGEST_COVARIANCE + 2, 2
    draw = np.random.default_rng(0)
    x = draw.normal(size=(rows, 3)) @ draw.normal(size=(3, columns)) + 0.5 * draw.normal(size=(rows, columns))
    x[:, 7] = 1.0
    records = [(f"{i:02d}", i % 2, row.astype(np.float32).tolist()) for i, row in enumerate(x)]
    df = spark.createDataFrame(records, "id string, label int, x array<float>").coalesce(1)
    train = with_classes(df.select("id", "label", array_to_vector("x").alias("one")), ("a", "b")).persist()

    fitted = fit_classifier(
        train, dataclasses.replace(SETTINGS, vectors=("one",), categorical=(), numeric=(), pca=k), num_classes=2
    )

    centred = np.delete(x, 7, axis=1) - np.delete(x, 7, axis=1).mean(axis=0)
    of_all = np.linalg.svd(centred / centred.std(axis=0), compute_uv=False) ** 2
    assert fitted.explained == pytest.approx((of_all / of_all.sum())[:k], rel=1e-3)
    assert sum(fitted.explained) < 0.9
