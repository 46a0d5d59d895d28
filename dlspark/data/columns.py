"""Columns of Spark DataFrames by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column


def quoted(column: str) -> str:
    """The name as Spark takes it wherever a dot would else mean a field of a struct."""
    return "`" + column.replace("`", "``") + "`"


def empty(column: str) -> Column:
    """Whether a row has nothing there: null, or no more than spaces."""
    from pyspark.sql import functions as F

    value = F.col(quoted(column))
    return value.isNull() | (F.trim(value.cast("string")) == "")
