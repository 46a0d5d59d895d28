"""Classifiers of Spark ML on kept features: one pipeline from columns to probabilities, tuned by cross-validation.

Everything that is fitted (scalers, PCA, encoders, imputation, undersampling, the classifier) is a stage of the pipeline
that CrossValidator fits anew on the training rows of each fold, and in the end on all training rows. Which row is in which
fold is a column, the same for every model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from dlspark.data import Split, assign, undersampled
from dlspark.errors import ConfigError, did_you_mean
from dlspark.spark import available_slots

if TYPE_CHECKING:
    from pyspark.ml import PipelineModel
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)

FOLD = "fold"
SPARKS_LARGEST_COVARIANCE = 65_535  # columns; of RowMatrix.computeCovariance
_INPUTS = "__inputs"
_IMAGE = "__image"


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """A classifier on features.

    Attributes:
        algorithm: "logistic_regression", "random_forest" or "gbt" (one-vs-rest where there are more than two classes).
        vectors: columns of vectors, all of them together the image's features.
        categorical: columns of texts, indexed and one-hot encoded; a value that no training row has is all zeros.
        numeric: columns of numbers, standardised; what is unknown (null or NaN) is the training rows' median.
        pca: standardise the image's features and keep that many principal components; None keeps them as they are.
        params: parameters of Spark's classifier by name.
        grid: values to choose from, by the name of the parameter. Empty: nothing is chosen, nothing cross-validated.
        folds: how many the column ``fold`` counts.
        metric: what the choice is by, "f1" (weighted) or "accuracy".
        undersample: fit on as many training rows of each class as the rarest one has.
        seed: of forests, boosting and undersampling.
    """

    algorithm: str
    vectors: tuple[str, ...]
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    pca: int | None = None
    params: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    folds: int = 5
    metric: str = "f1"
    undersample: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FittedClassifier:
    """What came of fitting one.

    Attributes:
        pipeline: the fitted stages.
        params: the parameters of the classifier that were set or chosen.
        tried: for every point of the grid its ``params``, and mean and standard deviation of the metric over the folds.
        explained: the fraction of variance of each principal component; None without PCA.
        inputs: how many numbers the classifier gets for a row.
    """

    pipeline: PipelineModel
    params: dict[str, Any]
    tried: list[dict[str, Any]]
    explained: list[float] | None
    inputs: int


def with_folds(rows: DataFrame, folds: int, *, stratify: bool, group: str | None, seed: int) -> DataFrame:
    """Give every row its fold, from 0 to ``folds`` - 1, in the column ``fold``; see `dlspark.data.split.assign`.

    Args:
        rows: training rows: ids, labels and, where groups must stay whole, the column ``group``.
        folds: how many.
        stratify: keep the ratio of the classes in each.
        group: a column whose values stay in one fold; None where rows stand for themselves.
        seed: of the draw.
    """
    from pyspark.sql import functions as F

    splits = Split.kfold(folds, stratify=stratify, group=group, seed=seed)
    dealt = [
        assign(rows, split).filter("part = 'test'").select("id", F.lit(i).alias(FOLD)) for i, split in enumerate(splits)
    ]
    return rows.join(reduce(lambda some, more: some.unionByName(more), dealt), "id")


def with_classes(rows: DataFrame, classes: Sequence[str]) -> DataFrame:
    """Tell Spark ML what the labels are: a class that is missing from some rows is a class all the same."""
    from pyspark.sql import functions as F

    about = {"ml_attr": {"type": "nominal", "name": "label", "vals": list(classes)}}
    return rows.withColumn("label", F.col("label").cast("double").alias("label", metadata=about))


def check_params(settings: ClassifierSettings) -> None:
    """Refuse parameters that Spark's classifier does not have.

    Raises:
        ConfigError: one of ``params`` or ``grid``, or a value that it cannot have.
    """
    from pyspark.errors import IllegalArgumentException

    classifier = _classifier(settings, 2)
    for point in _grid(settings, classifier):
        try:
            classifier.copy(point).write()  # hands the values to the JVM, which knows what they may be; writes nothing yet
        except IllegalArgumentException as error:
            raise ConfigError(str(error)) from error


def fit_classifier(train: DataFrame, settings: ClassifierSettings, *, num_classes: int) -> FittedClassifier:
    """Choose by cross-validation where there is a grid, and fit on all training rows.

    Args:
        train: training rows: id, label, part, ``fold`` and the columns that the settings name. Read many times: persist it.
        settings: of the classifier and what comes before it.
        num_classes: how many classes there are.

    Raises:
        ConfigError: a parameter that the classifier does not have.
    """
    from pyspark.ml.evaluation import MulticlassClassificationEvaluator
    from pyspark.ml.tuning import CrossValidator

    from dlspark.ml.prepared_pipeline import PreparedPipeline

    slots = max(1, available_slots(train.sparkSession))
    last = _classifier(settings, num_classes)
    points = _grid(settings, last)
    if len(points) == 1 and hasattr(last, "setParallelism"):
        # Trees leave slots idle between their levels: several at a time, either points of the grid or one-vs-rest's classes.
        last.setParallelism(slots)
    pipeline = PreparedPipeline(
        stages=[*_preparation(settings), last], undersample=settings.seed if settings.undersample else None
    )
    tried, best = [], points[0]
    if len(points) > 1:
        validator = CrossValidator(
            estimator=pipeline,
            estimatorParamMaps=points,
            evaluator=MulticlassClassificationEvaluator(metricName=settings.metric),
            numFolds=settings.folds,
            foldCol=FOLD,
            parallelism=slots,
        )
        found = validator.fit(train)
        fitted = found.bestModel
        tried = [
            {"params": _named(point), settings.metric: float(mean), "std": float(deviation)}
            for point, mean, deviation in zip(points, found.avgMetrics, found.stdMetrics, strict=True)
        ]
        best = points[max(range(len(points)), key=lambda number: found.avgMetrics[number])]
    else:
        fitted = pipeline.fit(train, best)
    return FittedClassifier(
        pipeline=fitted,
        params={**settings.params, **_named(best)},
        tried=tried,
        explained=_explained(fitted, train, settings),
        inputs=int(fitted.stages[-1].numFeatures) if hasattr(fitted.stages[-1], "numFeatures") else _inputs(fitted),
    )


def predict_classes(model: PipelineModel, rows: DataFrame, *, num_classes: int) -> DataFrame:
    """Columns id, label and probabilities, an array of as many doubles as there are classes.

    One-vs-rest has no probabilities of its own: each class gets what its booster says, 1 / (1 + exp(-2·margin)) as Spark's
    GBTClassificationModel has it, over the sum of all.
    """
    from pyspark.ml.classification import OneVsRestModel
    from pyspark.ml.functions import vector_to_array
    from pyspark.sql import functions as F

    predicted = model.transform(rows)
    if isinstance(model.stages[-1], OneVsRestModel):
        raw = vector_to_array("rawPrediction")
        each = F.transform(raw, lambda margin: 1 / (1 + F.exp(-2 * margin)))
        total = F.aggregate(each, F.lit(0.0), lambda some, more: some + more)
        found = F.transform(each, lambda one: one / total)
    else:
        found = vector_to_array("probability")
    # The last classes may have no training row, and then no place in the vector.
    padded = F.slice(F.concat(found, F.array_repeat(F.lit(0.0), num_classes)), 1, num_classes)
    return predicted.select("id", F.col("label").cast("int").alias("label"), padded.alias("probabilities"))


def _preparation(settings: ClassifierSettings) -> list[Any]:
    """The stages from columns to the one vector that the classifier gets."""
    from pyspark.ml.feature import PCA, Imputer, OneHotEncoder, StandardScaler, StringIndexer, VectorAssembler

    stages: list[Any] = [VectorAssembler(inputCols=list(settings.vectors), outputCol=_IMAGE)]
    parts = [_IMAGE]
    if settings.pca is not None:
        stages.append(StandardScaler(inputCol=_IMAGE, outputCol="__scaled", withMean=True, withStd=True))
        stages.append(PCA(k=settings.pca, inputCol="__scaled", outputCol="__components"))
        parts = ["__components"]
    if settings.categorical:
        indices = [f"__index_{name}" for name in settings.categorical]
        encoded = [f"__encoded_{name}" for name in settings.categorical]
        # "keep" puts what is null or new behind the known values, where the encoder's dropLast makes it all zeros.
        stages.append(StringIndexer(inputCols=list(settings.categorical), outputCols=indices, handleInvalid="keep"))
        stages.append(OneHotEncoder(inputCols=indices, outputCols=encoded, dropLast=True))
        parts += encoded
    if settings.numeric:
        filled = [f"__filled_{name}" for name in settings.numeric]
        stages.append(Imputer(inputCols=list(settings.numeric), outputCols=filled, strategy="median"))
        stages.append(VectorAssembler(inputCols=filled, outputCol="__numbers"))
        stages.append(StandardScaler(inputCol="__numbers", outputCol="__standard", withMean=True, withStd=True))
        parts.append("__standard")
    return [*stages, VectorAssembler(inputCols=parts, outputCol=_INPUTS)]


def _classifier(settings: ClassifierSettings, num_classes: int) -> Any:
    from pyspark.ml.classification import GBTClassifier, LogisticRegression, OneVsRest, RandomForestClassifier

    kinds = {"logistic_regression": LogisticRegression, "random_forest": RandomForestClassifier, "gbt": GBTClassifier}
    classifier = kinds[settings.algorithm](featuresCol=_INPUTS, labelCol="label")
    if classifier.hasParam("seed"):
        classifier.set(classifier.seed, settings.seed)
    for name, value in settings.params.items():
        param = _param(classifier, name)
        classifier.set(param, _converted(param, value))
    if settings.algorithm == "gbt" and num_classes > 2:
        return OneVsRest(featuresCol=_INPUTS, labelCol="label", classifier=classifier)
    return classifier


def _grid(settings: ClassifierSettings, last: Any) -> list[dict[Any, Any]]:
    """Every combination of the grid's values; one empty point without a grid."""
    inner = last.getClassifier() if hasattr(last, "getClassifier") else last
    params = [_param(inner, name) for name in settings.grid]
    values = [[_converted(param, value) for value in settings.grid[param.name]] for param in params]
    return [dict(zip(params, point, strict=True)) for point in itertools.product(*values)]


def _param(classifier: Any, name: str) -> Any:
    ours = ("featuresCol", "labelCol", "predictionCol", "probabilityCol", "rawPredictionCol", "weightCol")
    known = [param.name for param in classifier.params if param.name not in ours]
    if name not in known:
        raise ConfigError(f"{type(classifier).__name__} has no parameter {name!r}. {did_you_mean(name, known)}")
    return classifier.getParam(name)


def _converted(param: Any, value: Any) -> Any:
    try:
        return param.typeConverter(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{param.name}: {error} Spark says of it: {param.doc}") from error


def _named(point: Mapping[Any, Any]) -> dict[str, Any]:
    return {param.name: value for param, value in point.items()}


def _explained(fitted: PipelineModel, train: DataFrame, settings: ClassifierSettings) -> list[float] | None:
    """The fraction of all variance in each principal component; None without PCA.

    Where the covariance matrix is too large, Spark finds the k components by another way and takes the fraction of their
    sum, which is then always one. All variance is known: it is 1 for every standardised column that is not constant.
    """
    from pyspark.ml import PipelineModel
    from pyspark.ml.stat import Summarizer

    if settings.pca is None:
        return None
    assembler, scaler, components = fitted.stages[:3]
    if components.pc.numRows <= SPARKS_LARGEST_COVARIANCE:
        return [float(part) for part in components.explainedVariance]
    rows = undersampled(train, seed=settings.seed) if settings.undersample else train
    projected = PipelineModel([assembler, scaler, components]).transform(rows)
    variances = projected.select(Summarizer.variance(projected[components.getOutputCol()])).first()[0]
    return [float(part) for part in variances.toArray() / np.count_nonzero(scaler.std.toArray())]


def _inputs(fitted: PipelineModel) -> int:
    """Of one-vs-rest, which does not say."""
    return int(fitted.stages[-1].models[0].numFeatures)
