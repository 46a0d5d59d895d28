"""Clean and check a layout's table, before rows are split and images are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dlspark.data import check_distinct, empty, may_be_missing, name_warnings, quoted, trimmed
from dlspark.errors import ConfigError, DataError
from dlspark.images.read import read_files
from dlspark.images.write import SOURCE_SIZE

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)

_TEXTS = ("path", "id", "label", "group", "problem")
_OURS = (*_TEXTS, "image", "part", "fold", *SOURCE_SIZE)
_TRIED = 100


def normalised(rows: DataFrame) -> DataFrame:
    """Trim all texts but paths, and make missing ones null; ids, labels, groups and problems become texts.

    Raises:
        ConfigError: a required column is missing, a reserved one is present, or names of columns are alike.
    """
    from pyspark.sql import functions as F

    check_distinct(rows, "the table of the layout")
    for name in rows.columns:
        if not name or (name.lower() in _OURS and name not in _OURS):
            raise ConfigError(f"Expected {name.lower()!r} as the name of a column of the layout; got {name!r}. Rename it.")
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
    texts = {name for name, kind in rows.dtypes if kind == "string" or name in _TEXTS} - {"path"}
    return rows.select(
        F.col("path").cast("string").alias("path"),
        *(
            F.when(~empty(name), trimmed(name)).alias(name) if name in texts else F.col(quoted(name))
            for name in rows.columns
            if name != "path"
        ),
    )


def cleaning(rows: DataFrame) -> dict[str, dict[str, int]]:
    """How many values `normalised` changes: ``trimmed`` and ``missing``, by column, as far as there are any.

    Logs a warning of trimmed texts, and of groups that may stand for a missing value.
    """
    from pyspark.sql import functions as F

    names = [name for name in rows.columns if name not in ("path", "problem")]
    texts = [name for name, kind in rows.dtypes if kind == "string" and name in names]
    changed = [F.count_if(~empty(name) & (F.col(quoted(name)) != trimmed(name))) for name in texts]
    doubtful = [F.collect_set(F.when(may_be_missing("group"), F.col("group")))] if "group" in texts else []
    counted = rows.agg(*(F.count_if(empty(name)) for name in names), *changed, *doubtful).collect()[0]
    found = {
        "missing": {name: count for name, count in zip(names, counted, strict=False) if count},
        "trimmed": {name: count for name, count in zip(texts, counted[len(names) :], strict=False) if count},
    }
    if found["trimmed"]:
        logger.warning("Removed spaces at the ends of texts: %s.", in_words(found["trimmed"]))
    if found["missing"]:
        logger.info("Missing values: %s.", in_words(found["missing"]))
    for warning in name_warnings("groups", counted[-1]) if doubtful else ():
        logger.warning("%s", warning)
    return found


def in_words(counts: dict[str, int]) -> str:
    """Counts by column as text: ``"label 2, sex 57"``."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def counted(rows: DataFrame, settings: dict[str, Any], reads: str) -> tuple[int, tuple[str, ...]]:
    """Check ids, labels and paths; returns the number of rows and the names of the classes.

    Logs a warning of classes whose names look alike or may stand for a missing value.

    Args:
        rows: the result of `normalised`.
        settings: those of the manifest; messages name ``source`` and ``layout``.
        reads: what the layout reads, for the message when it finds nothing.

    Raises:
        DataError: there are no rows, a row has no id or label, an id occurs twice, or none of the first files can be read.
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
    for name, a_name in (("id", "an id"), ("label", "a label")):
        if seen[name]:
            example = rows.filter(empty(name)).select("path").first()[0]
            raise DataError(
                f"Expected {a_name} for every image; got none for {seen[name]} of {total}, such as {example!r}. Remove such "
                "rows, or let the layout give them a problem, as KnownLayout does."
            )
    if seen["distinct"] < total:
        several = rows.groupBy("id").agg(F.count(F.lit(1)).alias("times"), F.min("path"), F.max("path"))
        name, times, one, other = several.filter("times > 1").orderBy("id").first()
        raise DataError(f"Expected distinct ids; got {name!r} {times} times, for {one!r} and {other!r}.")
    for warning in name_warnings("classes", seen["classes"]):
        logger.warning("%s", warning)
    _check_paths(rows)
    return total, tuple(sorted(seen["classes"]))


def _check_paths(rows: DataFrame) -> None:
    """Reject a table whose first files cannot be read: a wrong folder or extension, which all rows share.

    An executor tries, since the driver need not reach the images.
    """
    tried = rows.select("path").limit(_TRIED).rdd.mapPartitions(_unreadable).collect()
    if tried:
        raise DataError(
            f"Expected images where the layout says; got none at the first {len(tried)} paths. {tried[0][0]}: {tried[0][1]}."
            " Correct the source, or the layout's folder and extension."
        )


def _unreadable(rows: Iterable[Any]) -> list[tuple[str | None, str]]:
    """The paths with the reasons, if none can be read."""
    paths = [row["path"] for row in rows]
    found = []
    for path, (data, reason) in zip(paths, read_files(paths), strict=True):
        if data is not None:
            return []
        found.append((path, reason))
    return found
