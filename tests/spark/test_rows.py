from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlspark.errors import ConfigError, DataError
from dlspark.spark.rows import write_dataframe
from dlspark.storage.store import Store

pytestmark = pytest.mark.spark


def everything(rows: Any) -> tuple[Any, ...]:
    with rows.open() as reader:
        return reader.batch(np.arange(reader.rows))


def test_arrays_scalars_and_labels(spark: Any, tmp_path: Path) -> None:
    df = spark.range(25, numPartitions=3).selectExpr(
        "array(cast(id as float), cast(id * 2 as float)) as features", "cast(id % 3 as int) as label", "id / 2 as w"
    )
    rows = write_dataframe(Store(tmp_path), "data", df, sample_weight="w", num_classes=3)
    assert rows.rows == 25
    assert len(rows.files) == 3
    assert rows.num_classes == 3
    assert set(Store(tmp_path).child("data").list()) == set(rows.files)
    x, y, w = everything(rows)
    ids = np.arange(25)  # the order of partitions, and of rows in each
    np.testing.assert_array_equal(x, np.stack([ids, ids * 2], 1).astype(np.float32))
    assert x.dtype == np.float32
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y, ids % 3)
    np.testing.assert_array_equal(w, ids / 2)


def test_vectors_dense_and_sparse(spark: Any, tmp_path: Path) -> None:
    from pyspark.ml import linalg
    from pyspark.mllib import linalg as older

    for kind in (linalg.Vectors, older.Vectors):
        df = spark.createDataFrame([(kind.dense([1, 2, 3]), 1.0), (kind.sparse(3, {1: 5.0}), 0.0)], ["features", "label"])
        x, y = everything(write_dataframe(Store(tmp_path), "data", df.coalesce(1)))
        assert x.dtype == np.float32
        assert x.tolist() == [[1, 2, 3], [0, 5, 0]]
        assert y.tolist() == [1, 0]


def test_nested_arrays_and_many_inputs(spark: Any, tmp_path: Path) -> None:
    df = spark.range(4).selectExpr(
        "array(array(id, id), array(id, id), array(id, 7L)) as image", "id > 1 as flag", "id as `a.b`"
    )
    features = {"image": "image", "rest": ["flag", "a.b"]}
    rows = write_dataframe(Store(tmp_path), "data", df.coalesce(1), features=features, label=None)
    (x,) = everything(rows)
    assert x["image"].shape == (4, 3, 2)
    assert x["image"][3].tolist() == [[3, 3], [3, 3], [3, 7]]
    assert x["rest"][0].tolist() == [False, False, True, True]
    assert x["rest"][0].dtype == bool
    assert x["rest"][1].tolist() == [0, 1, 2, 3]


def test_many_arrow_batches_become_one(spark: Any, tmp_path: Path) -> None:
    df = spark.range(25_000, numPartitions=1).selectExpr("id as features", "id as label")
    rows = write_dataframe(Store(tmp_path), "data", df)
    with rows.open() as reader:
        assert len(reader._chunks["features"]) == 1
        assert reader.take(np.array([24_999]))["label"] == [24_999]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("if(id = 5, null, id)", "nulls"),
        ("array(1.0f, if(id = 5, null, 2.0f))", "nulls"),
        ("if(id = 5, array(1, 2), array(1))", r"\(1,\) and \(2,\)|\(2,\) and \(1,\)"),
        ("if(id < 2, array(1, 2), array(1))", "one shape"),
        ("cast(array() as array<int>)", "one shape"),
    ],
)
def test_rows_that_do_not_fit_are_refused(spark: Any, tmp_path: Path, column: str, message: str) -> None:
    df = spark.range(8, numPartitions=2).selectExpr(f"{column} as features", "id as label")
    with pytest.raises(DataError, match=message) as caught:
        write_dataframe(Store(tmp_path), "data", df)
    assert "features" in str(caught.value)
    assert Store(tmp_path).list() == ()


@pytest.mark.parametrize("column", ["'text'", "cast(id as decimal(9, 2))", "binary('a')", "map('a', 1)", "array('a')"])
def test_types_that_are_no_numbers_are_refused(spark: Any, tmp_path: Path, column: str) -> None:
    df = spark.range(2).selectExpr(f"{column} as features", "id as label")
    with pytest.raises(ConfigError, match="'features'"):
        write_dataframe(Store(tmp_path), "data", df)


@pytest.mark.parametrize("wrong", ["label", "sample_weight"])
def test_a_label_or_weight_that_is_nan_is_refused(spark: Any, tmp_path: Path, wrong: str) -> None:
    nan = "if(id = 5, double('NaN'), id / 2)"
    df = spark.range(8).selectExpr(f"{nan} as features", f"{nan} as nan", "id / 2 as label")
    columns: dict[str, Any] = {"label": "label", wrong: "nan"}
    with pytest.raises(DataError, match="every row of column 'nan'; got NaN"):
        write_dataframe(Store(tmp_path), "data", df, **columns)
    x, _ = everything(write_dataframe(Store(tmp_path), "data", df))  # a network may know what to do with it
    assert np.isnan(x).sum() == 1


def test_two_columns_of_one_name_are_refused(spark: Any, tmp_path: Path) -> None:
    df = spark.range(2).selectExpr("id as features", "id as label", "id as Label", "id as other", "id as other")
    with pytest.raises(ConfigError, match=r"distinct names in the DataFrame; got 'label' and 'Label'. Rename or drop"):
        write_dataframe(Store(tmp_path), "data", df)
    write_dataframe(Store(tmp_path), "data", df, label=None)


def test_no_rows_and_unknown_columns(spark: Any, tmp_path: Path) -> None:
    df = spark.range(2).selectExpr("id as features", "id as label")
    with pytest.raises(DataError, match="at least one row"):
        write_dataframe(Store(tmp_path), "data", df.filter("label > 9"))
    with pytest.raises(ConfigError, match="Did you mean 'label'"):
        write_dataframe(Store(tmp_path), "data", df, label="labl")


def test_empty_partitions_and_a_second_run(spark: Any, tmp_path: Path) -> None:
    df = spark.range(10, numPartitions=5).filter("id = 4").selectExpr("id as features", "id as label")
    write_dataframe(Store(tmp_path), "data", df)
    rows = write_dataframe(Store(tmp_path), "data", df)
    assert rows.rows_per_file == (1,)
    assert Store(tmp_path).child("data").list() == rows.files


def test_a_store_that_the_driver_cannot_see_is_told(spark: Any) -> None:
    df = spark.range(2).selectExpr("id as features", "id as label")
    with pytest.raises(ConfigError, match="share"):  # each process has its own memory://
        write_dataframe(Store("memory://bucket"), "data", df)
