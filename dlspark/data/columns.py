"""Columns of Spark DataFrames by name, and what counts as a missing value in one of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dlspark.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

BLANKS = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"  # so far the white space of str.strip; Spark's trim knows only the space
    "\ufeff\u200b\u200c\u200d\u2060"  # marks without width, which editors and spreadsheets leave in cells
)
"""Characters that are removed from both ends of a text."""

_MISSING = ("", "nan", "<na>", "nat")  # what Spark, Python and pandas write for a NaN, an NA and a NaT cast to text
_DOUBTFUL = ("none", "null", "na", "n/a", "#n/a")


def quoted(column: str) -> str:
    """The name in backticks; without them Spark reads a dot as a field of a struct."""
    return "`" + column.replace("`", "``") + "`"


def trimmed(column: str) -> Column:
    """The value as text without `BLANKS` at its ends."""
    from pyspark.sql import functions as F

    return F.btrim(F.col(quoted(column)).cast("string"), F.lit(BLANKS))


def empty(column: str) -> Column:
    """Whether the value in a row is missing: null, NaN, blank, or the text that a cast of NaN makes."""
    from pyspark.sql import functions as F

    return F.col(quoted(column)).isNull() | F.lower(trimmed(column)).isin(*_MISSING)


def is_missing(value: Any) -> bool:
    """`empty` for a Python value."""
    return value is None or str(value).strip(BLANKS).lower() in _MISSING


def try_cast(column: str, kind: str) -> Column:
    """The value as ``kind``; null where it is none, whether Spark's SQL is ANSI (the default of Spark 4) or not."""
    from pyspark.sql import functions as F

    return F.expr(f"try_cast({quoted(column)} AS {kind})")  # Column.try_cast needs Spark 4


def has_column(df: DataFrame, name: str) -> bool:
    """Whether Spark finds a column of that name; by default it ignores the case."""
    form = _form(df)
    return form(name) in map(form, df.columns)


def check_distinct(df: DataFrame, what: str, used: Iterable[str] | None = None) -> None:
    """Reject a DataFrame with two columns that Spark cannot tell apart.

    Args:
        df: the DataFrame.
        what: it, for the message.
        used: only these columns matter; None for all.

    Raises:
        ConfigError: two columns have one name, or names that differ only by case in a session that ignores it.
    """
    form = _form(df)
    matter = None if used is None else set(map(form, used))
    for names in _alike(df.columns, form):
        if matter is None or form(names[0]) in matter:
            raise ConfigError(
                f"Expected columns with distinct names in {what}; got {' and '.join(map(repr, names))}. Rename or drop one."
            )


def _form(df: DataFrame) -> Callable[[str], str]:
    return str if df.sparkSession.conf.get("spark.sql.caseSensitive", "false") == "true" else str.lower


def may_be_missing(column: str) -> Column:
    """Whether the value is a word such as "None" or "NA": a missing value to some programs, a class or place to others."""
    from pyspark.sql import functions as F

    return F.lower(trimmed(column)).isin(*_DOUBTFUL)


def name_warnings(what: str, names: Iterable[str]) -> list[str]:
    """Warnings for names that may stand for a missing value, and for names that look alike.

    Args:
        what: what is named, in the plural: ``"classes"``.
        names: distinct texts.
    """
    names = sorted(names)
    found = []
    doubtful = [name for name in names if is_missing(name) or name.strip(BLANKS).lower() in _DOUBTFUL]
    if doubtful:
        found.append(
            f"The {what} include {', '.join(map(repr, doubtful))}, whose rows are kept. If that means a missing value, "
            "leave it empty."
        )
    for alike in _alike(names, lambda name: " ".join(unicodedata.normalize("NFKC", name).casefold().split())):
        found.append(f"The {what} {' and '.join(map(repr, alike))} differ only in case, spaces or the form of a character.")
    return found


def _alike(names: Iterable[str], form: Callable[[str], str]) -> list[list[str]]:
    """The names that have one ``form``, where there are several."""
    by_form: dict[str, list[str]] = {}
    for name in names:
        by_form.setdefault(form(name), []).append(name)
    return [group for group in by_form.values() if len(group) > 1]
