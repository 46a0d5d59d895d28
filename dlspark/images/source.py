"""CSV tables, read through fsspec."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TYPE_CHECKING

import fsspec

from dlspark.errors import DataError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def read_csv(uri: str, spark: SparkSession) -> DataFrame:
    """Read a CSV file with a header in one executor; all cells are text.

    Raises:
        DataError: there is no such file, it has no header, or two columns have one name. A line with a wrong number of
            cells fails the job that reads it.
    """
    try:
        with fsspec.open(uri, "rt", encoding="utf-8-sig", newline="") as lines:
            header = next(csv.reader(lines), [])
    except FileNotFoundError as error:
        raise DataError(f"Expected a CSV file; got {uri!r}, which does not exist.") from error
    if not header or len({name.lower() for name in header}) != len(header):  # Spark ignores the case of column names
        raise DataError(f"Expected a header with distinct column names in {uri!r}; got {header}.")
    rows = spark.sparkContext.parallelize([uri], 1).flatMap(_csv_rows)
    from pyspark.sql.types import StringType, StructField, StructType

    return spark.createDataFrame(rows, StructType([StructField(name, StringType()) for name in header]))


def _csv_rows(uri: str) -> Iterator[list[str]]:
    with fsspec.open(uri, "rt", encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        header = next(reader)
        for row in reader:
            if row and len(row) != len(header):
                raise DataError(f"Expected {len(header)} cells in line {reader.line_num} of {uri!r}; got {len(row)}.")
            if row:
                yield row
