"""Layouts: where a collection keeps its images and what it says about them.

A layout is a function ``(source, spark) -> DataFrame`` with one row per image and the columns

- ``path``: a local path or URI of the image file,
- ``id``: unique,
- ``label``: the class' name,
- ``group``, optional: what must not be on both sides of a split (a patient, a lesion),

- ``problem``, optional: why this image cannot be used, null where it can; it is then put aside like one that cannot be
  read, and its other columns may be null,

and any further columns of texts, numbers or booleans, which are kept beside the images.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

import fsspec

from dlspark.data import quoted
from dlspark.errors import ConfigError, DataError, did_you_mean
from dlspark.images.decode import EXTENSIONS
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

Layout: TypeAlias = "Callable[[str, SparkSession], DataFrame]"

RESERVED = ("path", "id", "label", "group", "image", "problem", "fold")
"""Columns with a meaning of their own; a CSV column of such a name is kept as ``csv_<name>``."""


def folders(source: str, spark: SparkSession) -> DataFrame:
    """Class folders: ``<source>/<class>/…/<image>``, at any depth. The id is the path within ``source``.

    Files whose names do not end like an image's, and hidden ones, are passed over.

    Raises:
        DataError: there are no folders in ``source``.
    """
    store = Store(source)
    filesystem, root = fsspec.core.url_to_fs(store.uri)
    try:
        entries = filesystem.ls(root, detail=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"Expected a folder at {store.uri!r}: there is none.") from error
    names = sorted(PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "directory")
    classes = [name for name in names if not name.startswith(".")]
    if not classes:
        raise DataError(f"Expected folders named after the classes in {store.uri!r}: there are none.")
    listed = spark.sparkContext.parallelize(classes, len(classes)).flatMap(partial(_list_class, uri=store.uri))
    return spark.createDataFrame(listed, "path string, id string, label string")


@dataclass(frozen=True, kw_only=True)
class CsvLayout:
    """A folder of images and a CSV file about them; see `csv_layout`."""

    csv: str = "metadata.csv"
    image_column: str = "image_id"
    label_column: str = "label"
    group_column: str | None = None
    extension: str = ".jpg"
    folder: str = "."

    def __call__(self, source: str, spark: SparkSession) -> DataFrame:
        """One row per line of the file. All cells are text; columns keep their names."""
        from pyspark.sql import functions as F

        root = Store(source)
        table = read_csv(root.child(*PurePosixPath(self.csv).parts).uri, spark)
        for column in (self.image_column, self.label_column, self.group_column):
            if column is not None and column not in table.columns:
                raise ConfigError(f"Expected a column {column!r} in {self.csv!r}. {did_you_mean(column, table.columns)}")
        folder = root.child(*PurePosixPath(self.folder).parts).uri
        path = F.concat(F.lit(f"{folder}/"), F.trim(_column(self.image_column)), F.lit(self.extension))
        columns = [
            path.alias("path"),
            _column(self.image_column).alias("id"),
            _column(self.label_column).alias("label"),
        ]
        if self.group_column is not None:
            columns.append(_column(self.group_column).alias("group"))
        told = {self.image_column, self.label_column} | ({self.group_column} & set(RESERVED))
        kept = [name for name in table.columns if name not in told]
        columns += [_column(name).alias(f"csv_{name}" if name in RESERVED else name) for name in kept]
        return table.select(columns)


def csv_layout(
    *,
    csv: str = "metadata.csv",
    image_column: str = "image_id",
    label_column: str = "label",
    group_column: str | None = None,
    extension: str = ".jpg",
    folder: str = ".",
) -> CsvLayout:
    """A layout: images named in a CSV file with a header line.

    Args:
        csv: the file, relative to the source.
        image_column: the column that names the image, and is its id.
        label_column: the column with its class.
        group_column: the column with its patient, lesion or the like; None when there is none. A split can be by any
            other column, too.
        extension: what follows the image's name to make the file's; empty where the column has the whole name.
        folder: where the images are, relative to the source.
    """
    return CsvLayout(
        csv=csv,
        image_column=image_column,
        label_column=label_column,
        group_column=group_column,
        extension=extension,
        folder=folder,
    )


@dataclass(frozen=True, kw_only=True)
class KnownLayout:
    """Another layout, whose rows are put aside where a column is empty, NaN or says "unknown"; the reason is listed.

    Attributes:
        layout: the other one, or its name.
        columns: columns of it that must be known.
    """

    layout: str | Layout
    columns: tuple[str, ...]

    def __call__(self, source: str, spark: SparkSession) -> DataFrame:
        """The other layout's rows, with the column ``problem``."""
        from pyspark.sql import functions as F

        rows = find_layout(self.layout)(source, spark)
        for column in self.columns:
            if column not in rows.columns:
                raise ConfigError(
                    f"Expected a column that must be known: there is no {column!r}. {did_you_mean(column, rows.columns)}"
                )
        problems = [F.col("problem")] if "problem" in rows.columns else []
        for column in self.columns:
            text = F.lower(F.trim(_column(column).cast("string")))
            problems.append(F.when(text.isNull() | text.isin("", "nan", "unknown"), f"its {column} is not known"))
        return rows.withColumn("problem", F.coalesce(*problems))


def ham10000(source: str, spark: SparkSession) -> DataFrame:
    """HAM10000 as it is downloaded: ``HAM10000_metadata`` and the images, in one folder or several, at any depth.

    Label is ``dx``, group ``lesion_id``; ``lesion_id``, ``dx_type``, ``age`` (years, NaN where unknown), ``sex`` and
    ``localization`` are kept. An image that the table names and nobody finds is listed as rejected, not passed over.

    Raises:
        DataError: no table.
    """
    from pyspark.sql import functions as F

    store = Store(source)
    files = list(walk(store.uri))
    tables = [path for path in files if "ham10000_metadata" in PurePosixPath(path).name.lower()]
    if not tables:
        raise DataError(f"Expected a file HAM10000_metadata.csv in {store.uri!r}: there is none.")
    # Where an image is there twice, the first by name is taken.
    images = {PurePosixPath(path).stem: path for path in sorted(files, reverse=True) if is_image(path)}
    paths = spark.createDataFrame(list(images.items()), "image_id string, path string")
    missing = F.concat(F.lit(f"{store.uri}/"), F.col("image_id"), F.lit(".jpg"))
    return (
        read_csv(sorted(tables)[0], spark)
        .join(paths, "image_id", "left")
        .select(
            F.coalesce("path", missing).alias("path"),
            F.col("image_id").alias("id"),
            F.col("dx").alias("label"),
            F.col("lesion_id").alias("group"),
            "lesion_id",
            "dx_type",
            F.col("age").cast("double").alias("age"),
            "sex",
            "localization",
        )
    )


def cnmc(source: str, spark: SparkSession) -> DataFrame:
    """C-NMC 2019, labelled cells: images at any depth named ``UID_<subject>_<image>_<cell>_<all or hem>``.

    Label is ``all`` (malignant) or ``hem`` (healthy), group the subject, as written: ``11``, or ``H12`` of a healthy one.
    ``subject``, ``image_number`` and ``cell`` are kept. The id is the path within ``source``. An image whose name says
    something else, or calls a healthy subject ill or the reverse, is put aside: nothing is guessed.
    """
    from pyspark.sql import functions as F

    root = Store(source).uri
    found = spark.createDataFrame([(path,) for path in sorted(walk(root)) if is_image(path)], "path string")
    name = F.element_at(F.split("path", "/"), -1)

    def told(number: int) -> Any:
        return F.regexp_extract(name, _CNMC_NAME, number)

    parsed = name.rlike(_CNMC_NAME)
    healthy = told(1).startswith("H") == (told(4) == "hem")
    return found.select(
        "path",
        F.substring(F.col("path"), len(root) + 2, 2**31 - 1).alias("id"),
        told(4).alias("label"),
        told(1).alias("group"),
        told(1).alias("subject"),
        told(2).cast("int").alias("image_number"),
        told(3).cast("int").alias("cell"),
        F.when(~parsed, "its name is not UID_<subject>_<image>_<cell>_<all or hem>")
        .when(~healthy, "its name gives a diagnosis that contradicts its subject")
        .alias("problem"),
    )


_CNMC_NAME = r"^UID_(H?\d+)_(\d+)_(\d+)_(all|hem)\.[A-Za-z]+$"

LAYOUTS: dict[str, Layout] = {"folders": folders, "csv": csv_layout(), "ham10000": ham10000, "cnmc": cnmc}
"""Layouts by name."""


def find_layout(layout: str | Layout) -> Layout:
    """The layout of that name; a layout is its own.

    Raises:
        ConfigError: an unknown name.
    """
    if callable(layout):
        return layout
    if layout not in LAYOUTS:
        raise ConfigError(f"Unknown layout {layout!r}. {did_you_mean(str(layout), LAYOUTS)} Or give a function.")
    return LAYOUTS[layout]


def describe(layout: str | Layout) -> str:
    """A layout as text: the same for the same layout and settings, in any process."""
    known = [name for name, value in LAYOUTS.items() if value == layout]
    if isinstance(layout, str) or known:
        return str(layout) if isinstance(layout, str) else known[0]
    if is_dataclass(layout):
        return repr(layout)
    return f"{getattr(layout, '__module__', '')}.{getattr(layout, '__qualname__', type(layout).__qualname__)}"


def walk(uri: str) -> Iterator[str]:
    """All files at any depth in a folder, as paths or URIs, hidden ones left out, in no order to rely on."""
    if Store(uri).is_local:
        for folder, children, names in os.walk(uri):
            children[:] = [name for name in children if not name.startswith(".")]
            yield from (f"{folder}/{name}" for name in names if not name.startswith("."))
        return
    filesystem, root = fsspec.core.url_to_fs(uri)
    for path in filesystem.find(root):
        name = path[len(root) :].lstrip("/")
        if not any(part.startswith(".") for part in name.split("/")):
            yield f"{uri.rstrip('/')}/{name}"


def is_image(path: str) -> bool:
    """Whether a file's name ends like an image's."""
    return path.lower().endswith(EXTENSIONS)


def read_csv(uri: str, spark: SparkSession) -> DataFrame:
    """A CSV file with a header line, all cells text, read by one executor through fsspec.

    Raises:
        DataError: no such file, no header, or a column name twice. A line of the wrong length fails the job that reads.
    """
    try:
        with fsspec.open(uri, "rt", encoding="utf-8-sig", newline="") as lines:
            header = next(csv.reader(lines), [])
    except FileNotFoundError as error:
        raise DataError(f"Expected a CSV file at {uri!r}: there is none.") from error
    if not header or len({name.lower() for name in header}) != len(header):  # Spark does not tell cases apart
        raise DataError(f"Expected a first line of distinct column names in {uri!r}: received {header}.")
    rows = spark.sparkContext.parallelize([uri], 1).flatMap(_csv_rows)
    from pyspark.sql.types import StringType, StructField, StructType

    return spark.createDataFrame(rows, StructType([StructField(name, StringType()) for name in header]))


def _csv_rows(uri: str) -> Iterator[list[str]]:
    with fsspec.open(uri, "rt", encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        header = next(reader)
        for row in reader:
            if row and len(row) != len(header):
                raise DataError(f"Expected {len(header)} cells in line {reader.line_num} of {uri!r}: it has {len(row)}.")
            if row:
                yield row


def _list_class(name: str, *, uri: str) -> Iterator[tuple[str, str, str]]:
    folder = f"{uri}/{name}"
    for path in walk(folder):
        if is_image(path):
            yield path, path[len(uri) + 1 :], name


def _column(name: str) -> Any:
    from pyspark.sql import functions as F

    return F.col(quoted(name))
