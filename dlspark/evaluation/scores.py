"""Scores and curves of predictions, by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark._require import extra, require
from dlspark.evaluation.bootstrap import Floats, summing_to_1

INSTALL = extra("evaluate")
CURVE_POINTS = 400
"""The maximum number of points of a curve."""

OF_CLASSES = ("precision", "recall", "f1", "auroc", "average_precision")
"""The scores of a single class."""


@dataclass(frozen=True)
class Curve:
    """The points of a curve, from left to right.

    Attributes:
        name: of the class, or "micro" for all classes pooled.
        x: false positive rate (ROC) or recall.
        y: true positive rate (ROC) or precision.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def scores_of(truth: NDArray[np.int64], said: NDArray[np.int64], likely: Floats | None, num_classes: int) -> dict[str, Any]:
    """Every score by scikit-learn; those of `OF_CLASSES` have shape (classes,). NaN where undefined."""
    metrics, everything = _sklearn(), range(num_classes)
    there = np.unique(truth)
    precision, recall, f1, rows = metrics.precision_recall_fscore_support(
        truth, said, labels=everything, zero_division=np.nan
    )
    weighted = metrics.precision_recall_fscore_support(truth, said, average="weighted", zero_division=0)
    found = {
        "accuracy": metrics.accuracy_score(truth, said),
        # Not balanced_accuracy_score, which warns about predicted classes without rows.
        "balanced_accuracy": metrics.recall_score(truth, said, labels=there, average="macro"),
        "weighted_precision": weighted[0],
        "weighted_recall": weighted[1],
        "weighted_f1": weighted[2],
        "macro_f1": metrics.f1_score(truth, said, labels=there, average="macro", zero_division=0),
        "precision": precision,
        "recall": recall,
        "f1": np.where(rows > 0, f1, np.nan),
    }
    undefined = np.full(num_classes, np.nan)
    found |= {"auroc": undefined, "average_precision": undefined.copy()}
    named = ("auroc_micro", "auroc_macro", "average_precision_micro", "average_precision_macro", "log_loss")
    found |= dict.fromkeys(named, np.nan)
    if likely is None:
        return found
    one_hot = np.eye(num_classes, dtype=np.int64)[truth]
    found["auroc"] = undefined.copy()
    for label in there:
        found["average_precision"][label] = metrics.average_precision_score(one_hot[:, label], likely[:, label])
        if len(there) > 1:
            found["auroc"][label] = metrics.roc_auc_score(one_hot[:, label], likely[:, label])
    found["auroc_micro"] = metrics.roc_auc_score(one_hot.ravel(), likely.ravel())
    found["auroc_macro"] = found["auroc"][there].mean()
    found["average_precision_micro"] = metrics.average_precision_score(one_hot.ravel(), likely.ravel())
    found["average_precision_macro"] = found["average_precision"][there].mean()
    found["log_loss"] = metrics.log_loss(truth, summing_to_1(likely), labels=everything)
    return found


def curves_of(
    truth: NDArray[np.int64], likely: Floats | None, classes: Sequence[str]
) -> tuple[tuple[Curve, ...], tuple[Curve, ...]]:
    """ROC and precision-recall curves: of each class that has some but not all rows, then of all classes pooled."""
    if likely is None:
        return (), ()
    metrics, one_hot = _sklearn(), np.eye(len(classes), dtype=np.int64)[truth]
    lines = [(name, one_hot[:, label], likely[:, label]) for label, name in enumerate(classes)]
    roc, precision_recall = [], []
    for name, positive, scores in (*lines, ("micro", one_hot.ravel(), likely.ravel())):
        if 0 < positive.sum() < len(positive):
            false, true, _ = metrics.roc_curve(positive, scores)
            roc.append(_thinned(name, false, true))
            precision, recall, _ = metrics.precision_recall_curve(positive, scores)
            precision_recall.append(_thinned(name, recall[::-1], precision[::-1]))
    return tuple(roc), tuple(precision_recall)


def _thinned(name: str, x: Floats, y: Floats) -> Curve:
    """At most `CURVE_POINTS` points of a curve, including its ends, spaced evenly along its length.

    Length is the sum of |dx| + |dy|, so a dropped point is at most about length / `CURVE_POINTS` from a kept one: 0.005 for
    a ROC curve, a pixel or two.
    """
    along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    kept = np.arange(len(x))
    if len(x) > CURVE_POINTS:
        wanted = np.linspace(0, along[-1], CURVE_POINTS)
        kept = np.unique(np.searchsorted(along, wanted).clip(0, len(x) - 1))
        kept[0], kept[-1] = 0, len(x) - 1
    return Curve(name, tuple(map(float, x[kept])), tuple(map(float, y[kept])))


def confusion_matrix(truth: NDArray[np.int64], said: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Rows by true class (first axis) and predicted class."""
    found: NDArray[np.int64] = _sklearn().confusion_matrix(truth, said, labels=range(num_classes))
    return found


def _sklearn() -> Any:
    return require("sklearn.metrics", install=INSTALL, purpose="Evaluating")
