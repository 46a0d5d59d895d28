"""Scores on many bootstrap resamples at once, and their percentile intervals.

scikit-learn takes about 65 ms for all scores of one resample of 2,000 rows and seven classes (measured), so a thousand
resamples would take a minute, and another minute for every column. Here rows are sorted once, and a resample is a vector
of weights. The scores equal those of scikit-learn with these weights as ``sample_weight``, as the tests check.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
_CHUNK_ELEMENTS = 2**21  # elements of an array of resamples, rows and classes, about 16 MB


def multiplicities(units: NDArray[np.int64], resamples: int, seed: int, chunk: int) -> Iterator[Floats]:
    """How often each row is drawn, in resamples that draw as many units as there are, with replacement.

    Args:
        units: for each row the index of its unit, from 0: a row or a group.
        resamples: number of resamples in total.
        seed: of the draw, which does not depend on ``chunk``.
        chunk: the maximum number of resamples in one array.

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
        probabilities: of shape (rows, num_classes), rows adding up to about 1; None omits scores that need them.
        num_classes: number of classes.
        units: see `multiplicities`.
        resamples: number of resamples.
        seed: of the draw.

    Returns:
        By name, arrays of shape (resamples,), or (resamples, num_classes) for scores by class. NaN where undefined.
    """
    chunk = max(1, _CHUNK_ELEMENTS // (len(labels) * num_classes))
    scores = _Scores(labels, predicted, probabilities, num_classes)
    found = [scores.of(weights) for weights in multiplicities(units, resamples, seed, chunk)]
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


class _Scores:
    """Scores of weighted rows. Everything that does not depend on the weights is computed once."""

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
            # As in scikit-learn's log_loss, which clips probabilities by the machine epsilon.
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
    """Items sorted by a score, for AUROC and average precision.

    Only the cumulative weights cover all items; the rest covers runs of equal scores that contain a positive item.

    Args:
        positive: 1 or 0, of shape (items,).
        scores: of shape (items,).
        rows: the row of each item, whose weight it has.
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

        AUROC is the fraction of pairs in which the positive item has the higher score; ties count half (Mann and Whitney).
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
    """``probabilities`` divided by the sums of rows. For losses only: rounding may break ties in rankings."""
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def interval(values: Floats) -> tuple[float, float] | None:
    """The percentile interval of `CONFIDENCE` over the resamples where a score is defined; None if there are none."""
    defined = values[~np.isnan(values)]
    if not defined.size:
        return None
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _ratio(part: Any, whole: Any) -> Floats:
    """``part / whole``, NaN where ``whole`` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)


def _mean_of_defined(values: Floats) -> Floats:
    """The mean over classes, ignoring NaN; NaN where all are NaN."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1).astype(np.float64))
