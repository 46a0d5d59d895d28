"""A kind of classifier from outside: Spark's Gaussian naive Bayes."""

from __future__ import annotations

from typing import Any

from dlspark.study.classifiers import StudyClassifier


class NaiveBayes(StudyClassifier):
    packages = ("pyspark", "dlspark-toy")

    def estimator(self) -> Any:
        from pyspark.ml.classification import NaiveBayes

        return NaiveBayes(modelType="gaussian")
