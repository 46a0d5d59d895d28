"""Checks of a layout's table, before rows are split and images are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dlspark.data import Split, empty
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
    for name in ("path", "id", "label", "group", "problem", "passed_over", "given_part"):
        if name in rows.columns:
            rows = rows.withColumn(name, F.col(name).cast("string"))
    return rows


def without_passed_over(rows: DataFrame) -> tuple[DataFrame, dict[str, int]]:
    """The rows of images, and the number of other files by reason, most frequent first."""
    if "passed_over" not in rows.columns:
        return rows, {}
    counts = rows.filter("passed_over IS NOT NULL").groupBy("passed_over").count().collect()
    by_reason = {row[0]: row[1] for row in sorted(counts, key=lambda row: (-row[1], row[0]))}
    return rows.filter("passed_over IS NULL").drop("passed_over"), by_reason


def in_words(passed_over: Mapping[str, int]) -> str:
    """``passed_over`` in a sentence; empty if there is nothing."""
    return ", ".join(f"{count:,} {reason}" for reason, count in passed_over.items())


def given_split(rows: DataFrame, split: Split, source: str) -> Split:
    """``split``, which keeps the collection's own parts if it asks for no others.

    Raises:
        ConfigError: the collection has parts, and ``split`` asks for sizes or folds.
    """
    if "given_part" not in rows.columns or split.column is not None:
        return split
    default = Split()
    if (split.test, split.validation, split.stratify, split.fold) != (default.test, default.validation, True, None):
        raise ConfigError(
            f"Expected the default split, as {source!r} is split already, into folders of parts; got {split}. Leave out the "
            "sizes and folds to keep that split, or move the class folders of all parts into one folder."
        )
    return replace(split, column="given_part")


def counted(rows: DataFrame, settings: dict[str, Any], reads: str, passed_over: str = "") -> tuple[int, tuple[str, ...]]:
    """Check ids and labels; returns the number of rows and the names of the classes.

    Args:
        rows: the result of `normalised`.
        settings: those of the manifest; messages name ``source`` and ``layout``.
        reads: what the layout reads, for the message when it finds nothing.
        passed_over: what it passed over, for that message.

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
            + (f" Passed over: {passed_over}." if passed_over else "")
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
