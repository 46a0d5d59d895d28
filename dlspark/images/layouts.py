"""Layouts: how a collection stores its images, labels and groups.

A layout is a function ``(source, spark) -> DataFrame`` with one row per image and the columns

- ``path``: a local path or URI of the image file,
- ``id``: unique,
- ``label``: the name of the class,
- ``group``, optional: a patient or lesion whose images must stay in one part of a split,
- ``problem``, optional: why the image cannot be used, or null. A row with a problem is rejected, and its other columns may
  be null,
- ``passed_over``, optional: why the file is not an image of the collection, or null. Such a row is only counted,
- ``given_part``, optional: "train", "validation" or "test", the collection's own split, which the default split keeps,

and any further columns of text, numbers or booleans, which are kept beside the images.

Layouts are found by name through the entry-point group ``dlspark.layouts``. An entry point names such a function, or a
frozen dataclass whose instances are such functions: its fields are the options of the layout. The first line of the
docstring says what the layout reads.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from dlspark._require import LAYOUTS, known
from dlspark.data import empty, quoted, trimmed
from dlspark.errors import ConfigError, DataError, did_you_mean
from dlspark.images.csv_table import check_form, read_csv
from dlspark.images.files import EMPTY, EXTENSIONS, images, subfolders
from dlspark.images.write import SOURCE_SIZE
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger(__name__)

Layout: TypeAlias = "Callable[[str, SparkSession], DataFrame]"

RESERVED = ("path", "id", "label", "group", "image", "problem", "passed_over", "given_part", "fold", *SOURCE_SIZE)
"""Columns with a fixed meaning; a CSV column of such a name, in any case, is kept as ``csv_<name>``."""


def find_layout(layout: str | Layout, options: Mapping[str, Any] | None = None) -> Layout:
    """The layout of that name, with ``options``; a layout is returned as it is.

    Raises:
        ConfigError: an unknown name or option, a missing option, or an entry point that is no layout.
    """
    if callable(layout):
        return layout
    found, options = LAYOUTS.find(layout), options or {}
    if not callable(found):
        raise ConfigError(f"Expected the entry point of layout {layout!r} to be a function or a dataclass; got {found!r}.")
    made = isinstance(found, type)  # a dataclass; anything else is the layout itself
    required = {field.name: field.default is field.default_factory is MISSING for field in fields(found)} if made else {}
    if options and not required:
        raise ConfigError(f"Layout {layout!r} has no options; got {', '.join(options)}. Leave them out.")
    for option in options:
        if option not in required:
            raise ConfigError(f"Layout {layout!r} has no option {option!r}. {did_you_mean(option, required)}")
    missing = [name for name, needed in required.items() if needed and name not in options]
    if missing:
        raise ConfigError(f"Expected a value for the option {missing[0]!r} of layout {layout!r}; got none. Give one.")
    return found(**options) if made else found


def describe(layout: str | Layout) -> str:
    """A layout as text: equal for equal layouts and options, in any process."""
    if isinstance(layout, str):
        return layout
    kind = type(layout) if is_dataclass(layout) else layout
    module, name = getattr(kind, "__module__", ""), getattr(kind, "__qualname__", type(kind).__qualname__)
    plain = not is_dataclass(layout) or all(getattr(layout, field.name) == field.default for field in fields(layout))
    registered = LAYOUTS.points(value=f"{module}:{name}") if plain else {}
    if registered:
        return next(iter(registered))
    return repr(layout) if is_dataclass(layout) else f"{module}.{name}"


def reads(layout: Layout) -> str:
    """What a layout reads: the first line of its docstring, empty if it has none."""
    return (inspect.getdoc(layout) or "").partition("\n")[0]


def folders(source: str, spark: SparkSession) -> DataFrame:
    """Class folders with image files at any depth: ``<source>/<class>/…/<image>``, or below ``train/``, ``test/``, ….

    The id is the path within ``source``. If all folders are named like parts (``train``, ``val``, ``test_set``, …), the
    classes are one folder below, and the parts are kept in ``given_part``; a part alone is only a folder in between.

    Raises:
        DataError: ``source`` holds no folders, or folders of parts beside others or in each other.
    """
    uri = Store(source).uri
    names, beside = subfolders(uri)
    parts = _parts(uri, names)
    todo: list[tuple[str, str | None]] = []  # a class folder's path within the source, and its part
    for folder in parts or [""]:
        below, others = subfolders(f"{uri}/{folder}") if folder else (names, [])
        nested = [name for name in below if folder and _PART.fullmatch(name)]
        if nested:
            raise DataError(
                f"Expected folders of classes in {uri}/{folder}; got {nested[0]!r}, named like a part. Move its content "
                "up, or rename it if it is a class."
            )
        todo += [(f"{folder}/{name}".lstrip("/"), parts.get(folder)) for name in below]
        beside += others
    if not todo:
        raise DataError(f"Expected folders named after the classes in {uri!r}; got none.")
    listed = spark.sparkContext.parallelize(todo, min(len(todo), _MOST_TASKS)).flatMap(partial(_list_class, uri=uri))
    aside = [(each.path, each.name, None, None, each.passed_over) for each in beside]
    if aside:
        listed = listed.union(spark.sparkContext.parallelize(aside, 1))
    rows = spark.createDataFrame(listed, "path string, id string, label string, given_part string, passed_over string")
    # One part with classes is no split: the others may be missing, or without labels.
    return rows if len({part for _, part in todo}) > 1 else rows.drop("given_part")


_MOST_TASKS = 256
_PART = re.compile(r"(train|val|test)(ing|id|idation)?([ _-]?(set|data|images))?", re.IGNORECASE)


def _parts(uri: str, names: Sequence[str]) -> dict[str, str]:
    """The part of each folder, if the folders are parts and not classes."""
    matches = {name: _PART.fullmatch(name) for name in names}
    parts = {name: "validation" if (word := match[1].lower()) == "val" else word for name, match in matches.items() if match}
    if not parts:
        return {}
    others = [name for name in names if name not in parts]
    if others or (len(parts) > 1 and "train" not in parts.values()):
        remedy = f"Move {others[0]!r} away" if others else "Add the part train"
        raise DataError(
            f"Expected folders of classes, or of parts such as train and test, in {uri!r}; got {names}. {remedy}, or "
            f"rename {next(iter(parts))!r} if it is a class."
        )
    return parts


@dataclass(frozen=True, kw_only=True)
class CsvLayout:
    """A CSV file with a header and one line per image, and the images that it names.

    All cells are text. Columns without a meaning of their own keep their names.

    Attributes:
        csv: the file: a path relative to the source, or any path or URI. It may be compressed.
        image_column: the column with the name of the image, which is also its id: a path relative to ``folder``, or any path
            or URI.
        label_column: the column with the class.
        group_column: the column with the patient or lesion; None if there is none. A split can use any other column.
        extension: appended to names of images that do not end with the extension of an image.
        folder: the folder of the images: a path relative to the source, or any path or URI.
        delimiter: between cells; ``"tab"`` is a tab. None takes the one of comma, semicolon, tab and bar that fits.
        encoding: of the text, such as ``"latin-1"``. None takes UTF-8, or UTF-16 or UTF-32 if the file begins with its mark.

    Raises:
        ConfigError: the delimiter is not one character, or Python does not know the encoding.
    """

    csv: str = "metadata.csv"
    image_column: str = "image_id"
    label_column: str = "label"
    group_column: str | None = None
    extension: str = ".jpg"
    folder: str = "."
    delimiter: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        check_form(self.delimiter, self.encoding)

    def __call__(self, source: str, spark: SparkSession) -> DataFrame:
        """One row per line of the file.

        Raises:
            ConfigError: a column is missing.
            DataError: there is no such file, or it is not a table.
        """
        table = read_csv(_place(source, self.csv), spark, delimiter=self.delimiter, encoding=self.encoding)
        for column in (self.image_column, self.label_column, self.group_column):
            if column is not None:
                known(f"a column of {self.csv!r}", column, table.columns)
        columns = [
            _path(self.image_column, _place(source, self.folder), self.extension).alias("path"),
            _column(self.image_column).alias("id"),
            _column(self.label_column).alias("label"),
        ]
        used = {self.image_column, self.label_column}
        if self.group_column is not None:
            columns.append(_column(self.group_column).alias("group"))
            used |= {self.group_column} if self.group_column.lower() in RESERVED else set()
        for name in table.columns:
            # "part" in small letters is for Split.column.
            ours = name.lower() in RESERVED or (name.lower() == "part" and name != "part")
            if name not in used:
                columns.append(_column(name).alias(f"csv_{name}" if ours else name))
        return table.select(columns)


csv_layout = CsvLayout
"""`CsvLayout` by its older name."""


@dataclass(frozen=True, kw_only=True)
class KnownLayout:
    """Another layout, without the rows where a column is empty, NaN or "unknown"; those are rejected.

    Attributes:
        layout: the other layout, or its name.
        columns: the columns that must be known.
    """

    layout: str | Layout
    columns: tuple[str, ...]

    def __call__(self, source: str, spark: SparkSession) -> DataFrame:
        """The rows of the other layout, with the column ``problem``."""
        from pyspark.sql import functions as F

        rows = find_layout(self.layout)(source, spark)
        for column in self.columns:
            known("a column of the layout", column, rows.columns)
        problems = [F.col("problem")] if "problem" in rows.columns else []
        for column in self.columns:
            unknown = empty(column) | (F.lower(trimmed(column)) == "unknown")
            problems.append(F.when(unknown, f"its {column} is not known"))
        return rows.withColumn("problem", F.coalesce(*problems))


def _list_class(task: tuple[str, str | None], *, uri: str) -> Iterator[tuple[str | None, ...]]:
    folder, part = task
    label, empty = folder.rpartition("/")[2], True
    for found in images(f"{uri}/{folder}"):
        empty = empty and found.passed_over is not None
        yield found.path, f"{folder}/{found.name}", label, part, found.passed_over
    if empty:
        yield f"{uri}/{folder}", folder, label, part, EMPTY


def _place(source: str, name: str) -> str:
    """The path or URI ``name``, which may be relative to the source."""
    root = Store(source)
    if "://" in name or name.startswith(("/", "~", "file:")):
        return Store(name).uri
    if root.is_local:
        return os.path.abspath(os.path.join(root.uri, name))
    return root.child(*PurePosixPath(name).parts).uri


def _path(column: str, folder: str, extension: str) -> Any:
    """The path of each image: names, relative paths, or whole paths and URIs."""
    from pyspark.sql import functions as F

    name = trimmed(column)
    whole = name.startswith("/") | name.contains("://") | name.startswith("file:")
    complete = F.lower(name).rlike(f"({'|'.join(map(re.escape, EXTENSIONS))})$")
    file = F.when(complete, name).otherwise(F.concat(name, F.lit(extension)))
    return F.when(whole, file).otherwise(F.concat(F.lit(f"{folder}/"), F.regexp_replace(file, r"^(\./)+", "")))


def _column(name: str) -> Any:
    from pyspark.sql import functions as F

    return F.col(quoted(name))
