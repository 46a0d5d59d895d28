"""How good predictions are: scores by scikit-learn, their confidence intervals, curves, by class and by any column.

Takes arrays only, so that a network's, a Spark ML model's and an ensemble's predictions are judged alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark._require import whole_number
from dlspark.errors import ConfigError, DataError, did_you_mean
from dlspark.evaluation.bootstrap import Floats, interval, resampled_scores
from dlspark.evaluation.prediction_arrays import checked_probabilities, class_indices, in_order, unit_numbers, value_texts
from dlspark.evaluation.scores import OF_CLASSES, Curve, confusion_matrix, curves_of, scores_of


@dataclass(frozen=True)
class Estimate:
    """A score and its 95 % confidence interval; None is what is undefined, or was not asked for."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class against all others.

    Attributes:
        name: of the class.
        rows: how many are truly of it.
        predicted: how many were said to be.
        precision: of the rows said to be of it, the fraction that is; undefined where none was.
        recall: of its rows, the fraction said to be; undefined where it has none, and so are f1 and the two that follow.
        f1: the harmonic mean of the two.
        auroc: how often one of its rows has a higher probability of it than a row of another class.
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
    """What `evaluate_predictions` found; plain data.

    Attributes:
        rows: how many were judged.
        groups: how many groups they make; None when rows were drawn one by one.
        bootstrap: resamples behind the intervals.
        seed: of the resamples.
        classes: their names, in the order of the labels unless `reordered`.
        scores: name to estimate. ``accuracy``; ``weighted_precision``, ``weighted_recall``, ``weighted_f1``, by rows of
            the class, where a class that is never predicted has precision 0, as with Spark and scikit-learn;
            ``balanced_accuracy`` (mean recall), ``macro_f1``, ``auroc_macro`` (each class against the rest) and
            ``average_precision_macro``, means over the classes that have rows; ``auroc_micro`` and
            ``average_precision_micro``, over all pairs of row and class; ``log_loss``, in nats.
        by_class: the same order as ``classes``.
        confusion: rows by true class (first index) and predicted class (second).
        roc: a curve for each class that has rows and is not all rows, then ``micro``. Empty without probabilities.
        precision_recall: the same.
        by: column to value to the evaluation of the rows that have it, without curves.
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
        """All of it, as JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The evaluation that `to_json` wrote."""
        return _from_plain(json.loads(text))

    def reordered(self, first: Sequence[str]) -> Evaluation:
        """The same with the classes ``first`` before the others, in all that is ordered by class.

        Raises:
            ConfigError: a class that is not there.
        """
        for name in first:
            if name not in self.classes:
                raise ConfigError(f"Expected a class to put first. {did_you_mean(name, self.classes)}")
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
    """Judge predictions.

    Intervals are the percentiles of a bootstrap: rows, or whole groups where the rows of one patient or lesion are alike,
    are drawn with replacement, and a score's interval is over those draws in which it is defined. It knows only the rows
    that there are: where ten of ten are right, it says 1 to 1. Rows of one and the same group give no interval.

    What is undefined, such as the recall of a class without rows, is None, never 0, and warns of nothing. The same
    arguments give the same numbers.

    Args:
        labels: true classes, integers of shape (rows,).
        probabilities: of every class, of shape (rows, classes), each row adding up to 1. None where the model gives
            none: then what needs them is undefined.
        classes: names of the classes, in the order of the labels.
        predicted: predicted classes, integers of shape (rows,); None for the most probable ones.
        groups: the group of each row, of shape (rows,); a row whose group is empty, None or NaN is a group of its own.
        by: name to values of shape (rows,), at most `MOST_VALUES` different ones; `bands` makes such of numbers.
        bootstrap: how many resamples; 0 for no intervals.
        seed: of the resamples.

    Raises:
        ConfigError: ``bootstrap`` or ``seed`` is no whole number of at least 0.
        DataError: no rows, shapes that do not fit, labels that are no classes, probabilities that are none, or too many
            different values in a column.
        MissingDependencyError: scikit-learn is not installed.
    """
    whole_number("bootstrap", bootstrap, least=0)
    whole_number("seed", seed, least=0)
    classes = tuple(str(name) for name in classes)
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"Expected at least two classes of different names: received {', '.join(classes) or 'none'}.")
    truth = class_indices("labels", labels, len(classes))
    rows = len(truth)
    if rows == 0:
        raise DataError("Expected rows to evaluate: received none.")
    likely = None if probabilities is None else checked_probabilities(probabilities, rows, len(classes))
    if predicted is not None:
        said = class_indices("predicted", predicted, len(classes))
    elif likely is not None:
        said = np.argmax(likely, axis=1)
    else:
        raise DataError("Expected probabilities or predicted classes: received neither.")
    units = np.arange(rows) if groups is None else unit_numbers(groups)
    values = {name: value_texts(name, column) for name, column in (by or {}).items()}
    for name, column in (("predicted", said), ("groups", units), *values.items()):
        if column.shape != (rows,):
            raise DataError(f"Expected {name} of shape ({rows},), as labels: received {column.shape}.")

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
