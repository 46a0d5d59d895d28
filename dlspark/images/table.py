"""Clean and check a layout's table, before rows are split and images are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dlspark.data import Split, check_distinct, empty, may_be_missing, name_warnings, quoted, trimmed
from dlspark.errors import ConfigError, DataError
from dlspark.images.read import read_files
from dlspark.images.write import SOURCE_SIZE

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)

_TEXTS = ("path", "id", "label", "group", "problem", "given_part")
_OURS = (*_TEXTS, "image", "part", "fold", "passed_over", *SOURCE_SIZE)
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


def without_passed_over(rows: DataFrame) -> tuple[DataFrame, dict[str, int]]:
    """The rows of images, and the number of other files by reason, most frequent first."""
    if "passed_over" not in rows.columns:
        return rows, {}
    counts = rows.filter("passed_over IS NOT NULL").groupBy("passed_over").count().collect()
    by_reason = {row[0]: row[1] for row in sorted(counts, key=lambda row: (-row[1], row[0]))}
    return rows.filter("passed_over IS NULL").drop("passed_over"), by_reason


def reasons_in_words(passed_over: Mapping[str, int]) -> str:
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
    """Check ids, labels and paths; returns the number of rows and the names of the classes.

    Logs a warning of classes whose names look alike or may stand for a missing value.

    Args:
        rows: the result of `normalised`.
        settings: those of the manifest; messages name ``source`` and ``layout``.
        reads: what the layout reads, for the message when it finds nothing.
        passed_over: what it passed over, for that message.

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
        F.countDistinct("path").alias("files"),
        F.collect_set("label").alias("classes"),
    ).collect()[0]
    total = int(seen["rows"])
    if total == 0:
        raise DataError(
            f"Expected images in {settings['source']!r}; got none with the layout {settings['layout']!r}. It reads: {reads}"
            + (f" Passed over: {passed_over}." if passed_over else "")
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
    if seen["files"] < total:  # allowed, as a table may name a picture once for each finding
        several = rows.groupBy("path").agg(F.count(F.lit(1)).alias("times"))
        path, times = several.filter("times > 1").orderBy("path").first()
        logger.warning(
            "%s images are in the table more than once, so they may be in several classes and parts: %r, %d times.",
            f"{total - seen['files']:,}",
            path,
            times,
        )
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
