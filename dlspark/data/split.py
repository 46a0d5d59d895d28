"""Which rows train, which validate, which test: decided before anything else touches them.

The draw hangs on the seed and a row's id alone: not on the order of the rows, their partitions or the cluster. Adding
a column or a worker changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlspark.data.from_spark import quoted
from dlspark.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """How to share rows out among train, validation and test.

    Attributes:
        test: fraction of the rows to test on, from 0 to below 1.
        validation: fraction to validate on; ``test + validation`` is below 1. The rest trains.
        stratify: keep the ratio of the labels in each part: each label is shared out on its own, to the nearest row.
        group: name of a column (patient, lesion) whose values must not be on both sides: groups go whole to one part.
            Fractions then hold to the nearest group. Stratified, a group counts for its most frequent label.
        seed: of the draw.
        column: name of a column that already says "train", "validation" or "test". Nothing is drawn then, and the
            fractions, ``stratify`` and ``seed`` are without effect; that no ``group`` is on two sides is still checked.

    Raises:
        ConfigError: fractions out of range.
    """

    test: float = 0.2
    validation: float = 0.0
    stratify: bool = True
    group: str | None = None
    seed: int = 0
    column: str | None = None

    def __post_init__(self) -> None:
        fractions = (self.test, self.validation)
        numbers = all(isinstance(fraction, (int, float)) for fraction in fractions)
        if not numbers or min(fractions) < 0 or sum(fractions) >= 1:
            raise ConfigError(
                "Expected test and validation from 0 to below 1, and less than 1 together: "
                f"received test={self.test!r}, validation={self.validation!r}."
            )


def assign(df: DataFrame, split: Split, *, id_column: str = "id", label_column: str = "label") -> DataFrame:
    """Give every row its part.

    Rows are ordered by SHA-256 of ``"<seed>:<id>"``; of n rows the first round(n * test) test, the next
    round(n * validation) validate, halves rounded up. Groups are ordered the same way, by the hash of their name, and
    a group belongs to where its middle row falls.

    Args:
        df: one row per example; ids are unique.
        split: how.
        id_column: its unique id, of a type that casts to string.
        label_column: what is stratified by.

    Returns:
        ``df`` with the column ``part``, new or in the place of one: "train", "validation" or "test".

    Raises:
        ConfigError: a column that is not there.
        DataError: a row without a group, a group on two sides of a given column, or another word in it.
    """
    from pyspark.sql import functions as F

    needed = [split.group, split.column or (label_column if split.stratify else None), id_column]
    for name in needed:
        if name is not None and name not in df.columns:
            raise ConfigError(f"Expected a column to split by: there is no {name!r}. {did_you_mean(name, df.columns)}")
    if split.group is not None:
        missing = df.filter(_empty(split.group)).select(quoted(id_column)).first()
        if missing is not None:
            raise DataError(f"Expected a {split.group} in every row, to split by: row {missing[0]!r} has none.")
    if split.column is not None:
        return _given(df, split, split.column)
    df = df.drop("part")  # a column of that name that nobody asked to obey
    stratum = F.col(quoted(label_column)) if split.stratify else F.lit(0)
    if split.group is not None:
        return _by_group(df, split, split.group, stratum)
    return _by_row(df, split, stratum, id_column)


def _by_row(df: DataFrame, split: Split, stratum: Column, id_column: str) -> DataFrame:
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    helper = df.withColumn("__stratum", stratum)
    drawn = Window.partitionBy("__stratum").orderBy(_draw(split.seed, id_column), F.col(quoted(id_column)))
    total = F.count(F.lit(1)).over(Window.partitionBy("__stratum"))
    test, validation = _nearest(total * split.test), _nearest(total * split.validation)
    position = F.row_number().over(drawn)
    part = F.when(position <= test, "test").when(position <= test + validation, "validation").otherwise("train")
    return helper.withColumn("part", part).drop("__stratum")


def _by_group(df: DataFrame, split: Split, group: str, stratum: Column) -> DataFrame:
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    counted = df.groupBy(F.col(quoted(group)).alias("__group"), stratum.alias("__stratum")).count()
    commonest = Window.partitionBy("__group").orderBy(F.col("count").desc(), F.col("__stratum"))
    groups = (
        counted.withColumn("__rank", F.row_number().over(commonest))
        .withColumn("__rows", F.sum("count").over(Window.partitionBy("__group")))
        .filter(F.col("__rank") == 1)
        .select("__group", "__stratum", "__rows")
    )
    drawn = (
        Window.partitionBy("__stratum")
        .orderBy(_draw(split.seed, "__group"), F.col("__group"))
        .rowsBetween(Window.unboundedPreceding, Window.currentRow)
    )
    total = F.sum("__rows").over(Window.partitionBy("__stratum"))
    middle = F.sum("__rows").over(drawn) - F.col("__rows") / 2
    part = (
        F.when(middle <= total * split.test, "test")
        .when(middle <= total * (split.test + split.validation), "validation")
        .otherwise("train")
    )
    parts = groups.select("__group", part.alias("part"))
    return df.join(parts, df[quoted(group)] == parts["__group"], "left").drop("__group")


def _given(df: DataFrame, split: Split, column: str) -> DataFrame:
    from pyspark.sql import functions as F

    said = F.col(quoted(column))
    wrong = df.filter(said.isNull() | ~said.isin(*PARTS)).select(said).first()
    if wrong is not None:
        raise DataError(f"Expected one of {', '.join(PARTS)} in every row of column {column!r}: received {wrong[0]!r}.")
    if split.group is not None:
        sides = df.groupBy(F.col(quoted(split.group)).alias("group")).agg(F.countDistinct(said).alias("sides"))
        torn = sides.filter("sides > 1").orderBy("group").first()
        if torn is not None:
            raise DataError(f"Expected every {split.group} in one part: {torn[0]!r} is in {torn[1]}, so {column!r} leaks.")
    return df.withColumn("part", said)


def _draw(seed: int, column: str) -> Column:
    from pyspark.sql import functions as F

    return F.sha2(F.concat(F.lit(f"{seed}:"), F.col(quoted(column)).cast("string")), 256)


def _nearest(rows: Column) -> Column:
    """Rounded to whole rows, halves up; the inner rounding takes away what binary fractions add (0.35 x 10 = 3.5)."""
    from pyspark.sql import functions as F

    return F.floor(F.round(rows, 6) + 0.5)


def _empty(column: str) -> Any:
    from pyspark.sql import functions as F

    value = F.col(quoted(column))
    return value.isNull() | (F.trim(value.cast("string")) == "")
