"""The split of rows into train, validation and test, before any other step.

The split depends only on the seed and the ids of the rows: not on their order, their partitions, their columns or the
cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING, Any

from dlspark._require import known
from dlspark.data.columns import empty, quoted
from dlspark.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """How to split rows into train, validation and test.

    Attributes:
        test: the size of the part ``test``: a fraction of the rows, from 0 to below 1, or a whole number of rows.
        validation: the size of the part ``validation``, as for ``test``. The rest is ``train``.
        stratify: keep the ratio of the labels in each part. With fractions, each label is split separately, to the nearest
            row. With numbers of rows, the numbers are exact, and each label has its share to within a row.
        group: name of a column (patient, lesion). All rows of a group are in one part, and sizes hold to the nearest group.
            Stratified, a group has its most frequent label.
        seed: determines the random order.
        column: name of a column with "train", "validation" or "test" in each row. It replaces the random split, so the
            sizes, ``stratify`` and ``seed`` have no effect. A ``group`` in two parts is still an error.
        fold: (i, k): test on fold i of k, from 0; ``test`` must be 1 / k. `kfold` returns all k splits.
        undersample: then drop training rows until every label has as many as the rarest one.

    Raises:
        ConfigError: invalid sizes or an invalid fold.
    """

    test: float = 0.2
    validation: float = 0.0
    stratify: bool = True
    group: str | None = None
    seed: int = 0
    column: str | None = None
    fold: tuple[int, int] | None = None
    undersample: bool = False

    def __post_init__(self) -> None:
        sizes = (self.test, self.validation)
        numbers = all(isinstance(size, int | float) and not isinstance(size, bool) for size in sizes)
        fractions = [size for size in sizes if isinstance(size, float)]
        if not numbers or min(sizes) < 0 or any(size >= 1 for size in fractions) or sum(fractions) >= 1:
            raise ConfigError(
                "Expected test and validation as fractions from 0 to below 1, less than 1 together, or as whole numbers of "
                f"rows; got test={self.test!r}, validation={self.validation!r}."
            )
        if self.fold is not None:
            number, count = self.fold
            if not 0 <= number < count or count < 2 or abs(self.test - 1 / count) > 1e-9 or self.column is not None:
                raise ConfigError(
                    "Expected fold=(i, k) with i from 0 to k - 1, at least two folds, test=1/k and no column; got "
                    f"fold={self.fold!r}, test={self.test!r}, column={self.column!r}. Use Split.kfold(k)."
                )

    @classmethod
    def kfold(cls, k: int, **settings: Any) -> list[Split]:
        """The k splits of a cross-validation: every row, or group, is in ``test`` in exactly one of them.

        Args:
            k: the number of folds, at least 2. Each ``test`` has a k-th of the rows, to within a row, or the nearest group.
            settings: the other attributes of each split.
        """
        return [cls(test=1 / k, fold=(i, k), **settings) for i in range(k)]


def assign(df: DataFrame, split: Split) -> DataFrame:
    """Assign each row to a part; `undersampled` does the rest.

    Rows are ordered by SHA-256 of ``"<seed>:<id>"``. Of n rows the first round(n * test) are ``test``, the next
    round(n * validation) are ``validation``; halves are rounded up. Folds take rows in turn, in that order. Groups are
    ordered by the hash of their name; the position of its middle row decides the part of a group.

    Args:
        df: one row per example. The column ``id`` has unique values of a type that casts to string; ``label`` is the column
            to stratify by.
        split: the split.

    Returns:
        ``df`` with the column ``part``, added or replaced: "train", "validation" or "test".

    Raises:
        ConfigError: a column is missing.
        DataError: a row has no group, ``Split.column`` has a group in two parts or another value, or there are fewer rows
            than requested.
    """
    from pyspark.sql import functions as F

    needed = [split.group, split.column or ("label" if split.stratify else None), "id"]
    for name in needed:
        if name is not None:
            known("a column to split by", name, df.columns)
    if split.group is not None:
        missing = df.filter(empty(split.group)).select("id").first()
        if missing is not None:
            raise DataError(
                f"Expected a {split.group} in every row, to split by; got none in row {missing[0]!r}. Remove such rows, or "
                "reject them with KnownLayout."
            )
    if split.column is not None:
        return _given(df, split, split.column)
    df = df.drop("part")  # Split.column was not set, so a column of that name has no meaning
    stratum = F.col("label") if split.stratify else F.lit(0)
    if split.group is not None:
        return _by_group(df, split, split.group, stratum)
    return _by_row(df, split, stratum)


def undersampled(parted: DataFrame, *, seed: int) -> DataFrame:
    """Drop training rows until every label has as many as the rarest one in training; other parts are unchanged.

    The choice depends only on the seed and the ids. The columns are ``part``, ``label`` and ``id``.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    training = F.col("part") == "train"
    counts = parted.filter(training).groupBy("label").count()
    fewest = counts.agg(F.min("count")).collect()[0][0]
    drawn = Window.partitionBy("part", "label").orderBy(_draw(seed, "id"), F.col("id"))
    return (
        parted.withColumn("__place", F.row_number().over(drawn))
        .filter(~training | (F.col("__place") <= fewest))
        .drop("__place")
    )


def _by_row(df: DataFrame, split: Split, stratum: Column) -> DataFrame:
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    helper = df.withColumn("__stratum", stratum)
    counts = {row[0]: row[1] for row in helper.groupBy("__stratum").count().collect()}
    drawn = [_draw(split.seed, "id"), F.col("id")]
    place = F.row_number().over(Window.partitionBy("__stratum").orderBy(*drawn)) - 1
    if split.fold is not None:
        number, folds = split.fold
        before = _rows_before(counts)
        tests = (place + _of_stratum(before)) % folds == number
        dealt = {
            name: (-(-(at - number) // folds), -(-(at + counts[name] - number) // folds)) for name, at in before.items()
        }
        tested = {name: last - first for name, (first, last) in dealt.items()}
    else:
        tested = _shares(counts, split.test, of=counts)
        tests = place < _of_stratum(tested)
    left = {name: count - tested[name] for name, count in counts.items()}
    validated = _shares(left, split.validation, of=counts)
    rest = F.row_number().over(Window.partitionBy("__stratum", "__tests").orderBy(*drawn)) - 1
    part = F.when(F.col("__tests"), "test").when(rest < _of_stratum(validated), "validation").otherwise("train")
    return helper.withColumn("__tests", tests).withColumn("part", part).drop("__stratum", "__tests")


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
    rows = df.count()
    test, validation = (_fraction(size, rows) for size in (split.test, split.validation))

    def middle(*within: str) -> Column:
        """The position of a group's middle row among the rows of its stratum, in random order."""
        drawn = Window.partitionBy(*within).orderBy(_draw(split.seed, "__group"), F.col("__group"))
        before = drawn.rowsBetween(Window.unboundedPreceding, Window.currentRow)
        return F.sum("__rows").over(before) - F.col("__rows") / 2

    total = F.sum("__rows").over(Window.partitionBy("__stratum"))
    if split.fold is not None:
        number, folds = split.fold
        tests = F.floor(middle("__stratum") * folds / total) == number
    else:
        tests = middle("__stratum") <= total * test
    part = (
        F.when(F.col("__tests"), "test")
        .when(middle("__stratum", "__tests") <= total * validation, "validation")
        .otherwise("train")
    )
    parts = groups.withColumn("__tests", tests).select("__group", part.alias("part"))
    return df.join(parts, df[quoted(group)] == parts["__group"], "left").drop("__group")


def _fraction(size: float, rows: int) -> float:
    """A size as a fraction of ``rows``."""
    if isinstance(size, float):
        return size
    _check_enough(size, rows)
    return size / max(rows, 1)


def _check_enough(size: float, rows: int) -> None:
    if size > rows:
        raise DataError(f"Expected at least {size} rows, for one part; got {rows} in all. Ask for fewer, or for a fraction.")


def _shares(available: dict[Any, int], size: float, *, of: dict[Any, int]) -> dict[Any, int]:
    """The number of ``available`` rows of each stratum in a part whose ``size`` refers to all rows, ``of``."""
    if isinstance(size, float):
        # The inner rounding removes the error of binary fractions: 0.35 x 10 is 3.5, which rounds to 4.
        return {name: min(available[name], floor(round(count * size, 6) + 0.5)) for name, count in of.items()}
    rows = sum(available.values())
    _check_enough(size, rows)
    # Rounding the running total, not each share, keeps the sum exact and every share within a row.
    shares, seen, given = {}, 0, 0
    for name in sorted(available, key=str):
        seen += available[name]
        shares[name] = (2 * size * seen + rows) // (2 * rows) - given if rows else 0
        given += shares[name]
    return shares


def _rows_before(counts: dict[Any, int]) -> dict[Any, int]:
    """The rows before each stratum, so that folds take turns across strata."""
    before, total = {}, 0
    for name in sorted(counts, key=str):
        before[name] = total
        total += counts[name]
    return before


def _of_stratum(values: dict[Any, int]) -> Column:
    """The value for the stratum of a row."""
    from pyspark.sql import functions as F

    return F.create_map(*(F.lit(item) for pair in values.items() for item in pair))[F.col("__stratum")]


def _given(df: DataFrame, split: Split, column: str) -> DataFrame:
    from pyspark.sql import functions as F

    said = F.col(quoted(column))
    wrong = df.filter(said.isNull() | ~said.isin(*PARTS)).select(said).first()
    if wrong is not None:
        raise DataError(f"Expected one of {', '.join(PARTS)} in every row of column {column!r}; got {wrong[0]!r}.")
    if split.group is not None:
        sides = df.groupBy(F.col(quoted(split.group)).alias("group")).agg(F.countDistinct(said).alias("sides"))
        torn = sides.filter("sides > 1").orderBy("group").first()
        if torn is not None:
            raise DataError(f"Expected every {split.group} in one part of {column!r}; got {torn[0]!r} in {torn[1]} parts.")
    return df.withColumn("part", said)


def _draw(seed: int, column: str) -> Column:
    from pyspark.sql import functions as F

    return F.sha2(F.concat(F.lit(f"{seed}:"), F.col(quoted(column)).cast("string")), 256)
