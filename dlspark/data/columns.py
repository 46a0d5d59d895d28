"""Columns of Spark DataFrames by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column


def quoted(column: str) -> str:
    """The name in backticks; without them Spark reads a dot as a field of a struct."""
    return "`" + column.replace("`", "``") + "`"


def empty(column: str) -> Column:
    """Whether the value in a row is null or blank."""
    from pyspark.sql import functions as F

    value = F.col(quoted(column))
    return value.isNull() | (F.trim(value.cast("string")) == "")
