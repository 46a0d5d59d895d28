"""Kinds of classifiers that a study can fit on features, found by entry point.

Each kind is one class, registered in the group ``dlspark.study_classifiers`` under the name that a study's file uses as
``algorithm``. A distribution adds a kind with ``my_kind = my_module:MyKind`` in its own entry points.
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
    """One kind of classifier: how to build it, its parameters and the predictions of its model.

    Attributes:
        packages: distributions whose versions decide the result of a fit.
    """

    packages: tuple[str, ...] = ("pyspark",)

    @abstractmethod
    def estimator(self) -> Any:
        """A new Spark ML classifier; ``params`` and ``grid`` of a study may set any of its params except columns."""

    def for_classes(self, estimator: Any, num_classes: int) -> Any:
        """The estimator, or one that wraps it if it cannot separate this many classes."""
        return estimator

    def inputs(self, model: Any) -> int:
        """The number of inputs of a fitted model."""
        return int(model.numFeatures)

    def probabilities(self, model: Any) -> Column:
        """The class probabilities, arrays of doubles, in rows that ``model`` has transformed."""
        from pyspark.ml.functions import vector_to_array

        return vector_to_array("probability")

    def build(self, params: Mapping[str, Any], *, num_classes: int, features: str, seed: int) -> Any:
        """An estimator to fit, with its params set.

        Args:
            params: values by name.
            num_classes: number of classes.
            features: name of the column of vectors; labels are in the column ``label``.
            seed: used if the estimator has a param ``seed`` that ``params`` does not set.

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
    """Gradient-boosted trees; one-vs-rest for more than two classes."""

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
        """The probability of each class; for one-vs-rest each booster's probability divided by their sum.

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
    """The kind of classifier registered as ``name``.

    Raises:
        ConfigError: an unknown name, a name that two distributions claim, or an entry point that is no `StudyClassifier`.
        Exception: the entry point cannot be imported; its own error is raised.
    """
    kind = CLASSIFIERS.find(name)
    if not (isinstance(kind, type) and issubclass(kind, StudyClassifier)):
        raise ConfigError(f"Expected the entry point of classifier {name!r} to be a StudyClassifier; got {kind!r}.")
    return kind()


def checked_param(estimator: Any, name: str, value: Any) -> tuple[Any, Any]:
    """A param of an estimator, and ``value`` converted to its type.

    Raises:
        ConfigError: an unknown param, or a value that cannot be converted.
    """
    known = [param.name for param in estimator.params if param.name not in _COLUMNS]
    if name not in known:
        raise ConfigError(f"{type(estimator).__name__} has no parameter {name!r}. {did_you_mean(name, known)}")
    param = estimator.getParam(name)
    try:
        return param, param.typeConverter(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error} Spark's description: {param.doc}") from error
