from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import pytest

from dlspark.data.split import Split, assign, undersampled
from dlspark.data.split_report import leak_warning, split_report
from dlspark.errors import ConfigError, DataError

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def table(spark: Any) -> Any:
    """100 rows of a, 33 of b, 5 of c; groups of one to four rows, some with two labels."""
    labels = ["a"] * 100 + ["b"] * 33 + ["c"] * 5
    rows = [(f"id-{i:03d}", label, f"g{i * 7 % 53}") for i, label in enumerate(labels)]
    return spark.createDataFrame(rows, "id string, label string, lesion string").cache()


def parts(df: Any, split: Split, **more: Any) -> dict[str, str]:
    return {row["id"]: row["part"] for row in assign(df, split, **more).select("id", "part").collect()}


def by_label(df: Any, found: dict[str, str]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for row in df.collect():
        counts.setdefault(row["label"], Counter())[found[row["id"]]] += 1
    return counts


def test_labels_are_shared_out_to_the_nearest_row(table: Any) -> None:
    counts = by_label(table, parts(table, Split(test=0.2, validation=0.1)))
    assert counts["a"] == {"test": 20, "validation": 10, "train": 70}
    assert counts["b"] == {"test": 7, "validation": 3, "train": 23}  # 6.6 and 3.3
    assert counts["c"] == {"test": 1, "validation": 1, "train": 3}  # 1.0 and 0.5


def test_halves_go_up_whatever_binary_fractions_say(table: Any) -> None:
    ten = table.filter("id < 'id-010'")
    assert Counter(parts(ten, Split(test=0.35)).values()) == {"test": 4, "train": 6}


def test_without_stratification_the_whole_is_exact(table: Any) -> None:
    found = parts(table.drop("label"), Split(test=0.25, stratify=False))
    assert Counter(found.values()) == {"test": 35, "train": 103}  # 34.5


def test_nothing_to_draw(table: Any) -> None:
    assert set(parts(table, Split(test=0.0)).values()) == {"train"}


def test_it_hangs_on_seed_and_id_alone(table: Any) -> None:
    split = Split(test=0.3, validation=0.2, seed=5)
    first = parts(table, split)
    assert parts(table.repartition(7, "lesion").withColumnRenamed("lesion", "other"), split) == first
    assert parts(table.coalesce(1).orderBy("id", ascending=False), split) == first
    assert parts(table, Split(test=0.3, validation=0.2, seed=6)) != first
    # A known draw: a version that draws differently would silently mix train and test of a finished dataset.
    draw = sorted((f"id-{i}" for i in range(133, 138)), key=lambda id: hashlib.sha256(f"5:{id}".encode()).hexdigest())
    assert [first[id] for id in draw] == ["test", "test", "validation", "train", "train"]


@pytest.mark.parametrize("stratify", [True, False])
def test_groups_are_never_on_two_sides(table: Any, stratify: bool) -> None:
    found = parts(table, Split(test=0.3, validation=0.2, group="lesion", stratify=stratify, seed=3))
    sides: dict[str, set[str]] = {}
    for row in table.collect():
        sides.setdefault(row["lesion"], set()).add(found[row["id"]])
    assert all(len(side) == 1 for side in sides.values())
    counts = Counter(found.values())
    assert sum(counts.values()) == 138
    assert abs(counts["test"] - 0.3 * 138) < 6
    assert abs(counts["validation"] - 0.2 * 138) < 6


def test_a_group_of_half_the_rows_goes_to_one_side(spark: Any) -> None:
    rows = [(str(i), "a", "large" if i < 50 else f"small-{i}") for i in range(100)]
    df = spark.createDataFrame(rows, "id string, label string, group string")
    found = parts(df, Split(test=0.2, group="group"))
    assert {found[str(i)] for i in range(50)} == {"train"}


def test_a_column_that_says_it(spark: Any) -> None:
    df = spark.createDataFrame(
        [("1", "train", "p"), ("2", "test", "q"), ("3", "train", "p")], "id string, fold string, p string"
    )
    assert parts(df, Split(column="fold", group="p")) == {"1": "train", "2": "test", "3": "train"}
    leaking = df.replace("q", "p")
    with pytest.raises(DataError, match="got 'p' in 2 parts"):
        parts(leaking, Split(column="fold", group="p"))
    with pytest.raises(DataError, match=r"got '[pq]'"):
        parts(df, Split(column="p"))


def test_a_row_without_group_is_refused(spark: Any) -> None:
    df = spark.createDataFrame([("1", "a", "p"), ("2", "a", " "), ("3", "a", None)], "id string, label string, p string")
    for rows in (df.filter("id != '3'"), df.filter("id != '2'")):
        with pytest.raises(DataError, match="Expected a p in every row"):
            assign(rows, Split(group="p"))


def test_unknown_columns_are_refused(table: Any) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'lesion'"):
        assign(table, Split(group="leson"))
    with pytest.raises(ConfigError, match="'fold'"):
        assign(table, Split(column="fold"))
    with pytest.raises(ConfigError, match="'label'"):
        assign(table.drop("label"), Split())


@pytest.mark.parametrize(
    "fractions", [{"test": 1.0}, {"test": -0.1}, {"test": 0.5, "validation": 0.5}, {"test": "0.2"}, {"test": -3}]
)
def test_fractions_that_cannot_be(fractions: Any) -> None:
    with pytest.raises(ConfigError, match="test and validation"):
        Split(**fractions)


def test_numbers_of_rows_are_exact(table: Any) -> None:
    for stratify in (True, False):
        found = parts(table, Split(test=31, validation=7, stratify=stratify))
        assert Counter(found.values()) == {"test": 31, "validation": 7, "train": 100}
    counts = by_label(table, parts(table, Split(test=31, validation=7)))
    for label, rows in {"a": 100, "b": 33, "c": 5}.items():
        assert abs(counts[label]["test"] - 31 * rows / 138) < 1
    with pytest.raises(DataError, match="139 rows"):
        parts(table, Split(test=139))


@pytest.mark.parametrize("stratify", [True, False])
def test_every_row_tests_in_one_fold(table: Any, stratify: bool) -> None:
    folds = [parts(table, split) for split in Split.kfold(5, seed=2, stratify=stratify, validation=0.1)]
    tested = [{name for name, part in fold.items() if part == "test"} for fold in folds]
    assert sorted(map(len, tested)) == [27, 27, 28, 28, 28]
    assert len(set().union(*tested)) == 138
    for fold in folds:
        assert abs(Counter(fold.values())["validation"] - 13.8) < 2
        if stratify:
            assert by_label(table, fold)["c"]["test"] == 1


def test_every_group_tests_in_one_fold(table: Any) -> None:
    lesion = {row["id"]: row["lesion"] for row in table.collect()}
    seen: Counter[str] = Counter()
    for split in Split.kfold(4, group="lesion", validation=0.2):
        found = parts(table, split)
        sides: dict[str, set[str]] = {}
        for name, part in found.items():
            sides.setdefault(lesion[name], set()).add(part)
        assert all(len(side) == 1 for side in sides.values())
        seen.update(group for group, side in sides.items() if side == {"test"})
        assert abs(Counter(found.values())["test"] - 138 / 4) < 8
    assert set(seen.values()) == {1}
    assert set(seen) == set(lesion.values())


def test_undersampling_touches_training_rows_only(table: Any) -> None:
    parted = assign(table, Split(test=0.2))
    less = undersampled(parted, seed=0)
    assert Counter(row["label"] for row in less.filter("part = 'train'").collect()) == {"a": 4, "b": 4, "c": 4}
    assert less.filter("part = 'test'").count() == parted.filter("part = 'test'").count()
    ids = {row["id"] for row in less.collect()}
    assert ids == {row["id"] for row in undersampled(parted.repartition(5), seed=0).collect()}
    assert ids != {row["id"] for row in undersampled(parted, seed=1).collect()}


def test_the_report_counts_and_names_what_leaks(table: Any) -> None:
    grouped = table.withColumnRenamed("lesion", "group")
    leaking = split_report(assign(grouped, Split(test=0.3)))
    assert leaking["parts"]["test"]["rows"] == 42
    assert leaking["parts"]["train"]["by_class"] == {"a": 70, "b": 23, "c": 3}
    assert leaking["groups"]["torn"] > 10
    assert leaking["groups"]["first"][0] in (leak_warning(leaking) or "")
    whole = split_report(assign(grouped, Split(test=0.3, group="group")))
    assert whole["groups"] == {"of": 53, "torn": 0, "rows": 0, "first": []}
    assert sum(part["groups"] for part in whole["parts"].values()) == 53
    lesions = grouped.select("label", "group").distinct().groupBy("label").count().collect()
    for label, count in lesions:
        assert sum(part["groups_by_class"].get(label, 0) for part in whole["parts"].values()) == count
    assert leak_warning(whole) is None
    assert leak_warning(split_report(assign(table, Split()))) is None


@pytest.mark.parametrize("settings", [{"fold": (5, 5), "test": 0.2}, {"fold": (0, 4)}, {"fold": (0, 1), "test": 1}])
def test_folds_that_cannot_be(settings: Any) -> None:
    with pytest.raises(ConfigError, match="kfold"):
        Split(**settings)
