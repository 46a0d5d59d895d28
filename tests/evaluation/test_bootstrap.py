"""Intervals: scores of resamples equal those of scikit-learn, groups are drawn whole, the seed determines the draw."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from dlspark.evaluation import bootstrap
from dlspark.evaluation.bootstrap import multiplicities, resampled_scores
from dlspark.evaluation.evaluation import evaluate_predictions

CLASSES = 4


def clustered(groups: int, rows_each: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Predictions that are all right or all wrong within a group."""
    draw = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), rows_each)
    labels = draw.integers(0, 2, groups)[group]
    right = (draw.random(groups) < 0.7)[group]
    likely = np.where(right, 0.9, 0.1)
    probabilities = np.stack([np.where(labels == 0, likely, 1 - likely), np.where(labels == 1, likely, 1 - likely)], axis=1)
    return labels, probabilities, group


@pytest.mark.parametrize("decimals", [1, 12], ids=["ties", "no ties"])
def test_each_resample_is_scored_as_by_scikit_learn(decimals: int) -> None:
    draw = np.random.default_rng(3)
    rows = 60
    labels = draw.choice(CLASSES, rows, p=[0.5, 0.4, 0.08, 0.02])  # the rare ones are missing from some resamples
    likely = draw.dirichlet(np.ones(CLASSES), rows).round(decimals) + 1e-3
    likely[:, 2] /= 100  # there, and never predicted
    likely /= likely.sum(axis=1, keepdims=True)
    said, units = likely.argmax(axis=1), np.arange(rows)
    found = resampled_scores(labels, said, likely, num_classes=CLASSES, units=units, resamples=25, seed=9)
    (weights,) = multiplicities(units, 25, 9, 25)
    one_hot = np.eye(CLASSES, dtype=int)[labels]
    missing = 0
    for number, weight in enumerate(weights):
        there = np.unique(labels[weight > 0])
        missing += CLASSES - len(there)
        given = {"sample_weight": weight}
        precision, recall, f1, support = metrics.precision_recall_fscore_support(
            labels, said, labels=range(CLASSES), zero_division=np.nan, **given
        )
        weighted = metrics.precision_recall_fscore_support(labels, said, average="weighted", zero_division=0, **given)
        auroc, average_precision = np.full(CLASSES, np.nan), np.full(CLASSES, np.nan)
        for label in there:
            auroc[label] = metrics.roc_auc_score(one_hot[:, label], likely[:, label], **given)
            average_precision[label] = metrics.average_precision_score(one_hot[:, label], likely[:, label], **given)
        flat = {"sample_weight": np.repeat(weight, CLASSES)}
        expected = {
            "accuracy": metrics.accuracy_score(labels, said, **given),
            "balanced_accuracy": metrics.recall_score(labels, said, labels=there, average="macro", **given),
            "weighted_precision": weighted[0],
            "weighted_recall": weighted[1],
            "weighted_f1": weighted[2],
            "macro_f1": metrics.f1_score(labels, said, labels=there, average="macro", **given),
            "precision": precision,
            "recall": recall,
            "f1": np.where(support > 0, f1, np.nan),
            "auroc": auroc,
            "auroc_macro": np.nanmean(auroc),
            "auroc_micro": metrics.roc_auc_score(one_hot.ravel(), likely.ravel(), **flat),
            "average_precision": average_precision,
            "average_precision_macro": np.nanmean(average_precision),
            "average_precision_micro": metrics.average_precision_score(one_hot.ravel(), likely.ravel(), **flat),
            "log_loss": metrics.log_loss(labels, likely, labels=range(CLASSES), **given),
        }
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][number], value, atol=1e-12, err_msg=name)
    assert missing > 0


def test_groups_are_drawn_whole_and_the_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    units = np.array([0, 1, 1, 2, 0])
    (weights,) = multiplicities(units, 25, 7, 100)
    assert np.array_equal(weights[:, 0], weights[:, 4])
    assert np.array_equal(weights[:, 1], weights[:, 2])
    assert set((weights[:, 0] + weights[:, 1] + weights[:, 3]).tolist()) == {3.0}
    assert np.array_equal(np.concatenate(list(multiplicities(units, 25, 7, 4))), weights)

    labels, likely, _ = clustered(20, 3)
    whole = evaluate_predictions(labels, likely, ["a", "b"], bootstrap=50)
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 1000)
    in_chunks = evaluate_predictions(labels, likely, ["a", "b"], bootstrap=50)
    for (
        name,
        score,
    ) in whole.scores.items():  # not bit-equal: matrices of another shape add up in another order
        assert astuple(in_chunks.scores[name]) == pytest.approx(astuple(score), abs=1e-6)


def test_the_seed_decides() -> None:
    labels, likely, _ = clustered(40, 2)
    found = [evaluate_predictions(labels, likely, ["a", "b"], bootstrap=100, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0].scores["accuracy"] != found[2].scores["accuracy"]
    assert found[0].scores["accuracy"].value == found[2].scores["accuracy"].value


def test_groups_widen_the_interval_of_clustered_rows() -> None:
    labels, likely, group = clustered(60, 9)

    def width(**given: Any) -> float:
        accuracy = evaluate_predictions(labels, likely, ["a", "b"], bootstrap=400, **given).scores["accuracy"]
        assert accuracy.low is not None
        assert accuracy.high is not None
        assert accuracy.low < accuracy.value < accuracy.high  # type: ignore[operator]
        return accuracy.high - accuracy.low

    by_row, by_group = width(), width(groups=group)
    assert 2 < by_group / by_row < 4  # nine rows that are one: the square root of nine
    names = np.array([f"lesion {number}" for number in group], object)
    assert width(groups=names) == by_group
    names[:] = ""  # rows of no group are groups of their own
    assert width(groups=names) == by_row


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, covered = np.random.default_rng(0), 0
    for number in range(100):
        said = (draw.random(150) < 0.8).astype(int)
        found = evaluate_predictions(np.ones(150, int), None, ["no", "yes"], predicted=said, bootstrap=200, seed=number)
        accuracy = found.scores["accuracy"]
        covered += accuracy.low <= 0.8 <= accuracy.high  # type: ignore[operator]
    assert 88 <= covered <= 99


def test_rows_of_one_group_have_no_interval() -> None:
    labels, likely, _ = clustered(10, 2)
    found = evaluate_predictions(labels, likely, ["a", "b"], groups=np.zeros(20))
    assert found.groups == 1
    assert found.scores["accuracy"].low is None
