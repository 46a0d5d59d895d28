"""Checks of a Spark DataFrame given to Trainer.fit, before its executors write its rows."""

from __future__ import annotations

from typing import Any

from dlspark.data import check_distinct, quoted
from dlspark.driver import label_checks
from dlspark.errors import DataError

_NUMBERS = ("tinyint", "smallint", "int", "bigint", "float", "double")


def columns(name: str, data: Any) -> None:
    """Reject a DataFrame without features, with two columns of one name, or without an end. Starts no Spark job."""
    if len(data.columns) < 2:
        raise DataError(f"Expected feature columns in {name} and the label column last; got {data.columns}.")
    if data.isStreaming:
        raise DataError(f"Expected a DataFrame with an end as {name}; got a streaming one. Write it to a table first.")
    check_distinct(data, name)


def labels(name: str, data: Any, model: Any) -> None:
    """Reject class indices outside the model's classes in a DataFrame's last column, by one small Spark job."""
    units, label = label_checks.classes_of(model), data.columns[-1]
    if units is None or dict(data.dtypes)[label] not in _NUMBERS:
        return
    from pyspark.sql import functions as F

    column = F.col(quoted(label))
    ignored = label_checks.ignored_of(model)
    used = column if ignored is None else F.when(column != F.lit(ignored), column)
    missing = column.isNull() | F.isnan(column.cast("double"))
    low, high, broken, absent = data.agg(
        F.min(used), F.max(used), F.max(used != F.round(used)), F.sum(missing.cast("int"))
    ).first()
    if absent:
        raise DataError(
            f"Expected a value in every row of column {label!r} in {name}; got {absent} nulls or NaN. Drop or fill them."
        )
    label_checks.indices(f"{name}'s last column, {label!r},", units, low, high, whole=not broken)
