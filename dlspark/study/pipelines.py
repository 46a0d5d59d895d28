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
from typing import TYPE_CHECKING, Any

import numpy as np

from dlspark.data import undersampled
from dlspark.errors import ConfigError
from dlspark.spark import available_slots
from dlspark.study.classifiers import StudyClassifier, checked_param, load_classifier

if TYPE_CHECKING:
    from pyspark.ml import PipelineModel
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)

SPARKS_LARGEST_COVARIANCE = 65_535  # columns; of RowMatrix.computeCovariance
_INPUTS = "__inputs"
_IMAGE = "__image"


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """A classifier on features.

    Attributes:
        algorithm: name of a kind of classifier (`dlspark.study.classifiers`).
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
    """A fitted classifier.

    Attributes:
        kind: of the classifier, the last stage.
        pipeline: the fitted stages.
        params: the parameters of the classifier that were set or chosen.
        tried: for each point of the grid its ``params``, and mean and standard deviation of the metric over the folds.
        explained: the fraction of variance of each principal component; None without PCA.
        inputs: how many numbers the classifier takes for a row.
    """

    kind: StudyClassifier
    pipeline: PipelineModel
    params: dict[str, Any]
    tried: list[dict[str, Any]]
    explained: list[float] | None
    inputs: int


def with_classes(rows: DataFrame, classes: Sequence[str]) -> DataFrame:
    """Tell Spark ML what the labels are: a class that is missing from some rows is a class all the same."""
    from pyspark.sql import functions as F

    about = {"ml_attr": {"type": "nominal", "name": "label", "vals": list(classes)}}
    return rows.withColumn("label", F.col("label").cast("double").alias("label", metadata=about))


def check_params(settings: FitSettings) -> None:
    """Reject parameters that the classifier does not have.

    Raises:
        ConfigError: an unknown name in ``params`` or ``grid``, or an invalid value.
    """
    from pyspark.errors import IllegalArgumentException

    estimator = _built(settings, 2)
    for point in _grid(settings, estimator):
        try:
            estimator.copy(point).write()  # passes the values to the JVM, which checks them; nothing is written yet
        except IllegalArgumentException as error:
            raise ConfigError(str(error)) from error


def fit_classifier(train: DataFrame, settings: FitSettings, *, num_classes: int) -> FittedClassifier:
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
    kind, last = load_classifier(settings.algorithm), _built(settings, num_classes)
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
            foldCol="fold",
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
        kind=kind,
        pipeline=fitted,
        params={**settings.params, **_named(best)},
        tried=tried,
        explained=_explained(fitted, train, settings),
        inputs=kind.inputs(fitted.stages[-1]),
    )


def predict_classes(fitted: FittedClassifier, rows: DataFrame, *, num_classes: int) -> DataFrame:
    """Columns id, label and probabilities, an array of ``num_classes`` doubles."""
    from pyspark.sql import functions as F

    found = fitted.kind.probabilities(fitted.pipeline.stages[-1])
    # If the last classes have no training row, the classifier's vector is shorter.
    padded = F.slice(F.concat(found, F.array_repeat(F.lit(0.0), num_classes)), 1, num_classes)
    predicted = fitted.pipeline.transform(rows)
    return predicted.select("id", F.col("label").cast("int").alias("label"), padded.alias("probabilities"))


def _preparation(settings: FitSettings) -> list[Any]:
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


def _built(settings: FitSettings, num_classes: int) -> Any:
    kind = load_classifier(settings.algorithm)
    return kind.build(settings.params, num_classes=num_classes, features=_INPUTS, seed=settings.seed)


def _grid(settings: FitSettings, last: Any) -> list[dict[Any, Any]]:
    """Every combination of the grid's values; one empty point without a grid."""
    inner = last.getClassifier() if hasattr(last, "getClassifier") else last
    values = [[checked_param(inner, name, value) for value in values] for name, values in settings.grid.items()]
    return [dict(point) for point in itertools.product(*values)]


def _named(point: Mapping[Any, Any]) -> dict[str, Any]:
    return {param.name: value for param, value in point.items()}


def _explained(fitted: PipelineModel, train: DataFrame, settings: FitSettings) -> list[float] | None:
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
