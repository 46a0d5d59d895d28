"""The step ``fit`` on kept tables: test rows do not affect the fit, and its predictions are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlspark.errors import ConfigError
from dlspark.ml.tables import read_local, read_table, write_table
from dlspark.storage.steps import Folder, Result
from dlspark.storage.store import Store
from dlspark.study.fits import keep_fit
from dlspark.study.judge import mean_of_predictions
from dlspark.study.pipelines import FitSettings, check_params

pytestmark = [pytest.mark.spark, pytest.mark.slow]

CLASSES = ("hem", "all")
SETTINGS = FitSettings(
    algorithm="logistic_regression",
    vectors=("features_0", "features_1"),
    categorical=("sex",),
    numeric=("age",),
    pca=2,
    params={"maxIter": 2},
    grid={},
)
COLUMNS = {
    "id": "string",
    "part": "string",
    "label": "integer",
    "sex": "string",
    "age": "string",
    "fold": "integer",
    "prediction": "string",
}


def kept(store: Store, rows: list[dict[str, Any]], kinds: dict[str, Any]) -> Result:
    """A table as `write_table` writes it."""
    with store.open_writer("rows.parquet") as path:
        arrow = {"string": pa.string(), "integer": pa.int32(), "double": pa.float64()}
        types = [(name, arrow[kind] if isinstance(kind, str) else pa.list_(pa.float64())) for name, kind in kinds.items()]
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(types)), path)
    fields = [{"name": name, "type": kind, "nullable": True, "metadata": {}} for name, kind in kinds.items()]
    table = {"files": ["rows.parquet"], "rows": [len(rows)], "schema": {"type": "struct", "fields": fields}}
    return Result(store, {"table": table}, 0.0, {})


def needed(store: Store, shift: float) -> list[Result]:
    """The needed results, with two separable classes; every third row is a test row, and ``shift`` moves half of those."""
    draw = np.random.default_rng(0)
    rows, features = [], []
    for i in range(48):
        test, label = i % 3 == 0, i // 3 % 2
        moved = shift if i % 6 == 0 else 0.0
        # In all columns: once they are standardised, components of one telling column among others would miss it.
        x = (draw.normal(size=5) + 4 * label + moved).tolist()
        sex = "new" if moved else None if i == 7 else "fm"[i % 2]
        age = None if i == 4 else str(40.0 + i % 5 + moved)  # as the layout csv has numbers
        part, fold = ("test", None) if test else ("train", i // 6 % 2)
        rows.append(
            {"id": f"{i:02d}", "part": part, "label": label, "sex": sex, "age": age, "fold": fold, "prediction": "theirs"}
        )
        features.append({"id": f"{i:02d}", "features": x})
    first = [{**row, "features": row["features"][:3]} for row in features]
    second = [{**row, "features": row["features"][3:]} for row in features]
    kinds = {"id": "string", "features": {"type": "array", "elementType": "double", "containsNull": True}}
    tables = [kept(store.child("one"), first, kinds), kept(store.child("two"), second, kinds)]
    return [Result(store, {"classes": list(CLASSES)}, 0.0, {}), kept(store.child("rows"), rows, COLUMNS), *tables]


def test_changed_test_rows_change_nothing_that_was_fitted(spark: Any, tmp_path: Path) -> None:
    results, predicted = [], []
    for shift in (0.0, 50.0):
        store = Store(tmp_path / "a b%20c" / str(shift))
        document = keep_fit(Folder(store.child("fit"), needed(store, shift)), spark, SETTINGS)
        results.append(Result(store.child("fit"), document, 0.0, {}))
        predicted.append(read_local(results[-1].store, document["table"]).sort_by("id").to_pydict())
        assert store.child("fit").exists("pipeline/metadata")
    one, other = results[0].document, results[1].document
    assert (one["params"], one["inputs"]) == (other["params"], other["inputs"]) == ({"maxIter": 2}, 2 + 2 + 1)
    # Spark adds up partitions in the order in which they finish, so the last digits differ between runs.
    assert one["explained"] == pytest.approx(other["explained"], rel=1e-6)
    assert predicted[0]["id"] == predicted[1]["id"] == [f"{i:02d}" for i in range(0, 48, 3)]
    before, after = (np.array(table["probabilities"]) for table in predicted)
    assert before[1::2] == pytest.approx(after[1::2], rel=1e-6)  # predictions of the rows that did not change
    assert not np.allclose(before[::2], after[::2])
    assert (before.argmax(axis=1) == np.arange(0, 48, 3) // 3 % 2).mean() > 0.9

    store = Store(tmp_path / "mean")
    mean = mean_of_predictions(Folder(store, results))
    assert read_local(store, mean["table"])["probabilities"].to_pylist() == pytest.approx(((before + after) / 2), abs=1e-6)


def test_a_strangers_kind_of_classifier_is_fitted(spark: Any, stranger: None, tmp_path: Path) -> None:
    settings = replace(SETTINGS, algorithm="naive_bayes", params={"smoothing": 0.5}, categorical=(), numeric=(), pca=None)
    with pytest.raises(ConfigError, match="Did you mean 'smoothing'"):
        check_params(replace(settings, params={"smothing": 0.5}))
    store = Store(tmp_path)
    document = keep_fit(Folder(store.child("fit"), needed(store, 0.0)), spark, settings)
    assert (document["params"], document["inputs"]) == ({"smoothing": 0.5}, 3 + 2)
    probabilities = read_local(store.child("fit"), document["table"]).sort_by("id")["probabilities"].to_pylist()
    assert (np.argmax(probabilities, axis=1) == np.arange(0, 48, 3) // 3 % 2).mean() > 0.9


def test_a_table_comes_back_as_it_was(spark: Any, tmp_path: Path) -> None:
    rows = [(f"{i}", None if i == 3 else i / 2, [float(i), 0.5]) for i in range(7)]
    df = spark.createDataFrame(rows, "id string, `a.b` double, x array<float>").repartition(3)
    store = Store(tmp_path / "table")
    table = json.loads(json.dumps(write_table(store, df)))
    store.write_bytes("part-of-an-attempt.parquet", b"not counted")
    found = read_table(spark, store, table)
    assert found.schema == df.schema
    assert sorted((row.id, row["a.b"], row.x) for row in found.collect()) == rows
    assert sum(table["rows"]) == 7
