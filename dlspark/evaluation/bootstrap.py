"""Scores of a classifier on many resamples of its rows at once: how far they could have come out otherwise.

scikit-learn takes some 65 ms for all scores of one resample of 2,000 rows and seven classes (measured), so a thousand
would take a minute, and as long again for every column. Here rows are sorted once and a resample is a row of weights;
what comes out equals scikit-learn's scores with those weights as ``sample_weight``, which tests/ml/test_bootstrap.py
holds it to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
_CHUNK_ELEMENTS = 2**21  # weights of rows times classes that are in memory at a time, some 16 MB an array


def multiplicities(units: NDArray[np.int64], resamples: int, seed: int, chunk: int) -> Iterator[Floats]:
    """How often each row is drawn, for resamples that draw as many units as there are, with replacement.

    Args:
        units: for each row the number of the unit that it is drawn with, from 0: its own, or its group's.
        resamples: how many in all.
        seed: of the draw; what is drawn does not depend on ``chunk``.
        chunk: the most resamples at a time.

    Yields:
        Arrays of shape (at most chunk, rows).
    """
    draw, count = np.random.default_rng(seed), int(units.max()) + 1
    for start in range(0, resamples, chunk):
        times = [
            np.bincount(draw.integers(count, size=count), minlength=count)
            for _ in range(start, min(start + chunk, resamples))
        ]
        yield np.asarray(times, np.float64)[:, units]


def resampled_scores(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    probabilities: Floats | None,
    *,
    num_classes: int,
    units: NDArray[np.int64],
    resamples: int,
    seed: int,
) -> dict[str, Floats]:
    """Every score on every resample.

    Args:
        labels: true classes, of shape (rows,).
        predicted: predicted classes, of shape (rows,).
        probabilities: of shape (rows, num_classes), rows adding up to about 1; None leaves out what needs them.
        num_classes: how many there are.
        units: what is drawn together, see `multiplicities`.
        resamples: how many.
        seed: of the draw.

    Returns:
        Name to shape (resamples,), or (resamples, num_classes) for what each class has. NaN where a score is undefined.
    """
    chunk = max(1, _CHUNK_ELEMENTS // (len(labels) * num_classes))
    scores = _Scores(labels, predicted, probabilities, num_classes)
    found = [scores.of(weights) for weights in multiplicities(units, resamples, seed, chunk)]
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


class _Scores:
    """Scores of weighted rows. What does not depend on the weights is prepared once."""

    def __init__(
        self, labels: NDArray[np.int64], predicted: NDArray[np.int64], probabilities: Floats | None, num_classes: int
    ) -> None:
        one_hot = np.eye(num_classes)
        self._truth = one_hot[labels]
        self._predicted = one_hot[predicted]
        self._right = self._truth * (labels == predicted)[:, None]
        self._rankings: list[_Ranking] = []
        if probabilities is not None:
            rows = np.arange(len(labels))
            self._rankings = [_Ranking(self._truth[:, c], probabilities[:, c], rows) for c in range(num_classes)]
            self._micro = _Ranking(self._truth.ravel(), probabilities.ravel(), np.repeat(rows, num_classes))
            # As scikit-learn's log_loss: a probability of 0 counts as the smallest step from 1.
            eps = np.finfo(np.float64).eps
            self._losses = -np.log(np.clip(summing_to_1(probabilities)[rows, labels], eps, 1 - eps))

    def of(self, weights: Floats) -> dict[str, Floats]:
        """Scores for weights of shape (resamples, rows)."""
        total = weights.sum(axis=1)
        rows, said, right = weights @ self._truth, weights @ self._predicted, weights @ self._right
        recall, precision = _ratio(right, rows), _ratio(right, said)
        f1 = np.where(rows > 0, _ratio(2 * right, rows + said), np.nan)
        share = rows / total[:, None]
        accuracy = right.sum(axis=1) / total
        found = {
            "accuracy": accuracy,
            "balanced_accuracy": _mean_of_defined(recall),
            "weighted_precision": (np.nan_to_num(precision) * share).sum(axis=1),
            "weighted_recall": accuracy,
            "weighted_f1": (np.nan_to_num(f1) * share).sum(axis=1),
            "macro_f1": _mean_of_defined(f1),
            "precision": precision,
            "recall": recall,
            "f1": f1,
        }
        if self._rankings:
            pairs = [ranking.of(weights) for ranking in self._rankings]
            found["auroc"] = np.stack([auroc for auroc, _ in pairs], axis=1)
            found["average_precision"] = np.stack([precision for _, precision in pairs], axis=1)
            found["auroc_micro"], found["average_precision_micro"] = self._micro.of(weights)
            found["auroc_macro"] = _mean_of_defined(found["auroc"])
            found["average_precision_macro"] = _mean_of_defined(found["average_precision"])
            found["log_loss"] = (weights @ self._losses) / total
        return found


class _Ranking:
    """Items sorted by a score, to tell how well it puts the positive ones first.

    Only the running sum of the weights goes over all items; the rest, over runs of equal scores that hold a positive one.

    Args:
        positive: 1 or 0, of shape (items,).
        scores: of shape (items,).
        rows: the row that weighs each item.
    """

    def __init__(self, positive: Floats, scores: Floats, rows: NDArray[np.int64]) -> None:
        order = np.argsort(-scores, kind="stable")
        falling = scores[order]
        self._rows = rows[order]
        begins = np.flatnonzero(np.r_[True, falling[1:] != falling[:-1]])
        places = np.flatnonzero(positive[order])
        runs, self._firsts = np.unique(np.searchsorted(begins, places, side="right") - 1, return_index=True)
        self._positive_rows = self._rows[places]
        self._begins, self._ends = begins[runs], np.r_[begins[1:], len(rows)][runs]

    def of(self, weights: Floats) -> tuple[Floats, Floats]:
        """AUROC and average precision, each of shape (resamples,).

        AUROC is the share of pairs in which the positive item has the higher score, ties by half (Mann and Whitney).
        """
        if not self._firsts.size:
            undefined = np.full(len(weights), np.nan)
            return undefined, undefined
        seen = np.zeros((len(weights), len(self._rows) + 1))
        np.cumsum(weights[:, self._rows], axis=1, out=seen[:, 1:])
        before, after = seen[:, self._begins], seen[:, self._ends]
        positive = np.add.reduceat(weights[:, self._positive_rows], self._firsts, axis=1)
        true = np.cumsum(positive, axis=1)
        positives, negatives = true[:, -1], seen[:, -1] - true[:, -1]
        worse = negatives[:, None] - (after - true)
        tied = after - before - positive
        won = (positive * (worse + tied / 2)).sum(axis=1)
        precision = np.nan_to_num(_ratio(true, after))
        return _ratio(won, positives * negatives), _ratio((positive * precision).sum(axis=1), positives)


def summing_to_1(probabilities: Floats) -> Floats:
    """The same without what rounding left in the sums of rows; for losses only, as it may break ties of rankings."""
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def interval(values: Floats) -> tuple[float, float] | None:
    """The percentile interval of `CONFIDENCE` over the resamples in which a score is defined; None if it is in none."""
    defined = values[~np.isnan(values)]
    if not defined.size:
        return None
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _ratio(part: Any, whole: Any) -> Floats:
    """``part / whole``, NaN where ``whole`` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)


def _mean_of_defined(values: Floats) -> Floats:
    """The mean over classes of those that are not NaN; NaN where all are."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1).astype(np.float64))
