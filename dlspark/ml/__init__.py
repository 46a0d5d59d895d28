"""Spark ML stages and SQL functions made of Keras networks, and the judging of predictions.

Names are looked up on first use: the stages' classes need Spark.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlspark.evaluation import Evaluation, evaluate_predictions
    from dlspark.ml.cached_features import KeptFeatures, cache_features
    from dlspark.ml.classifier import KerasImageClassificationModel, KerasImageClassifier
    from dlspark.ml.featurizer import ImageFeaturizer
    from dlspark.ml.transformer import KerasTransformer
    from dlspark.ml.udf import register_udf

_HOMES = {
    "Evaluation": "dlspark.evaluation",
    "ImageFeaturizer": "dlspark.ml.featurizer",
    "KerasImageClassificationModel": "dlspark.ml.classifier",
    "KerasImageClassifier": "dlspark.ml.classifier",
    "KerasTransformer": "dlspark.ml.transformer",
    "KeptFeatures": "dlspark.ml.cached_features",
    "cache_features": "dlspark.ml.cached_features",
    "evaluate_predictions": "dlspark.evaluation",
    "register_udf": "dlspark.ml.udf",
}

__all__ = [
    "Evaluation",
    "ImageFeaturizer",
    "KeptFeatures",
    "KerasImageClassificationModel",
    "KerasImageClassifier",
    "KerasTransformer",
    "cache_features",
    "evaluate_predictions",
    "register_udf",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dlspark.ml' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
