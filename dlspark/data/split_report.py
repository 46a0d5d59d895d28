"""Counts of a split: rows, classes and groups by part, and groups in more than one part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlspark.data.columns import empty
from dlspark.data.split import PARTS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def split_report(parted: DataFrame) -> dict[str, Any]:
    """Count a table with the columns ``part``, ``label`` and, where rows belong to groups, ``group``.

    Returns:
        Plain data. ``parts`` has ``rows`` and ``by_class`` for each part and, with groups, ``groups`` and
        ``groups_by_class``. ``groups`` is None without a column ``group``; else ``of`` is the number of groups, ``torn``
        the number in more than one part, ``rows`` the number of their rows, and ``first`` up to ten of their names. Rows
        without a group are not counted.
    """
    from pyspark.sql import functions as F

    counted = parted.groupBy("part", "label").count().collect()
    parts: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        by_class = {row["label"]: row["count"] for row in counted if row["part"] == part}
        if by_class:
            parts[part] = {"rows": sum(by_class.values()), "by_class": dict(sorted(by_class.items()))}
    if "group" not in parted.columns:
        return {"parts": parts, "groups": None}
    members = parted.filter(~empty("group")).groupBy("group", "part").count()
    for row in members.groupBy("part").count().collect():
        parts[row["part"]] |= {"groups": row["count"], "groups_by_class": {}}
    by_class = parted.filter(~empty("group")).groupBy("part", "label").agg(F.count_distinct("group").alias("groups"))
    for row in by_class.orderBy("label").collect():
        parts[row["part"]]["groups_by_class"][row["label"]] = row["groups"]
    whole = members.groupBy("group").agg(F.count(F.lit(1)).alias("sides"), F.sum("count").alias("rows"))
    torn = whole.filter("sides > 1")
    of, number, rows = whole.agg(
        F.count(F.lit(1)),
        F.count_if(F.col("sides") > 1),
        F.coalesce(F.sum(F.when(F.col("sides") > 1, F.col("rows"))), F.lit(0)),
    ).collect()[0]
    first = [row["group"] for row in torn.orderBy("group").limit(10).collect()] if number else []
    return {"parts": parts, "groups": {"of": of, "torn": number, "rows": rows, "first": first}}


def leak_warning(report: dict[str, Any]) -> str | None:
    """A warning if groups are in more than one part; None otherwise."""
    groups = report["groups"]
    if not groups or not groups["torn"]:
        return None
    return (
        f"This split leaks: {groups['torn']:,} of {groups['of']:,} groups, such as {groups['first'][0]!r}, have images in "
        "more than one part, so results on test will be better than on new groups. Split by group."
    )
