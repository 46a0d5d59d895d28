"""The table that a layout gives: what must hold of it before a split or an image is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlspark.data import empty
from dlspark.errors import ConfigError, DataError
from dlspark.images.write import SOURCE_SIZE

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def normalised(rows: DataFrame) -> DataFrame:
    """The layout's rows with ids, labels, groups and problems as text.

    Raises:
        ConfigError: a column that a layout must give is missing, or one that it must not is there.
    """
    from pyspark.sql import functions as F

    missing = {"path", "id", "label"} - set(rows.columns)
    if missing:
        raise ConfigError(
            f"Expected the layout to give the columns path, id and label: {', '.join(sorted(missing))} missing."
        )
    for name in ("image", *SOURCE_SIZE):
        if name in rows.columns:
            raise ConfigError(
                f"Expected the layout to leave the column name {name!r} to prepare_images. Rename that column."
            )
    for name in ("path", "id", "label", "group", "problem"):
        if name in rows.columns:
            rows = rows.withColumn(name, F.col(name).cast("string"))
    return rows


def counted(rows: DataFrame, settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """How many there are and of which classes, after a look at what would make the dataset wrong.

    Args:
        rows: what `normalised` gave.
        settings: the manifest's; ``source`` and ``layout`` are named in messages.

    Raises:
        DataError: no rows, a row without id or label, or an id twice.
    """
    from pyspark.sql import functions as F

    # One pass; what went wrong is looked up only when something did.
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
            f"Expected images in {settings['source']!r}: the layout {settings['layout']!r} found none. It looks for "
            "class folders with .jpg, .png, .bmp, .webp or .tif files ('folders'), or for a table of images ('csv')."
        )
    for name in ("id", "label"):
        if seen[name]:
            example = rows.filter(empty(name)).select("path").first()[0]
            raise DataError(f"Expected a {name} for every image: {seen[name]} of {total} have none, such as {example!r}.")
    if seen["distinct"] < total:
        several = rows.groupBy("id").agg(F.count(F.lit(1)).alias("times"), F.min("path"), F.max("path"))
        name, times, one, other = several.filter("times > 1").orderBy("id").first()
        raise DataError(f"Expected every id once: {name!r} comes {times} times, for {one!r} and {other!r}.")
    return total, tuple(sorted(seen["classes"]))
