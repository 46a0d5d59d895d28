"""Evaluations equal those of scikit-learn."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from dlspark.errors import ConfigError, DataError
from dlspark.evaluation.evaluation import Evaluation, evaluate_predictions
from dlspark.evaluation.predictions import bands, unit_numbers, value_texts
from dlspark.evaluation.scores import CURVE_POINTS

NAMES = ("akiec", "mel", "nv")


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def drawn(rows: int, classes: int = 3, seed: int = 0) -> tuple[Any, Any]:
    """Labels of unequal classes, and probabilities that are mostly right, with ties."""
    draw = np.random.default_rng(seed)
    labels = draw.choice(classes, rows, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    likely = draw.dirichlet(np.ones(classes), rows).round(1) + 0.1
    likely[np.arange(rows), labels] += 0.3
    return labels, likely / likely.sum(axis=1, keepdims=True)


def test_scores_are_those_of_scikit_learn() -> None:
    labels, likely = drawn(300)
    found = evaluate_predictions(labels, likely, NAMES, bootstrap=0)

    said, one_hot = likely.argmax(axis=1), np.eye(3)[labels]
    expected = {
        "accuracy": metrics.accuracy_score(labels, said),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, said),
        "weighted_precision": metrics.precision_score(labels, said, average="weighted"),
        "weighted_recall": metrics.recall_score(labels, said, average="weighted"),
        "weighted_f1": metrics.f1_score(labels, said, average="weighted"),
        "macro_f1": metrics.f1_score(labels, said, average="macro"),
        "auroc_micro": metrics.roc_auc_score(one_hot, likely, average="micro"),
        "auroc_macro": metrics.roc_auc_score(labels, likely, multi_class="ovr"),
        "average_precision_micro": metrics.average_precision_score(one_hot, likely, average="micro"),
        "average_precision_macro": metrics.average_precision_score(one_hot, likely, average="macro"),
        "log_loss": metrics.log_loss(labels, likely),
    }
    assert {name: score.value for name, score in found.scores.items()} == pytest.approx(expected, abs=1e-12)
    assert np.array_equal(found.confusion, metrics.confusion_matrix(labels, said))
    for score, of_classes in {
        "precision": metrics.precision_score(labels, said, average=None),
        "recall": metrics.recall_score(labels, said, average=None),
        "f1": metrics.f1_score(labels, said, average=None),
        "auroc": metrics.roc_auc_score(one_hot, likely, average=None),
        "average_precision": metrics.average_precision_score(one_hot, likely, average=None),
    }.items():
        assert [getattr(each, score).value for each in found.by_class] == pytest.approx(of_classes, abs=1e-12)
    assert [each.rows for each in found.by_class] == np.bincount(labels).tolist()
    assert found.scores["accuracy"].low is None


def test_two_classes_known_by_hand() -> None:
    found = evaluate_predictions([0, 0, 1, 1], [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]], ["all", "hem"])
    assert found.confusion == ((2, 0), (1, 1))
    assert found.scores["accuracy"].value == 0.75
    assert found.scores["auroc_macro"].value == 0.75  # of four pairs one is the wrong way round
    assert found.scores["log_loss"].value == pytest.approx(-np.log([0.9, 0.6, 0.3, 0.8]).mean())
    assert found.by_class[1].precision.value == 1.0
    assert found.by_class[0].f1.value == pytest.approx(0.8)


def test_what_is_undefined_is_none() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    likely = np.array([[0.8, 0.2, 0], [0.4, 0.1, 0.5], [0.6, 0.4, 0], [0.9, 0.1, 0], [0.7, 0.3, 0], [0.6, 0.4, 0]])
    found = evaluate_predictions(labels, likely, NAMES)
    akiec, mel, nv = found.by_class
    assert (nv.rows, nv.predicted, nv.precision.value) == (0, 1, 0.0)
    assert [nv.recall.value, nv.f1.value, nv.auroc.value, nv.average_precision.value] == [None] * 4
    assert (mel.precision.value, mel.recall.value, mel.f1.value) == (None, 0.0, 0.0)
    assert akiec.recall.value == pytest.approx(2 / 3)
    assert found.scores["balanced_accuracy"].value == pytest.approx(1 / 3)
    assert found.scores["auroc_macro"].value == pytest.approx((akiec.auroc.value + mel.auroc.value) / 2)
    assert [curve.name for curve in found.roc] == ["akiec", "mel", "micro"]

    alone = evaluate_predictions([1, 1], [[0.5, 0.4, 0.1], [0.1, 0.9, 0]], NAMES)
    assert alone.scores["auroc_macro"].value is None
    assert alone.scores["auroc_micro"].value is not None
    assert json.loads(alone.to_json())["by_class"][0]["recall"] == {"value": None, "low": None, "high": None}

    of_one = evaluate_predictions([1], [[0.2, 0.8, 0]], NAMES)
    assert (of_one.scores["accuracy"].value, of_one.scores["accuracy"].low) == (1.0, None)


def test_predictions_without_probabilities() -> None:
    labels, likely = drawn(50)
    said = likely.argmax(axis=1)
    found = evaluate_predictions(labels, None, NAMES, predicted=said.astype("float64"), bootstrap=50)
    whole = evaluate_predictions(labels, likely, NAMES, bootstrap=50)
    for name, score in found.scores.items():
        if name.startswith(("auroc", "average_precision", "log_loss")):
            assert score.value is None
        else:
            assert score == whole.scores[name]
    assert found.roc == ()


def test_by_value_is_the_evaluation_of_those_rows() -> None:
    labels, likely = drawn(200)
    sex = np.random.default_rng(1).choice(np.array(["female", "male", ""], object), 200)
    age = np.arange(200) % 110.0
    age[3] = np.nan
    groups = np.arange(200) // 2
    found = evaluate_predictions(
        labels, likely, NAMES, groups=groups, by={"sex": sex, "age": bands(age, 25)}, bootstrap=30, seed=5
    )
    assert list(found.by["sex"]) == ["female", "male", "(unknown)"]
    assert list(found.by["age"]) == [
        "0 to below 25", "25 to below 50", "50 to below 75", "75 to below 100", "100 to below 125", "(unknown)",
    ]  # fmt: skip
    assert sum(part.rows for part in found.by["age"].values()) == found.rows == 200
    there = sex == "male"
    alone = evaluate_predictions(labels[there], likely[there], NAMES, groups=groups[there], bootstrap=30, seed=5)
    assert found.by["sex"]["male"].scores == alone.scores
    assert found.by["sex"]["male"].by_class == alone.by_class
    assert found.by["sex"]["male"].groups == alone.groups == len(set(groups[there]))


def test_json_and_the_order_of_classes() -> None:
    labels, likely = drawn(80)
    found = evaluate_predictions(labels, likely, NAMES, by={"half": np.arange(80) % 2}, bootstrap=20)
    assert Evaluation.from_json(found.to_json()) == found

    first = found.reordered(["mel"])
    assert first.classes == ("mel", "akiec", "nv")
    assert [each.name for each in first.by_class] == ["mel", "akiec", "nv"]
    assert first.confusion[0][1] == found.confusion[1][0]
    assert [curve.name for curve in first.roc] == ["mel", "akiec", "nv", "micro"]
    assert first.by["half"]["1"].classes == first.classes
    assert first.scores == found.scores
    assert first.reordered(NAMES) == found
    with pytest.raises(ConfigError, match="Did you mean 'mel'"):
        found.reordered(["mell"])


def test_curves_are_thinned_and_look_the_same() -> None:
    labels = np.random.default_rng(0).integers(0, 2, 20_000)
    likely = 1 / (1 + np.exp(-np.random.default_rng(1).normal(labels - 0.5, 1.0)))
    found = evaluate_predictions(labels, np.stack([1 - likely, likely], axis=1), ["no", "yes"], bootstrap=0)
    false, true, _ = metrics.roc_curve(labels, likely)
    precision, recall, _ = metrics.precision_recall_curve(labels, likely)
    for curve, x, y in ((found.roc[1], false, true), (found.precision_recall[1], recall, precision)):
        assert curve.name == "yes"
        assert 200 < len(curve.x) <= CURVE_POINTS < len(x)
        ends = {(curve.x[0], curve.y[0]), (curve.x[-1], curve.y[-1])}
        assert ends == {(x[0], y[0]), (x[-1], y[-1])}
        kept = np.stack([curve.x, curve.y], axis=1)
        furthest = max(np.abs(kept - point).sum(axis=1).min() for point in np.stack([x, y], axis=1)[::7])
        length = np.abs(np.diff(x)).sum() + np.abs(np.diff(y)).sum()
        assert furthest <= length / 390


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": [0, 3, 1]}, "Expected labels from 0 to 2, for 3 classes; got 0 to 3"),
        ({"labels": [0, 0.5, 1]}, "Expected labels as class indices"),
        ({"labels": []}, "got none"),
        ({"probabilities": np.ones((3, 2))}, r"shape \(3, 3\); got \(3, 2\)"),
        ({"probabilities": [[-1, 1, 1]] * 3}, "End the model with a softmax"),
        ({"probabilities": np.full((3, 3), np.nan)}, "Expected probabilities"),
        ({"probabilities": None}, "got neither"),
        ({"classes": ["a", "a", "b"]}, "different names"),
        ({"groups": [1, 2]}, r"Expected groups of shape \(3,\), as labels; got \(2,\)"),
        ({"by": {"age": [1.0]}}, r"Expected age of shape \(3,\)"),
        ({"bootstrap": -1}, "Expected bootstrap as a whole number of at least 0"),
    ],
    ids=str,
)
def test_what_cannot_be_judged_is_refused(change: dict[str, Any], told: str) -> None:
    arguments: dict[str, Any] = {"labels": [0, 1, 2], "probabilities": np.eye(3), "classes": NAMES} | change
    with pytest.raises((DataError, ConfigError), match=told):
        evaluate_predictions(**arguments)


def test_columns_of_too_many_values_are_refused() -> None:
    labels, likely = drawn(60)
    with pytest.raises(DataError, match="in 'age'; got 60"):
        evaluate_predictions(labels, likely, NAMES, by={"age": np.arange(60)})
    told = bands(["45", "", None, float("nan"), "9.5"], 20)  # as the layout csv has numbers
    assert told.tolist() == ["40 to below 60", "(unknown)", "(unknown)", "(unknown)", "0 to below 20"]
    with pytest.raises(DataError, match="Remove the width"):
        bands(np.array(["arm", "leg"], object), 20)
    with pytest.raises(ConfigError, match="a width above 0"):
        bands([1.0], 0)


def test_every_spelling_of_a_missing_value_is_unknown() -> None:
    import pandas as pd

    missing = [None, float("nan"), pd.NA, pd.NaT, "", "\u00a0", "NaN", " nan", "<NA>"]
    assert set(value_texts("sex", np.array(missing, object))) == {"(unknown)"}
    values = np.array(["male", " male", "male\u200b", "None"], object)
    assert value_texts("sex", values).tolist() == ["male", "male", "male", "None"]
    assert unit_numbers(np.array([*missing, *values], object)).tolist() == [*range(9), 9, 9, 9, 10]
    assert bands(np.array(["NaN", "41"], object), 20).tolist() == ["(unknown)", "40 to below 60"]
