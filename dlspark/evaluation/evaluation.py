"""Evaluate predictions: scores by scikit-learn, confidence intervals and curves, by class and by column.

Takes arrays only, so that networks, Spark ML models and ensembles are evaluated alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark._require import known, whole_number
from dlspark.errors import DataError
from dlspark.evaluation.bootstrap import Floats, interval, resampled_scores
from dlspark.evaluation.predictions import checked_probabilities, class_indices, in_order, unit_numbers, value_texts
from dlspark.evaluation.scores import OF_CLASSES, Curve, confusion_matrix, curves_of, scores_of


@dataclass(frozen=True)
class Estimate:
    """A score and its 95 % confidence interval; None where undefined or not requested."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class against all others.

    Attributes:
        name: of the class.
        rows: rows of the class.
        predicted: rows predicted as the class.
        precision: the fraction of the predicted rows that are of the class; undefined without predicted rows.
        recall: the fraction of the rows of the class that are predicted as it. This and the other scores are undefined
            without rows.
        f1: the harmonic mean of precision and recall.
        auroc: the probability that a row of the class has a higher predicted probability than a row of another class.
        average_precision: the area under the precision-recall curve, as a sum of steps.
    """

    name: str
    rows: int
    predicted: int
    precision: Estimate
    recall: Estimate
    f1: Estimate
    auroc: Estimate
    average_precision: Estimate


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `evaluate_predictions`; plain data.

    Attributes:
        rows: number of rows.
        groups: number of groups; None if rows were resampled one by one.
        bootstrap: number of resamples.
        seed: of the resamples.
        classes: class names, in the order of the labels unless `reordered`.
        scores: estimates by name. ``accuracy``; ``weighted_precision``, ``weighted_recall`` and ``weighted_f1``, weighted by
            rows of the class, where a class that is never predicted has precision 0, as in Spark and scikit-learn;
            ``balanced_accuracy`` (mean recall), ``macro_f1``, ``auroc_macro`` (one class against the rest) and
            ``average_precision_macro``, means over the classes that have rows; ``auroc_micro`` and
            ``average_precision_micro``, over all pairs of row and class; ``log_loss``, in nats.
        by_class: in the order of ``classes``.
        confusion: rows by true class (first index) and predicted class (second index).
        roc: a curve for each class that has some but not all rows, then ``micro``. Empty without probabilities.
        precision_recall: like ``roc``.
        by: evaluations without curves, by column and value.
    """

    rows: int
    groups: int | None
    bootstrap: int
    seed: int
    classes: tuple[str, ...]
    scores: Mapping[str, Estimate]
    by_class: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]
    roc: tuple[Curve, ...] = ()
    precision_recall: tuple[Curve, ...] = ()
    by: Mapping[str, Mapping[str, Evaluation]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The evaluation as JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The inverse of `to_json`."""
        return _from_plain(json.loads(text))

    def reordered(self, first: Sequence[str]) -> Evaluation:
        """The same evaluation with the classes ``first`` before the others wherever classes have an order.

        Raises:
            ConfigError: an unknown class.
        """
        for name in first:
            known("a class to put first", name, self.classes)
        place = [self.classes.index(name) for name in dict.fromkeys([*first, *self.classes])]
        classes = tuple(self.classes[i] for i in place)

        def sorted_curves(curves: Sequence[Curve]) -> tuple[Curve, ...]:
            rank = {name: i for i, name in enumerate(classes)}
            return (*sorted(curves[:-1], key=lambda curve: rank[curve.name]), *curves[-1:])  # micro stays last

        return replace(
            self,
            classes=classes,
            by_class=tuple(self.by_class[i] for i in place),
            confusion=tuple(tuple(self.confusion[i][j] for j in place) for i in place),
            roc=sorted_curves(self.roc),
            precision_recall=sorted_curves(self.precision_recall),
            by={
                column: {value: found.reordered(first) for value, found in values.items()}
                for column, values in self.by.items()
            },
        )


def evaluate_predictions(
    labels: Any,
    probabilities: Any,
    classes: Sequence[str],
    *,
    predicted: Any = None,
    groups: Any = None,
    by: Mapping[str, Any] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate predictions.

    Intervals are percentiles of a bootstrap, which draws rows with replacement, or whole groups if the rows of a patient or
    lesion are alike. The interval of a score uses the resamples in which the score is defined. A bootstrap knows no other
    rows: if ten of ten rows are right, the interval is 1 to 1. Rows of a single group have no interval.

    An undefined score, such as the recall of a class without rows, is None, never 0, without a warning. The same arguments
    give the same numbers.

    Args:
        labels: true classes, integers of shape (rows,).
        probabilities: of shape (rows, classes), each row adding up to 1. Without them (None) some scores are undefined.
        classes: class names, in the order of the labels.
        predicted: predicted classes, integers of shape (rows,); None for the most probable ones.
        groups: the group of each row, of shape (rows,). A row whose group is empty, None or NaN is a group of its own.
        by: values of shape (rows,) by column, at most `MOST_VALUES` distinct ones; see `bands` for numbers.
        bootstrap: number of resamples; 0 for no intervals.
        seed: of the resamples.

    Raises:
        ConfigError: ``bootstrap`` or ``seed`` is no integer of at least 0.
        DataError: no rows, arrays of different lengths, invalid labels or probabilities, or too many distinct values in a
            column.
        MissingDependencyError: scikit-learn is not installed.
    """
    whole_number("bootstrap", bootstrap, least=0)
    whole_number("seed", seed, least=0)
    classes = tuple(str(name) for name in classes)
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"Expected at least two classes of different names; got {', '.join(classes) or 'none'}.")
    truth = class_indices("labels", labels, len(classes))
    rows = len(truth)
    if rows == 0:
        raise DataError("Expected rows to evaluate; got none.")
    likely = None if probabilities is None else checked_probabilities(probabilities, rows, len(classes))
    if predicted is not None:
        said = class_indices("predicted", predicted, len(classes))
    elif likely is not None:
        said = np.argmax(likely, axis=1)
    else:
        raise DataError("Expected probabilities or predicted classes; got neither.")
    units = np.arange(rows) if groups is None else unit_numbers(groups)
    values = {name: value_texts(name, column) for name, column in (by or {}).items()}
    for name, column in (("predicted", said), ("groups", units), *values.items()):
        if column.shape != (rows,):
            raise DataError(f"Expected {name} of shape ({rows},), as labels; got {column.shape}.")

    def judged(chosen: Any) -> Evaluation:
        there, numbers = np.unique(units[chosen], return_inverse=True)
        found = _judged(
            truth[chosen], said[chosen], None if likely is None else likely[chosen], classes, numbers, bootstrap, seed
        )
        return found if groups is None else replace(found, groups=len(there))

    roc, precision_recall = curves_of(truth, likely, classes)
    return replace(
        judged(slice(None)),
        roc=roc,
        precision_recall=precision_recall,
        by={name: {value: judged(column == value) for value in in_order(column)} for name, column in values.items()},
    )


def _judged(
    truth: NDArray[np.int64],
    said: NDArray[np.int64],
    likely: Floats | None,
    classes: tuple[str, ...],
    units: NDArray[np.int64],
    bootstrap: int,
    seed: int,
) -> Evaluation:
    found = scores_of(truth, said, likely, len(classes))
    drawn: dict[str, Floats] = {}
    if bootstrap and units.max() > 0:
        drawn = resampled_scores(truth, said, likely, num_classes=len(classes), units=units, resamples=bootstrap, seed=seed)

    def estimate(name: str, label: int | None = None) -> Estimate:
        value = found[name] if label is None else found[name][label]
        if np.isnan(value):
            return Estimate(None)
        limits = interval(drawn[name] if label is None else drawn[name][:, label]) if drawn else None
        return Estimate(float(value), *(limits or (None, None)))

    confusion = confusion_matrix(truth, said, len(classes))
    return Evaluation(
        rows=len(truth),
        groups=None,
        bootstrap=bootstrap,
        seed=seed,
        classes=classes,
        scores={name: estimate(name) for name in found if name not in OF_CLASSES},
        by_class=tuple(
            ClassScores(
                name=name,
                rows=int(confusion[label].sum()),
                predicted=int(confusion[:, label].sum()),
                **{score: estimate(score, label) for score in OF_CLASSES},
            )
            for label, name in enumerate(classes)
        ),
        confusion=tuple(tuple(map(int, line)) for line in confusion),
    )


def _from_plain(plain: Mapping[str, Any]) -> Evaluation:
    def curves(found: Any) -> tuple[Curve, ...]:
        return tuple(Curve(each["name"], tuple(each["x"]), tuple(each["y"])) for each in found)

    return Evaluation(
        **{name: plain[name] for name in ("rows", "groups", "bootstrap", "seed")},
        classes=tuple(plain["classes"]),
        scores={name: Estimate(**each) for name, each in plain["scores"].items()},
        by_class=tuple(
            ClassScores(**(each | {name: Estimate(**each[name]) for name in OF_CLASSES})) for each in plain["by_class"]
        ),
        confusion=tuple(map(tuple, plain["confusion"])),
        roc=curves(plain["roc"]),
        precision_recall=curves(plain["precision_recall"]),
        by={name: {value: _from_plain(found) for value, found in values.items()} for name, values in plain["by"].items()},
    )
