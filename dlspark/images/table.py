"""Checks of a layout's table, before rows are split and images are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlspark.data import empty
from dlspark.errors import ConfigError, DataError
from dlspark.images.write import SOURCE_SIZE

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def normalised(rows: DataFrame) -> DataFrame:
    """Cast ids, labels, groups and problems to text.

    Raises:
        ConfigError: a required column is missing, or a reserved one is present.
    """
    from pyspark.sql import functions as F

    missing = {"path", "id", "label"} - set(rows.columns)
    if missing:
        raise ConfigError(
            f"Expected the columns path, id and label from the layout; got no {', '.join(sorted(missing))}. Add them."
        )
    for name in ("image", *SOURCE_SIZE):
        if name in rows.columns:
            raise ConfigError(
                f"Expected no column {name!r} from the layout; got one. Rename it: prepare_images writes that column."
            )
    for name in ("path", "id", "label", "group", "problem"):
        if name in rows.columns:
            rows = rows.withColumn(name, F.col(name).cast("string"))
    return rows


def counted(rows: DataFrame, settings: dict[str, Any], reads: str) -> tuple[int, tuple[str, ...]]:
    """Check ids and labels; returns the number of rows and the names of the classes.

    Args:
        rows: the result of `normalised`.
        settings: those of the manifest; messages name ``source`` and ``layout``.
        reads: what the layout reads, for the message when it finds nothing.

    Raises:
        DataError: there are no rows, a row has no id or label, or an id occurs twice.
    """
    from pyspark.sql import functions as F

    # One pass. Examples of wrong rows are looked up only if there are any.
    seen = rows.agg(
        F.count(F.lit(1)).alias("rows"),
        F.count_if(empty("id")).alias("id"),
        F.count_if(empty("label")).alias("label"),
        F.countDistinct("id").alias("distinct"),
        F.collect_set("label").alias("classes"),
    ).collect()[0]
    total = int(seen["rows"])
    if total == 0:
        raise DataError(
            f"Expected images in {settings['source']!r}; got none with the layout {settings['layout']!r}. It reads: {reads}"
        )
    for name in ("id", "label"):
        if seen[name]:
            example = rows.filter(empty(name)).select("path").first()[0]
            raise DataError(f"Expected a {name} for every image; got none for {seen[name]} of {total}, such as {example!r}.")
    if seen["distinct"] < total:
        several = rows.groupBy("id").agg(F.count(F.lit(1)).alias("times"), F.min("path"), F.max("path"))
        name, times, one, other = several.filter("times > 1").orderBy("id").first()
        raise DataError(f"Expected distinct ids; got {name!r} {times} times, for {one!r} and {other!r}.")
    return total, tuple(sorted(seen["classes"]))
