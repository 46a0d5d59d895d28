"""Kinds of classifiers that a study can fit on features, found by entry point.

Each kind is one class, registered in the group ``dlspark.study_classifiers`` under the name that a study's file gives as
``algorithm``. A package adds one with ``my_kind = my_module:MyKind`` in its own entry points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dlspark._require import Registered
from dlspark.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pyspark.sql import Column

CLASSIFIERS = Registered("dlspark.study_classifiers", "classifier")
_COLUMNS = ("featuresCol", "labelCol", "predictionCol", "probabilityCol", "rawPredictionCol", "weightCol")


class StudyClassifier(ABC):
    """One kind of classifier: how it is built, which parameters it takes, what its model predicts.

    Attributes:
        packages: distributions whose versions decide the result of a fit.
    """

    packages: tuple[str, ...] = ("pyspark",)

    @abstractmethod
    def estimator(self) -> Any:
        """A new classifier of Spark ML. A study's ``params`` and ``grid`` may set any of its params, columns excepted."""

    def for_classes(self, estimator: Any, num_classes: int) -> Any:
        """What is fitted: the estimator, or one that contains it where it cannot separate that many classes."""
        return estimator

    def inputs(self, model: Any) -> int:
        """How many numbers the fitted model takes for a row."""
        return int(model.numFeatures)

    def probabilities(self, model: Any) -> Column:
        """The column of probabilities, arrays of doubles in the order of the classes, of rows that ``model`` transformed."""
        from pyspark.ml.functions import vector_to_array

        return vector_to_array("probability")

    def build(self, params: Mapping[str, Any], *, num_classes: int, features: str, seed: int) -> Any:
        """What is fitted, with its params set.

        Args:
            params: name to value.
            num_classes: how many classes there are.
            features: name of the column of vectors; labels are in the column ``label``.
            seed: used if the estimator has a param ``seed`` and ``params`` does not set it.

        Raises:
            ConfigError: an unknown param, or a value of the wrong type.
        """
        estimator = self.estimator().setFeaturesCol(features).setLabelCol("label")
        if estimator.hasParam("seed"):
            estimator.set(estimator.seed, seed)
        for name, value in params.items():
            estimator.set(*checked_param(estimator, name, value))
        return self.for_classes(estimator, num_classes)


class LogisticRegression(StudyClassifier):
    """Multinomial logistic regression."""

    def estimator(self) -> Any:
        from pyspark.ml.classification import LogisticRegression

        return LogisticRegression()


class RandomForest(StudyClassifier):
    """A random forest."""

    def estimator(self) -> Any:
        from pyspark.ml.classification import RandomForestClassifier

        return RandomForestClassifier()


class GradientBoosting(StudyClassifier):
    """Gradient-boosted trees, which separate two classes; more are separated one-vs-rest, by a booster for each class."""

    def estimator(self) -> Any:
        from pyspark.ml.classification import GBTClassifier

        return GBTClassifier()

    def for_classes(self, estimator: Any, num_classes: int) -> Any:
        from pyspark.ml.classification import OneVsRest

        if num_classes == 2:
            return estimator
        return OneVsRest(featuresCol=estimator.getFeaturesCol(), labelCol=estimator.getLabelCol(), classifier=estimator)

    def inputs(self, model: Any) -> int:
        return super().inputs(model.models[0] if hasattr(model, "models") else model)

    def probabilities(self, model: Any) -> Column:
        """One-vs-rest has none: each class gets its booster's probability divided by the sum of all.

        A booster's probability is 1 / (1 + exp(-2·margin)), as in Spark's GBTClassificationModel.
        """
        from pyspark.ml.functions import vector_to_array
        from pyspark.sql import functions as F

        if not hasattr(model, "models"):
            return super().probabilities(model)
        each = F.transform(vector_to_array("rawPrediction"), lambda margin: 1 / (1 + F.exp(-2 * margin)))
        total = F.aggregate(each, F.lit(0.0), lambda some, more: some + more)
        return F.transform(each, lambda one: one / total)


def available_classifiers() -> list[str]:
    """Names of the installed kinds, sorted. Nothing is imported."""
    return sorted(CLASSIFIERS)


def load_classifier(name: str) -> StudyClassifier:
    """The kind of classifier ``name``.

    Raises:
        ConfigError: an unknown name, two distributions that claim it, or an entry point that is no `StudyClassifier`.
        Exception: importing it fails: its own error.
    """
    kind = CLASSIFIERS.find(name)
    if not (isinstance(kind, type) and issubclass(kind, StudyClassifier)):
        raise ConfigError(f"Expected the entry point of classifier {name!r} to be a StudyClassifier; got {kind!r}.")
    return kind()


def checked_param(estimator: Any, name: str, value: Any) -> tuple[Any, Any]:
    """A param of an estimator, and ``value`` as its type.

    Raises:
        ConfigError: no such param, or a value that cannot be converted.
    """
    known = [param.name for param in estimator.params if param.name not in _COLUMNS]
    if name not in known:
        raise ConfigError(f"{type(estimator).__name__} has no parameter {name!r}. {did_you_mean(name, known)}")
    param = estimator.getParam(name)
    try:
        return param, param.typeConverter(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error} Spark's description: {param.doc}") from error
